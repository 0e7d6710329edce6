"""`safetensors.flax`: dictionaries of arrays of JAX."""

from fst.compat.safetensors._arrays import functions as _functions


def _to_numpy(tensor):
    import numpy

    return numpy.asarray(tensor)


save, save_file, load, load_file = _functions("flax", _to_numpy)
