"""`safetensors.torch`: dictionaries of tensors, and models."""

import torch

from fst.compat.safetensors import TensorSpec, deserialize, safe_open, serialize, serialize_file

_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
}

# Those that this version of torch has.
_TYPES = {name: getattr(torch, own) for name, own in _NAMES.items() if hasattr(torch, own)}
_SIZE = {dtype: dtype.itemsize for dtype in _TYPES.values()}


def _getdtype(dtype_str):
    return _TYPES[dtype_str]


def storage_ptr(tensor):
    """Address of a tensor's storage; 0 where it has none."""
    return tensor.untyped_storage().data_ptr()


def storage_size(tensor):
    """Bytes of a tensor's storage."""
    return tensor.untyped_storage().nbytes()


def _end_ptr(tensor):
    """Where a tensor's last element ends."""
    if not tensor.nelement():
        return tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()


def _find_shared_tensors(state_dict):
    """Names by the memory that they share: sets of names whose tensors overlap, alone where nothing does."""
    storages = {}
    for name, tensor in state_dict.items():
        if tensor.device.type == "meta" or not storage_ptr(tensor) or not storage_size(tensor):
            continue
        key = tensor.device, storage_ptr(tensor), storage_size(tensor)
        storages.setdefault(key, []).append(name)
    shared = []
    for names in storages.values():
        if len(names) == 1:
            shared.append(set(names))
            continue
        end = None
        spans = [(state_dict[name].data_ptr(), _end_ptr(state_dict[name]), name) for name in names]
        for start, stop, name in sorted(spans):
            if end is None or start >= end:
                shared.append({name})
                end = stop
            else:
                shared[-1].add(name)
                end = max(end, stop)
    return shared


def _is_complete(tensor):
    """Whether a tensor is all of its storage."""
    size = tensor.nelement() * tensor.element_size()
    return tensor.data_ptr() == storage_ptr(tensor) and size == storage_size(tensor)


def _remove_duplicate_names(state_dict, *, preferred_names=None, discard_names=None):
    """Of names that share memory, the ones to leave out, by the one that is kept: of those whose tensors are all
    of their storage one that is preferred, or else not to be discarded; the first by name."""
    preferred, discarded = set(preferred_names or ()), set(discard_names or ())
    left_out = {}
    for names in _find_shared_tensors(state_dict):
        complete = {name for name in names if _is_complete(state_dict[name])}
        if not complete:
            raise RuntimeError(
                "Error while trying to find names to remove to save state dict, but found no suitable name to keep "
                f"for saving amongst: {names}. None is covering the entire storage. Refusing to save/load the model "
                "since you could be storing much more memory than needed."
            )
        kept = min(complete & preferred or complete - discarded or complete)
        if len(names) > 1:
            left_out[kept] = sorted(names - {kept})
    return left_out


def _on_host(tensor):
    return tensor if tensor.device.type == "cpu" else tensor.to("cpu")


def _specs(tensors):
    """What to write, and the tensors that must be kept meanwhile."""
    if not isinstance(tensors, dict):
        raise ValueError(f"Expected a dict of [str, torch.Tensor] but received {type(tensors)}")
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"Key `{name}` is invalid, expected torch.Tensor but received {type(tensor)}")
    sparse = [name for name, tensor in tensors.items() if tensor.layout != torch.strided]
    if sparse:
        raise ValueError(
            f"You are trying to save a sparse tensors: `{sparse}` which this library does not support. You can make "
            "it a dense tensor before saving with `.to_dense()` but be aware this might make a much larger file than "
            "needed."
        )
    shared = [names for names in _find_shared_tensors(tensors) if len(names) > 1]
    if shared:
        raise RuntimeError(
            "Some tensors share memory, this will lead to duplicate memory on disk and potential differences when "
            f"loading them again: {shared}. A potential way to correctly save your model is to use `save_model`."
        )
    specs, kept = {}, []
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(
                f"You are trying to save a non contiguous tensor: `{name}` which is not allowed. Call "
                "`.contiguous()` on it to pack it before saving, or, where tensors are parts of one another, save "
                "only the whole ones."
            )
        tensor = _on_host(tensor)
        kept.append(tensor)
        specs[name] = TensorSpec(
            dtype=str(tensor.dtype).split(".")[-1],
            shape=tensor.shape,
            data_ptr=tensor.data_ptr(),
            data_len=tensor.nelement() * tensor.element_size(),
        )
    return specs, kept


def save(tensors, metadata=None):
    """The bytes of a file with these tensors."""
    specs, kept = _specs(tensors)
    data = serialize(specs, metadata=metadata)
    del kept
    return data


def save_file(tensors, filename, metadata=None):
    """Writes these tensors to a file. They must not change meanwhile."""
    specs, kept = _specs(tensors)
    serialize_file(specs, filename, metadata=metadata)
    del kept


def load(data):
    """The tensors of a file's bytes."""
    loaded = {}
    for name, tensor in deserialize(data):
        dtype, shape = _TYPES[tensor["dtype"]], tensor["shape"]
        if tensor["dtype"] == "F4":
            shape = [*shape[:-1], shape[-1] // 2]
        if tensor["data"]:
            loaded[name] = torch.frombuffer(tensor["data"], dtype=torch.uint8).view(dtype).reshape(shape)
        else:
            loaded[name] = torch.empty(shape, dtype=dtype, device="cpu")
    return loaded


def load_file(filename, device="cpu", *, backend="mmap"):
    """The tensors of a file."""
    with safe_open(filename, framework="pt", device=device, backend=backend) as file:
        return file.get_tensors()


def save_model(model, filename, metadata=None, force_contiguous=True):
    """Saves a model's tensors; of those that share memory one, and the names of the others as metadata."""
    state_dict = model.state_dict()
    metadata = dict(metadata or {})
    for kept, names in _remove_duplicate_names(state_dict).items():
        for name in names:
            metadata.setdefault(name, kept)
            del state_dict[name]
    if force_contiguous:
        state_dict = {name: tensor.contiguous() for name, tensor in state_dict.items()}
    try:
        save_file(state_dict, filename, metadata=metadata or None)
    except ValueError as error:
        raise ValueError(
            f"{error} Or use save_model(..., force_contiguous=True), read the docs for potential caveats."
        ) from error


def load_model(model, filename, strict=True, device="cpu", *, backend="mmap"):
    """Loads a model's tensors, and returns the names that the file lacks, and those that the model lacks."""
    state_dict = load_file(filename, device=device, backend=backend)
    duplicates = _remove_duplicate_names(model.state_dict(), preferred_names=state_dict.keys())
    missing, unexpected = model.load_state_dict(state_dict, strict=False)
    missing, unexpected = set(missing), list(unexpected)
    for names in duplicates.values():
        for name in names:
            # It shares the memory of one that was loaded; the file should not have it.
            if name in missing:
                missing.remove(name)
            else:
                unexpected.append(name)
    if strict and (missing or unexpected):
        message = f"Error(s) in loading state_dict for {type(model).__name__}:"
        for what, names in (("Missing", missing), ("Unexpected", unexpected)):
            if names:
                listed = ", ".join(f'"{name}"' for name in sorted(names))
                message += f"\n    {what} key(s) in state_dict: {listed}"
        raise RuntimeError(message)
    return missing, unexpected
