"""`safetensors.numpy`: dictionaries of arrays."""

import numpy as np

from fst._numpy import unpack_f4 as _unpack_f4
from fst.compat.safetensors import TensorSpec, deserialize, safe_open, serialize, serialize_file


def _plain(array):
    """The array, contiguous, and of little-endian elements."""
    array = np.asarray(array, order="C")
    return array.byteswap() if array.dtype.byteorder == ">" else array


def _specs(tensors):
    """What to write, and the arrays that must be kept meanwhile."""
    kept = {name: _plain(array) for name, array in tensors.items()}
    specs = {
        name: TensorSpec(
            dtype=array.dtype.name, shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes
        )
        for name, array in kept.items()
    }
    return specs, kept


def save(tensor_dict, metadata=None):
    """The bytes of a file with these arrays."""
    specs, kept = _specs(tensor_dict)
    data = serialize(specs, metadata=metadata)
    del kept
    return data


def save_file(tensor_dict, filename, metadata=None):
    """Writes these arrays to a file."""
    specs, kept = _specs(tensor_dict)
    serialize_file(specs, filename, metadata=metadata)
    del kept


def _dtype(name):
    from fst.compat.safetensors import _DTYPES

    own = {dtype: framework for framework, dtype in _DTYPES.items()}[name]
    try:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, own, own))
    except ImportError:
        return np.dtype(own)


def load(data):
    """The arrays of a file's bytes."""
    loaded = {}
    for name, tensor in deserialize(data):
        if tensor["dtype"] == "F4":
            import ml_dtypes

            packed = np.frombuffer(tensor["data"], np.uint8)
            loaded[name] = _unpack_f4(packed, ml_dtypes.float4_e2m1fn, tensor["shape"])
        else:
            loaded[name] = np.frombuffer(tensor["data"], _dtype(tensor["dtype"])).reshape(tensor["shape"])
    return loaded


def load_file(filename, *, backend="mmap"):
    """The arrays of a file."""
    with safe_open(filename, framework="np", backend=backend) as file:
        return file.get_tensors()
