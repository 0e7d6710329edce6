"""Has `from_pretrained` of transformers 5 read weights by fst.

    import fst.integrations.transformers
    fst.integrations.transformers.install()
    model = AutoModelForCausalLM.from_pretrained("model")

Parameters own their memory then, instead of being parts of mapped files: a model's files can be replaced or removed
while it is in use, and its first pass does not wait for pages of them. transformers opens each file and materialises
tensors from a few threads of its own; fst reads each of them around the page cache or out of it, whichever is faster.
"""

import importlib

_BEFORE = {}


def _names():
    import fst.compat.safetensors
    import fst.compat.safetensors.torch

    return {
        "safe_open": fst.compat.safetensors.safe_open,
        "_safe_load_bytes": fst.compat.safetensors.torch.load,
        "safe_save_file": fst.compat.safetensors.torch.save_file,
    }


def install():
    """Has transformers load and save by fst, until `uninstall()`. Calling it again changes nothing."""
    module = importlib.import_module("transformers.modeling_utils")
    if not hasattr(module, "safe_open"):
        raise ImportError("this version of transformers does not load as fst.integrations.transformers knows it")
    for name, ours in _names().items():
        if hasattr(module, name) and getattr(module, name) is not ours:
            _BEFORE[name] = getattr(module, name)
            setattr(module, name, ours)


def uninstall():
    """Has transformers load and save as before."""
    module = importlib.import_module("transformers.modeling_utils")
    while _BEFORE:
        name, before = _BEFORE.popitem()
        setattr(module, name, before)
