"""`safetensors.tensorflow`: dictionaries of tensors of TensorFlow."""

from fst.compat.safetensors._arrays import functions as _functions

save, save_file, load, load_file = _functions("tensorflow", lambda tensor: tensor.numpy())
