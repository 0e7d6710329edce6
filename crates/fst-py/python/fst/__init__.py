"""Loads safetensors checkpoints from storage into tensors of PyTorch and NumPy, as fast as the hardware allows.

    import fst

    tensors = fst.load_file("model")                    # a folder, an index, a file, an id in the hub's cache
    with fst.safe_open("model", "pt") as checkpoint:    # single tensors, and parts of them
        rows = checkpoint.get_slice("lm_head.weight")[:1000]
    for name, tensor in fst.stream("model"):            # as they land, within a memory budget
        ...

`fst.compat.safetensors` and `fst.compat.fastsafetensors` have the names of those packages.
"""

from ._api import load_file, load_into, load_sharded, save_file, stream
from ._errors import FstError
from ._fst import Checkpoint, Progress, Report, Shard, TensorInfo, __version__
from ._open import Slice, safe_open

__all__ = [
    "Checkpoint",
    "FstError",
    "Progress",
    "Report",
    "Shard",
    "Slice",
    "TensorInfo",
    "__version__",
    "load_file",
    "load_into",
    "load_sharded",
    "safe_open",
    "save_file",
    "stream",
]
