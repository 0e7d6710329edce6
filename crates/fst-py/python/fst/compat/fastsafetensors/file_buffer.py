"""Loaded files."""

from fst.compat.fastsafetensors.st_types import DType


class FilesBufferOnDevice:
    """The tensors of loaded files. Each owns its memory: what was handed out stays valid after `close`."""

    def __init__(self, tensors, files, framework, pg):
        #: Wrapped tensors, and paths of files, by name.
        self._tensors = tensors
        self._files = files
        self.framework = framework
        self.pg = pg
        self.key_to_rank_lidx = {name: (0, index) for name, (index, _) in files.items()}

    def close(self):
        """Forgets the tensors."""
        self._tensors = {}

    def _find(self, name):
        if name not in self._files:
            raise ValueError(f"_get_rank: key {name} was not found in files")
        if name not in self._tensors:
            raise ValueError(f"tensor {name} is asked for after close()")
        return self._tensors[name]

    def get_filename(self, tensor_name):
        self._find(tensor_name)
        return self._files[tensor_name][1].src

    def get_shape(self, tensor_name):
        self._find(tensor_name)
        return self._files[tensor_name][1].tensors[tensor_name].shape

    def get_sharded_wrapped(self, tensor_name, dim, device=None, dtype=DType.AUTO):
        """This process's part of a tensor, which is all of it."""
        return self._find(tensor_name).to(device=device, dtype=dtype)

    def get_sharded(self, tensor_name, dim, device=None, dtype=DType.AUTO):
        return self.get_sharded_wrapped(tensor_name, dim, device, dtype).get_raw()

    def get_tensor_wrapped(self, tensor_name, device=None, dtype=DType.AUTO):
        return self.get_sharded_wrapped(tensor_name, -1, device, dtype)

    def get_tensor(self, tensor_name, device=None, dtype=DType.AUTO):
        return self.get_tensor_wrapped(tensor_name, device, dtype).get_raw()

    def push_tensor(self, tensor_name, dst_rank, device=None, dtype=DType.AUTO):
        """The tensor, on the rank that it is pushed to."""
        tensor = self._find(tensor_name)
        return tensor.to(device=device, dtype=dtype).get_raw() if dst_rank == self.pg.rank() else None

    def get_multi_cols(self, tensor_names, dim, device=None, dtype=DType.AUTO):
        """Tensors, one behind the other in a dimension."""
        tensors = [self._find(name) for name in tensor_names]
        return self.framework.concat_tensors(tensors, dim).to(device=device, dtype=dtype)

    def as_dict(self, tensor_shard_dim):
        """Wrapped tensors by name."""
        return {name: self.get_sharded_wrapped(name, dim) for name, dim in tensor_shard_dim.items()}

    def iter_local_tensors(self, tensor_names):
        for name in tensor_names:
            yield name, self.get_tensor(name)
