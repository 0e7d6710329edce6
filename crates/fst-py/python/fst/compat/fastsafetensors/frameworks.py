"""Tensors and what is done with them, by framework: PyTorch only."""

from fst.compat.fastsafetensors.st_types import Device, DType, DTYPE_SIZES

_TORCH = {
    DType.BOOL: "bool",
    DType.I8: "int8",
    DType.I16: "int16",
    DType.I32: "int32",
    DType.I64: "int64",
    DType.U8: "uint8",
    DType.U16: "uint16",
    DType.U32: "uint32",
    DType.U64: "uint64",
    DType.F16: "float16",
    DType.F32: "float32",
    DType.F64: "float64",
    DType.BF16: "bfloat16",
    DType.F8_E5M2: "float8_e5m2",
    DType.F8_E4M3: "float8_e4m3fn",
    DType.F8_E8M0: "float8_e8m0fnu",
    DType.F4: "float4_e2m1fn_x2",
}


def torch_dtype(dtype):
    """PyTorch's type for a `DType`."""
    import torch

    return getattr(torch, _TORCH[dtype])


class TensorBase:
    """A tensor of PyTorch, wrapped."""

    def __init__(self, device, dtype, raw):
        self.device = device
        self.dtype = dtype
        self.real_tensor = raw

    def get_raw(self):
        return self.real_tensor

    def get_shape(self):
        return list(self.real_tensor.shape)

    def _with(self, raw, device=None, dtype=None):
        return type(self)(device or self.device, dtype or self.dtype, raw)

    def contiguous(self):
        return self._with(self.real_tensor.contiguous())

    def to(self, device=None, dtype=DType.AUTO):
        place = None if device is None else device.as_str()
        if dtype is DType.AUTO or dtype is self.dtype:
            return self if place is None else self._with(self.real_tensor.to(place), device)
        return self._with(self.real_tensor.to(device=place, dtype=torch_dtype(dtype)), device, dtype)

    def clone(self):
        return self._with(self.real_tensor.clone())

    def detach(self):
        return self._with(self.real_tensor.detach())

    def view(self, dtype):
        return self._with(self.real_tensor.view(torch_dtype(dtype)), dtype=dtype)

    def reshape(self, shape):
        return self._with(self.real_tensor.reshape(shape))

    def data_ptr(self):
        return self.real_tensor.data_ptr()

    def __getitem__(self, index):
        return self._with(self.real_tensor[index])


class SingleGroupOf:
    """The group of a process alone."""

    def size(self):
        return 1

    def rank(self):
        return 0


class FrameworkOpBase:
    """What is done with tensors of PyTorch."""

    def get_name(self):
        return "pytorch"

    def get_device(self, device, pg):
        return Device.from_str(device)

    def set_device(self, device):
        if device.type.value != "cpu":
            import torch

            torch.cuda.set_device(device.index or 0)

    def get_process_group(self, pg):
        if pg is None:
            return SingleGroupOf()
        if not hasattr(pg, "size") or not hasattr(pg, "rank"):
            raise TypeError(f"not a process group: {pg!r}")
        if pg.size() != 1:
            raise NotImplementedError("fst.compat.fastsafetensors loads for a single process")
        return pg

    def get_dtype_size(self, dtype):
        return DTYPE_SIZES[dtype]

    def get_device_ptr_align(self):
        return 16

    def get_empty_tensor(self, shape, dtype, device):
        import torch

        return self._wrapped(torch.empty(shape, dtype=torch_dtype(dtype), device=device.as_str()), device, dtype)

    def wrap_tensor(self, tensor):
        dtype = {name: dtype for dtype, name in _TORCH.items()}[str(tensor.dtype).split(".")[-1]]
        return self._wrapped(tensor, Device.from_str(str(tensor.device)), dtype)

    def _wrapped(self, raw, device, dtype):
        return TensorBase(device, dtype, raw)

    def concat_tensors(self, tensors, dim):
        import torch

        return self.wrap_tensor(torch.cat([tensor.get_raw() for tensor in tensors], dim))

    def copy_tensor(self, dst, src):
        dst.get_raw().copy_(src.get_raw())

    def randn(self, s, device, dtype):
        import torch

        return self._wrapped(torch.randn(s, dtype=torch_dtype(dtype), device=device.as_str()), device, dtype)

    def is_equal(self, wrapped, real):
        """Whether two tensors are the same, bit by bit."""
        import torch

        if not isinstance(real, torch.Tensor):
            raise TypeError(f"not a tensor of PyTorch: {real!r}")
        raw = wrapped.get_raw()
        if (raw.dtype, raw.shape) != (real.dtype, real.shape):
            return False
        one, other = (tensor.detach().contiguous().reshape(-1) for tensor in (raw, real))
        return not raw.numel() or torch.equal(one.view(torch.uint8), other.view(torch.uint8))

    def support_fp8(self):
        import torch

        return hasattr(torch, "float8_e4m3fn")

    def get_cuda_ver(self):
        import torch

        if not torch.cuda.is_available():
            return "0.0"
        return f"hip-{torch.version.hip}" if torch.version.hip else f"cuda-{torch.version.cuda}"

    def get_mem_used(self):
        """Bytes that loaders hold beside their tensors: none, since tensors own their memory."""
        return 0


def get_framework_op(name):
    """What is done with tensors of the framework of this name: "pytorch", or "pt"."""
    if name in ("pt", "pytorch", "torch"):
        return FrameworkOpBase()
    raise Exception(f"Unknown framework name: {name} (fst.compat.fastsafetensors has \"pytorch\")")
