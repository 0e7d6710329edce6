"""`safetensors.paddle`: dictionaries of tensors of PaddlePaddle."""

from fst.compat.safetensors._arrays import functions as _functions


def _to_numpy(tensor):
    import ml_dtypes
    import paddle

    if tensor.dtype == paddle.bfloat16:
        return tensor.detach().cpu().view("uint16").numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().cpu().numpy()


save, save_file, _load, _load_file = _functions("paddle", _to_numpy)


def _on(tensors, device):
    return tensors if str(device) == "cpu" else {name: tensor.to(device) for name, tensor in tensors.items()}


def load(data, device="cpu"):
    """The tensors of a file's bytes."""
    return _on(_load(data), device)


def load_file(filename, device="cpu", *, backend="mmap"):
    """The tensors of a file."""
    return _on(_load_file(filename, backend=backend), device)
