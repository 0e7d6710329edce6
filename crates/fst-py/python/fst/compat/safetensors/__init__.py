"""The names of safetensors 0.8.0, with its exceptions, over fst."""

import errno
import os

from fst import _fst
from fst import safe_open as _safe_open
from fst._api import _Spec
from fst._errors import FstError, FstFileNotFoundError
from fst._open import Slice as _Slice

#: The version whose names these are.
__version__ = "0.8.0"

__all__ = ["SafetensorError", "TensorSpec", "deserialize", "safe_open", "serialize", "serialize_file"]


class SafetensorError(Exception):
    """What safetensors raises: for bad files, unknown tensors and slices that make no sense."""


# By the names of torch and NumPy, which differ from those of the format.
_DTYPES = {
    "bool": "BOOL",
    "int8": "I8",
    "uint8": "U8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "float4_e2m1fn_x2": "F4",
    "complex64": "C64",
}


class TensorSpec:
    """A tensor to be written: the name of its type as torch or NumPy has it, its shape, the address of its
    memory, which the caller keeps, and the bytes of that."""

    __slots__ = ("data_len", "data_ptr", "dtype", "shape")

    def __init__(self, *, dtype, shape, data_ptr, data_len):
        if dtype not in _DTYPES:
            raise SafetensorError(f'Unknown dtype "{dtype}". Supported dtypes: {", ".join(_DTYPES)}')
        self.dtype = _DTYPES[dtype]
        self.shape = [int(size) for size in shape]
        if any(size < 0 for size in (*self.shape, data_ptr, data_len)):
            raise OverflowError("can't convert negative int to unsigned")
        if self.dtype == "F4" and self.shape:
            # Two elements to a byte, of which frameworks count the latter.
            self.shape[-1] *= 2
        self.data_ptr = data_ptr
        self.data_len = data_len

    def __repr__(self):
        return (
            f"TensorSpec(dtype={self.dtype!r}, shape={self.shape}, data_ptr={self.data_ptr}, "
            f"data_len={self.data_len})"
        )


def _specs(tensor_dict, metadata):
    if not isinstance(tensor_dict, dict):
        raise TypeError(f"argument 'tensor_dict': {type(tensor_dict).__name__!r} object is not an instance of 'dict'")
    specs = []
    for name, spec in tensor_dict.items():
        if not isinstance(spec, TensorSpec):
            kind = type(spec).__name__
            raise TypeError(f"argument 'tensor_dict': {kind!r} object is not an instance of 'TensorSpec'")
        specs.append(_Spec(name, spec.dtype, tuple(spec.shape), spec.data_ptr, spec.data_len))
    return specs, None if metadata is None else list(metadata.items())


def serialize(tensor_dict, metadata=None):
    """The bytes of a file with these tensors, given as `TensorSpec` by name."""
    specs, metadata = _specs(tensor_dict, metadata)
    try:
        return _fst.file_bytes(specs, metadata, 8)
    except FstError as error:
        raise SafetensorError(f"Error while serializing: {error}") from None


def serialize_file(tensor_dict, filename, metadata=None):
    """Writes a file with these tensors, given as `TensorSpec` by name."""
    specs, metadata = _specs(tensor_dict, metadata)
    try:
        _fst.write_file(os.fspath(filename), specs, metadata, 8)
    except FstError as error:
        raise SafetensorError(f"Error while serializing: {error}") from None


def deserialize(bytes):
    """The tensors of a file's bytes: a list of names and dictionaries of "shape", "dtype" and "data"."""
    try:
        entries, _ = _fst.parse(bytes)
    except FstError as error:
        raise SafetensorError(f"Error while deserializing: {error}") from None
    return [
        (name, {"shape": shape, "dtype": dtype, "data": bytearray(memoryview(bytes)[start:end])})
        for name, dtype, shape, start, end in entries
    ]


class PySafeSlice(_Slice):
    """A tensor to be indexed. With PyTorch, as its tensors are; otherwise by integers, slices and an ellipsis."""

    __slots__ = ()

    def __getitem__(self, index):
        try:
            if self._open._target.core == "np":
                index = _checked(index, self.get_shape())
            return super().__getitem__(index)
        except FstError as error:
            raise SafetensorError(str(error)) from None


