"""A plugin of pytest: fastsafetensors' tests import parts of it that `fst.compat.fastsafetensors` does not have, and
some of these only to be quiet. Empty modules stand in for them, so that the other tests can run."""

import sys
import types

import fst.compat

fst.compat.install("fastsafetensors")
import fastsafetensors.common  # noqa: E402
import fastsafetensors.frameworks as frameworks  # noqa: E402


class _Absent:
    """What a test that needs it fails with."""

    def __init__(self, *_, **__):
        raise NotImplementedError("not in fst.compat.fastsafetensors")


def _module(name, **names):
    module = types.ModuleType(f"fastsafetensors.{name}")
    vars(module).update(names)
    sys.modules[module.__name__] = module
    parent, _, own = module.__name__.rpartition(".")
    setattr(sys.modules[parent], own, module)


_module(
    "cpp",
    set_debug_log=lambda on: None,
    load_library_functions=lambda name: None,
    get_cpp_metrics=lambda: types.SimpleNamespace(bounce_buffer_bytes=0),
    gds_device_buffer=_Absent,
)
_module("copier")
_module("copier.gds", GdsFileCopier=_Absent)
_module("copier.nogds", NoGdsFileCopier=_Absent)
_module("copier.unified", UnifiedMemCopier=_Absent, is_unified_memory_system=_Absent)
_module("dlpack", from_cuda_buffer=_Absent)
_module(
    "frameworks._torch",
    dtype_convert={dtype: frameworks.torch_dtype(dtype) for dtype in frameworks._TORCH},
)

fastsafetensors.common.resolve_cudart_lib_name = lambda: ""
