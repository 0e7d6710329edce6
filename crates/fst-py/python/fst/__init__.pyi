"""Loads safetensors checkpoints from storage into tensors of PyTorch and NumPy, as fast as the hardware allows."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

_Path: TypeAlias = str | os.PathLike[str]
_Paths: TypeAlias = _Path | Sequence[_Path]
_Source: TypeAlias = _Paths | Checkpoint
_Framework: TypeAlias = Literal[
    "pt", "torch", "pytorch", "np", "numpy", "flax", "jax", "tf", "tensorflow", "paddle", "mlx"
]
_Engine: TypeAlias = Literal["auto", "uring", "pread", "mmap", "gds"]
# A name, a number of a CUDA device, or a `torch.device`.
_Device: TypeAlias = str | int | Any
# A name, a `torch.dtype`, or what `numpy.dtype` takes.
_Dtype: TypeAlias = str | Any
# True, a bar of tqdm, or a callable.
_Progress: TypeAlias = bool | Callable[[Progress], object] | Any | None
# A preset's name, or dimensions and shards by name, or what says them.
_Kept: TypeAlias = int | Shard | None
_Shards: TypeAlias = str | Mapping[str, _Kept] | Callable[[TensorInfo], _Kept] | None
# A `torch.distributed.ProcessGroup`.
_Group: TypeAlias = Any
# A tensor of PyTorch, an array of NumPy, or what the framework has.
_Tensor: TypeAlias = Any

__version__: str

class FstError(Exception):
    """What all errors of fst are, beside the built-in class that fits their cause."""

class Progress:
    """How far a load is."""

    @property
    def bytes_done(self) -> int: ...
    @property
    def bytes_total(self) -> int: ...
    @property
    def tensors_total(self) -> int: ...
    @property
    def seconds(self) -> float: ...

class Report:
    """What a load did, and how long each part of it took."""

    @property
    def tensors(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def bytes_read(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def gb_per_s(self) -> float: ...
    @property
    def engine(self) -> str: ...
    @property
    def stages(self) -> dict[str, float]: ...

class TensorInfo:
    """What a header says of a tensor, and where its bytes are."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def path(self) -> os.PathLike[str]: ...
    @property
    def file_range(self) -> tuple[int, int]: ...

class Checkpoint:
    """The tensors of a checkpoint and the files that hold them. Headers only."""

    def __init__(self, path: _Paths) -> None: ...
    def keys(self) -> list[str]: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[str]: ...
    def __contains__(self, name: object) -> bool: ...
    def __getitem__(self, name: str) -> TensorInfo: ...
    @property
    def metadata(self) -> dict[str, str]: ...
    @property
    def files(self) -> list[os.PathLike[str]]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def notices(self) -> list[str]: ...

class Shard:
    """What each rank of a group keeps of a tensor. Dimensions and sizes are those of the file's shape."""

    @property
    def fused_into(self) -> str | None: ...
    @staticmethod
    def replicate() -> Shard: ...
    @staticmethod
    def skip() -> Shard: ...
    @staticmethod
    def keep_on(*ranks: int) -> Shard: ...
    @staticmethod
    def split(
        dim: int,
        *,
        remainder: Literal["ceil", "chunk", "balanced", "exact"] = "ceil",
        unit: int | None = None,
        head_dim: int | None = None,
        sections: int | Sequence[int] | None = None,
        fused_into: str | None = None,
        position: int = 0,
    ) -> Shard: ...
    @staticmethod
    def vocab_rows(multiple: int = 64) -> Shard: ...
    @staticmethod
    def ranges(dim: int, per_rank: Sequence[Sequence[tuple[int, int]]]) -> Shard: ...

class Slice:
    """A tensor of which nothing has been read yet."""

    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...
    def __getitem__(self, index: Any) -> _Tensor: ...

class safe_open:
    """An open checkpoint, whose tensors are read when they are asked for."""

    def __init__(
        self,
        filename: _Paths,
        framework: _Framework = "pt",
        device: _Device = "cpu",
        *,
        backend: _Engine | None = None,
    ) -> None: ...
    def keys(self) -> list[str]: ...
    def offset_keys(self) -> list[str]: ...
    def metadata(self) -> dict[str, str] | None: ...
    def get_tensor(self, name: str) -> _Tensor: ...
    def get_tensors(self) -> dict[str, _Tensor]: ...
    def get_slice(self, name: str) -> Slice: ...
    def close(self) -> None: ...
    def __contains__(self, name: str) -> bool: ...
    def __len__(self) -> int: ...
    def __enter__(self) -> safe_open: ...
    def __exit__(self, *exception: object) -> None: ...

def load_file(
    filename: _Source,
    device: _Device = "cpu",
    *,
    dtype: _Dtype | None = None,
    select: str | Iterable[str] | None = None,
    names: str | Iterable[str] | None = None,
    framework: _Framework = "pt",
    progress: _Progress = None,
    engine: _Engine = "auto",
    verify: _Path | None = None,
) -> dict[str, _Tensor]:
    """Loads a checkpoint into a dictionary of tensors, in the order of the files."""

def load_sharded(
    path: _Source,
    group: _Group,
    shard: _Shards = None,
    device: _Device = "cpu",
    *,
    dtype: _Dtype | None = None,
    select: str | Iterable[str] | None = None,
    names: str | Iterable[str] | None = None,
    framework: _Framework = "pt",
    progress: _Progress = None,
    engine: _Engine = "auto",
) -> dict[str, _Tensor]:
    """Loads this rank's shards of a checkpoint; all ranks of the group call it."""

def stream(
    path: _Source,
    device: _Device = "cpu",
    *,
    names: str | Iterable[str] | None = None,
    select: str | Iterable[str] | None = None,
    dtype: _Dtype | None = None,
    memory_budget: int | float | None = None,
    in_order: bool = False,
    group: _Group | None = None,
    shard: _Shards = None,
    framework: _Framework = "pt",
    progress: _Progress = None,
    engine: _Engine = "auto",
    verify: _Path | None = None,
) -> Iterator[tuple[str, _Tensor]]:
    """Loads tensors in the background and yields them as they land, within a memory budget."""

def load_into(
    path: _Source,
    tensors: Mapping[str, _Tensor],
    *,
    dtype: _Dtype | None = None,
    progress: _Progress = None,
    engine: _Engine = "auto",
    verify: _Path | None = None,
) -> Report:
    """Loads into tensors that are there already."""

def save_file(
    tensors: Mapping[str, _Tensor],
    filename: _Path,
    metadata: Mapping[str, str] | None = None,
    *,
    max_shard_size: int | str | None = None,
) -> None:
    """Saves tensors as a file, or as several and an index."""
