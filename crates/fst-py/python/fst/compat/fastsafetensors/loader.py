"""Loads of whole files."""

import fst
from fst.compat.fastsafetensors.common import SafeTensorsMetadata
from fst.compat.fastsafetensors.file_buffer import FilesBufferOnDevice
from fst.compat.fastsafetensors.frameworks import get_framework_op
from fst.compat.fastsafetensors.st_types import DType


class SafeTensorsFileLoader:
    """Loads files to a device: register them by `add_filenames`, load by `copy_files_to_device`.

    Of the arguments, those that choose among fastsafetensors' ways of copying are taken and change nothing.
    """

    def __init__(
        self,
        pg,
        device="cpu",
        bbuf_size_kb=16 * 1024,
        max_threads=16,
        nogds=False,
        set_numa=True,
        disable_cache=True,
        debug_log=False,
        framework="pytorch",
        use_fgds=False,
        **kwargs,
    ):
        self.framework = get_framework_op(framework)
        self.pg = self.framework.get_process_group(pg)
        self.device = self.framework.get_device(device, self.pg)
        self._keep = None
        self.reset()

    def reset(self):
        """Forgets the files."""
        self.meta = {}
        self.frames = {}

    def close(self):
        """Forgets the files. What was loaded stays."""
        self.reset()

    def set_tensor_filter(self, keep_tensor):
        """Loads only tensors of whose names `keep_tensor` is true; None for all."""
        self._keep = keep_tensor

    def get_keys(self):
        return [name for name in self.frames if self._keep is None or self._keep(name)]

    def get_shape(self, tensor_name):
        if self._keep is not None and not self._keep(tensor_name):
            raise ValueError(f"get_shape: key {tensor_name} is filtered out")
        return self.frames[tensor_name].shape

    def add_filenames(self, filenames):
        """Registers files: lists of paths by rank, of which this process is rank 0."""
        for rank, paths in filenames.items():
            if rank != self.pg.rank():
                raise NotImplementedError("fst.compat.fastsafetensors loads for a single process, rank 0")
            for path in paths:
                meta = SafeTensorsMetadata.from_file(path, self.framework)
                self.meta[path] = (meta, rank)
                self.frames.update(meta.tensors)

    def copy_files_to_device(
        self,
        dtype=DType.AUTO,
        use_buf_register=True,
        max_copy_block_size=16 * 1024 * 1024 * 1024,
        allow_inflight=False,
        borrowed_tensors=False,
    ):
        """Loads the files, converted to `dtype` if it is given, which may not be wider than a tensor's own."""
        files = {}
        for index, (_, (meta, _)) in enumerate(sorted(self.meta.items())):
            for name in meta.tensors:
                if self._keep is not None and not self._keep(name):
                    continue
                if name in files:
                    raise Exception(f"FilesBufferOnDevice: key {name} must be unique among files")
                files[name] = (index, meta)
        size = self.framework.get_dtype_size
        for name, (_, meta) in files.items():
            own = meta.tensors[name].dtype
            if dtype is not DType.AUTO and size(dtype) > size(own):
                raise Exception(f"Online type conversion to larger sizes is not supported ({own} -> {dtype})")
        tensors = {}
        if files:
            loaded = fst.load_file(list(self.meta), self._place(), names=list(files), dtype=_fst_dtype(dtype, files))
            # Each is let go once it is converted.
            for name in list(loaded):
                wrapped = self.framework.wrap_tensor(loaded.pop(name))
                tensors[name] = wrapped.to(dtype=dtype)
        return FilesBufferOnDevice(tensors, files, self.framework, self.pg)

    def _place(self):
        place = self.device.as_str()
        return place.replace("gpu", "cuda")


BaseSafeTensorsFileLoader = SafeTensorsFileLoader

_FLOATS = {DType.F16, DType.F32, DType.F64, DType.BF16, DType.F8_E4M3, DType.F8_E5M2}


def _fst_dtype(dtype, files):
    """What is converted while loading: floating-point tensors, if no other are among them."""
    if dtype not in _FLOATS or any(meta.tensors[name].dtype not in _FLOATS for name, (_, meta) in files.items()):
        return None
    return dtype.value


class fastsafe_open:
    """Loads files at once, and hands their tensors out by name.

    Args:
        filenames: a path, a list of them, or lists by rank, of which this process is rank 0.
        framework: "pt" or "pytorch".
        device: where to.
    """

    def __init__(
        self,
        filenames,
        framework="pt",
        pg=None,
        device="cpu",
        nogds=False,
        debug_log=False,
        max_copy_block_size=16 * 1024 * 1024 * 1024,
        use_fgds=False,
    ):
        self.loader = SafeTensorsFileLoader(pg, device, framework=framework)
        if isinstance(filenames, str):
            filenames = [filenames]
        self.loader.add_filenames(filenames if isinstance(filenames, dict) else {0: list(filenames)})
        self.fb = self.loader.copy_files_to_device()

    def metadata(self):
        """Metadata by path."""
        return {path: meta.metadata for path, (meta, _) in self.loader.meta.items()}

    def keys(self):
        return list(self.fb.key_to_rank_lidx)

    def get_tensor_wrapped(self, name):
        return self.fb.get_tensor_wrapped(name)

    def get_tensor(self, name):
        return self.get_tensor_wrapped(name).get_raw()

    def __enter__(self):
        return self

    def __exit__(self, exc_type, exc_value, tb):
        self.fb.close()
        self.loader.close()
