"""`safetensors.mlx`: dictionaries of arrays of MLX."""

from fst.compat.safetensors._arrays import functions as _functions


def _to_numpy(tensor):
    import ml_dtypes
    import mlx.core
    import numpy

    if tensor.dtype == mlx.core.bfloat16:
        return numpy.asarray(tensor.view(mlx.core.uint16)).view(ml_dtypes.bfloat16)
    return numpy.asarray(tensor)


save, save_file, load, load_file = _functions("mlx", _to_numpy)
