"""The classes of fastsafetensors 0.5.0 for a single process, over fst.

Groups of several processes, `ParallelLoader`, `ParallelSaver`, `AutoLoader` and its copiers are not here.
"""

#: The version whose names these are.
__version__ = "0.5.0"

from fst.compat.fastsafetensors.common import SafeTensorsMetadata, SingleGroup, TensorFrame, get_device_numa_node
from fst.compat.fastsafetensors.file_buffer import FilesBufferOnDevice
from fst.compat.fastsafetensors.loader import SafeTensorsFileLoader, fastsafe_open

__all__ = [
    "FilesBufferOnDevice",
    "SafeTensorsFileLoader",
    "SafeTensorsMetadata",
    "SingleGroup",
    "TensorFrame",
    "fastsafe_open",
    "get_device_numa_node",
]
