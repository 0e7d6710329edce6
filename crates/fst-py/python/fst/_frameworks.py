"""Frameworks, devices and types of elements, as callers name them."""

import os

from ._errors import FstTypeError, FstValueError

_TORCH = ("pt", "torch", "pytorch")
_NUMPY = ("np", "numpy")


def _to_jax(array):
    import jax.numpy

    return jax.numpy.asarray(array)


def _to_tensorflow(array):
    import tensorflow

    return tensorflow.convert_to_tensor(array)


def _to_paddle(array):
    import paddle

    if array.dtype.name == "bfloat16":
        return paddle.to_tensor(array.view("uint16"), dtype="bfloat16")
    return paddle.to_tensor(array)


def _to_mlx(array):
    import mlx.core

    if array.dtype.name == "bfloat16":
        return mlx.core.array(array.view("uint16")).view(mlx.core.bfloat16)
    return mlx.core.array(array)


# Made from arrays of NumPy.
_OTHERS = {
    "flax": _to_jax,
    "jax": _to_jax,
    "tf": _to_tensorflow,
    "tensorflow": _to_tensorflow,
    "paddle": _to_paddle,
    "mlx": _to_mlx,
}


class Target:
    """A framework and a device: which tensors are made, and what is done with them then."""

    __slots__ = ("core", "cuda", "finish")

    def __init__(self, framework, device="cpu"):
        #: The framework that the extension module makes tensors of, "pt" or "np".
        self.core = "pt"
        #: The number of the CUDA device that is loaded to, or None for the host.
        self.cuda = None
        #: What makes the caller's tensor of such a one; None where that is what the caller wants.
        self.finish = None
        if not isinstance(framework, str):
            raise FstValueError(f"unknown framework {framework!r}")
        name = framework.lower()
        if name in _TORCH:
            self._place(device)
            return
        self.core = "np"
        if name in _OTHERS:
            self.finish = _OTHERS[name]
        elif name not in _NUMPY:
            known = ", ".join(repr(one) for one in ("pt", "np", *_OTHERS))
            raise FstValueError(f"unknown framework {framework!r}: expected one of {known}")
        if str(device) not in ("cpu", "host"):
            raise FstValueError(f"framework {framework!r} has no device {str(device)!r}: load to the host")

    def _place(self, device):
        if device is None or (isinstance(device, str) and device in ("cpu", "host")):
            return
        import torch

        if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
            raise FstTypeError(f"a device is a name, a number or a torch.device, not {device!r}")
        try:
            place = torch.device(device)
        except RuntimeError as error:
            raise FstValueError(f"unknown device {device!r}: {error}") from None
        if place.type == "cpu":
            return
        if place.type == "cuda" and torch.version.hip is None:
            self.cuda = torch.cuda.current_device() if place.index is None else place.index
        else:
            # Devices that fst does not write to itself.
            self.finish = lambda tensor: tensor.to(place)


def dtype_name(dtype):
    """The name of a type of element, given by name or as a framework's own."""
    if dtype is None or isinstance(dtype, str):
        return dtype
    if type(dtype).__module__.split(".")[0] == "torch":
        return str(dtype).split(".")[-1]
    try:
        import numpy

        return numpy.dtype(dtype).name
    except (ImportError, TypeError):
        raise FstTypeError(f"not a type of element: {dtype!r}") from None


def paths_of(path):
    """A path, or a list of them, as the extension module takes it."""
    if isinstance(path, (list, tuple)):
        return [os.fspath(one) for one in path]
    return os.fspath(path)


def is_torch(tensor):
    """Whether this is a tensor of PyTorch, without importing it."""
    return any(base.__module__ == "torch" and base.__name__ == "Tensor" for base in type(tensor).__mro__)