def _checked(index, shape):
    """An index for NumPy's tensors, without what safetensors refuses."""
    items = index if isinstance(index, tuple) else (index,)
    if isinstance(index, list):
        if index:
            raise SafetensorError("Non empty lists are not implemented")
        items = (slice(0, 0),)
    plain = [item for item in items if item is not Ellipsis]
    if len(items) - len(plain) > 1:
        raise SafetensorError("Only one ellipsis (...) is allowed in slice index")

    def refused(why):
        shown = ", ".join(map(_shown, items))
        return SafetensorError(f"Error during slicing [{shown}] with shape {shape}: {why}")

    if len(plain) > len(shape):
        raise refused("more slicing indexes than dimensions in tensor")
    for at, item in enumerate(items):
        dim = at
        if Ellipsis in items[:at]:
            dim = at + len(shape) - len(items)
        if item is Ellipsis:
            continue
        size = shape[dim]
        if isinstance(item, slice):
            if item.step is not None and item.step <= 0:
                raise SafetensorError(f"Slice step must be a positive integer, got {item.step}")
            start, stop = item.start, item.stop
            if start is not None and start >= size > 0:
                raise refused(f"index {start} out of bounds for tensor dimension #{dim} of size {size}")
            if stop is not None and stop > size:
                raise refused(f"index {stop - 1} out of bounds for tensor dimension #{dim} of size {size}")
        elif hasattr(item, "__index__"):
            if item < -size:
                raise SafetensorError(f"Invalid index {item} for dimension {dim} of size {size}")
            if item >= size:
                raise refused(f"index {item} out of bounds for tensor dimension #{dim} of size {size}")
        else:
            raise SafetensorError(
                f"Unsupported slice index at position {at}: expected slice, int, or ellipsis"
            )
    return tuple(int(item) if hasattr(item, "__index__") else item for item in items)


def _shown(item):
    if item is Ellipsis:
        return "..."
    if not isinstance(item, slice):
        return str(item)
    start, stop = ("" if end is None else end for end in (item.start, item.stop))
    return f"{start}:{stop}"


class safe_open(_safe_open):
    """`safetensors.safe_open`: see `fst.safe_open`. Folders, indices and lists are taken, too."""

    def __init__(self, filename, framework, device="cpu", *, backend="mmap"):
        if backend not in ("mmap", "pread"):
            raise SafetensorError(f'backend "{backend}" is invalid (expected one of: "mmap", "pread")')
        try:
            super().__init__(filename, framework, device, backend=backend)
        except FstFileNotFoundError:
            # With no more than this message, and the number.
            error = FileNotFoundError(f"No such file or directory: {filename}")
            error.errno = errno.ENOENT
            raise error from None
        except FstError as error:
            raise self._refused(framework, device, error) from None

    @classmethod
    def _of_descriptor(cls, file, framework, device="cpu"):
        try:
            return super()._of_descriptor(file, framework, device)
        except FstError as error:
            raise cls._refused(framework, device, error) from None

    @staticmethod
    def _refused(framework, device, error):
        message = str(error)
        if message.startswith("unknown framework"):
            return SafetensorError(f"framework {framework} is invalid")
        if message.startswith(("unknown device", "a device is")):
            return SafetensorError(f"device {device} is invalid")
        if message.startswith("framework "):
            framework = {"np": "numpy"}.get(framework, framework)
            return SafetensorError(f"Device {device} is not supported for framework {framework}")
        if isinstance(error, OSError):
            # As the system tells it.
            return OSError(error.errno, message)
        return SafetensorError(f"Error while deserializing header: {message}")

    @property
    def _session(self):
        if self._opened is None:
            raise SafetensorError("File is closed")
        return self._opened

    def _failed(self, name, error):
        if isinstance(error, KeyError):
            return SafetensorError(f"File does not contain tensor {name}")
        return SafetensorError(str(error))

    def get_tensor(self, name):
        """Reads a tensor."""
        try:
            return super().get_tensor(name)
        except FstError as error:
            raise self._failed(name, error) from None

    def get_tensors(self):
        """Reads all tensors."""
        try:
            return super().get_tensors()
        except FstError as error:
            raise SafetensorError(str(error)) from None

    def get_slice(self, name):
        """A tensor to be indexed."""
        try:
            self._session.info(name)
        except FstError as error:
            raise self._failed(name, error) from None
        return PySafeSlice(self, name)


def _safe_open_handle(f, framework, device="cpu"):
    """`safe_open` of an open file."""
    return safe_open._of_descriptor(f, framework, device)
