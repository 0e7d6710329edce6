"""What headers say."""

import json
import os
from collections import OrderedDict
from dataclasses import dataclass

from fst.compat.fastsafetensors.frameworks import SingleGroupOf as SingleGroup  # noqa: F401
from fst.compat.fastsafetensors.st_types import DType


def is_gpu_found():
    """Whether PyTorch has a device."""
    import torch

    return torch.cuda.is_available()


def get_device_numa_node(device):
    """The NUMA node of a CUDA device, or None."""
    try:
        import torch

        properties = torch.cuda.get_device_properties(device)
        bus = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
        with open(f"/sys/bus/pci/devices/{bus}/numa_node", encoding="ascii") as file:
            return max(int(file.read()), 0)
    except Exception:  # noqa: BLE001  no device, no driver, or a system that does not tell
        return None


@dataclass
class TensorFrame:
    """A tensor's type, shape and place in the data of its file, or a part of it."""

    dtype: DType
    shape: list
    data_offsets: list
    strides: list
    offsets: list
    sliced: bool

    @classmethod
    def from_buffer(cls, entry):
        shape = entry["shape"]
        if not isinstance(shape, list) or any(type(size) is not int or size < 0 for size in shape):
            raise ValueError(f"shape must contain nonnegative integers: {shape!r}")
        strides = [1] * len(shape)
        for dim in range(len(shape) - 1, 0, -1):
            strides[dim - 1] = strides[dim] * shape[dim]
        return cls(DType(entry["dtype"]), shape, list(entry["data_offsets"]), strides, [0] * len(shape), False)

    def __getitem__(self, index):
        items = index if isinstance(index, tuple) else (index,)
        if len(items) > len(self.shape):
            raise IndexError(f"{len(items)} indices of a tensor of {len(self.shape)} dimensions")
        shape, strides, offsets = [], [], []
        for dim, item in enumerate([*items, *[slice(None)] * (len(self.shape) - len(items))]):
            size = self.shape[dim]
            if isinstance(item, slice):
                positions = range(*item.indices(size))
                if not positions:
                    return TensorFrame(self.dtype, [], self.data_offsets, [], [], False)
            elif isinstance(item, int):
                if not -size <= item < size:
                    raise IndexError(f"index {item} of dimension {dim} of size {size}")
                positions = range(item % size, item % size + 1)
            else:
                raise TypeError(f"an index is an integer or a slice, not {item!r}")
            shape.append(len(positions))
            strides.append(self.strides[dim] * positions.step)
            offsets.append(self.offsets[dim] + positions.start)
        return TensorFrame(self.dtype, shape, self.data_offsets, strides, offsets, True)


class SafeTensorsMetadata:
    """A file's header."""

    def __init__(self, string, header_length, size_bytes, framework, src="", keep_orig_dict=False):
        entries = json.loads(string, object_pairs_hook=OrderedDict)
        self.src = src
        self.framework = framework
        self.metadata = entries.pop("__metadata__", "")
        self.header_length = header_length
        self.size_bytes = size_bytes
        self.aligned = header_length % framework.get_device_ptr_align() == 0
        if keep_orig_dict:
            self.ser = entries
        self.tensors = {}
        end = 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"][0]):
            frame = TensorFrame.from_buffer(entry)
            begin, stop = frame.data_offsets
            if begin != end or stop < begin:
                raise Exception(f"validate(tensor {name}): InvalidOffset s={begin}, start={end}, e={stop}, src={src}")
            size = framework.get_dtype_size(frame.dtype)
            for length in frame.shape:
                size *= length
            if stop - begin != size:
                raise Exception(
                    f"validate(tensor {name}): TensorInvalidInfo, e-s={stop - begin}, nbytes={size}, src={src}"
                )
            self.tensors[name] = frame
            end = stop
        if end + header_length > size_bytes:
            raise Exception(
                f"MetadataIncompleteBuffer, src={src}, start={end}, header_length={header_length}, "
                f"size_bytes={size_bytes}"
            )

    @classmethod
    def from_fd(cls, fd, filename, framework, keep_orig_dict=False):
        """Of an open file, from its place on."""
        size = os.fstat(fd).st_size
        if size < 8:
            raise Exception(f"{filename}: HeaderTooSmall, buffer_len={size}")
        length = int.from_bytes(_read(fd, 8, filename), "little")
        if length > 100_000_000:
            raise Exception(f"{filename}: HeaderTooLarge, n={length}, buffer_len={size}")
        if length > size - 8:
            raise Exception(f"{filename}: InvalidHeaderLength, n={length}, buffer_len={size}")
        text = _read(fd, length, filename).decode("utf-8")
        return cls(text, length + 8, size, framework, filename, keep_orig_dict)

    @classmethod
    def from_file(cls, filename, framework):
        fd = os.open(filename, os.O_RDONLY)
        try:
            return cls.from_fd(fd, filename, framework)
        finally:
            os.close(fd)

    def __repr__(self):
        return str({"__metadata__": self.metadata, "tensors": self.tensors})


def _read(fd, length, filename):
    parts = []
    while length:
        part = os.read(fd, length)
        if not part:
            raise Exception(f"{filename}: the file ends within its header")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
