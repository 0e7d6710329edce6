"""Devices and types of elements."""

from dataclasses import dataclass
from enum import Enum


class DeviceType(Enum):
    """Kinds of devices."""

    CPU = "cpu"
    CUDA = "cuda"
    GPU = "gpu"


@dataclass(frozen=True)
class Device:
    """A device of a kind, and its number where there are several."""

    type: DeviceType = DeviceType.CPU
    index: int | None = None

    def as_str(self):
        return self.type.value if self.index is None else f"{self.type.value}:{self.index}"

    @classmethod
    def from_str(cls, s):
        kind, colon, index = s.partition(":")
        try:
            kind = DeviceType(kind.lower())
        except ValueError:
            raise ValueError(f"Unknown device type: {kind}") from None
        try:
            return cls(kind, int(index) if colon else None)
        except ValueError:
            raise ValueError(f"Invalid index: {index}") from None


_NAMES = "BOOL I8 I16 I32 I64 U8 U16 U32 U64 F16 F32 F64 BF16 F8_E5M2 F8_E4M3 F8_E8M0 F4 AUTO"

#: Types of elements by the format's names; AUTO stands for the type that a tensor has in its file.
DType = Enum("DType", {name: name for name in _NAMES.split()})

#: Bytes of an element; of F4 two share one.
DTYPE_SIZES = dict(
    zip(DType, (1, 1, 2, 4, 8, 1, 2, 4, 8, 2, 4, 8, 2, 1, 1, 1, 0.5)),
)
