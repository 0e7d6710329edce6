"""What the modules of frameworks have in common whose tensors are made of NumPy's arrays and become such."""

from fst._frameworks import _OTHERS
from fst.compat.safetensors import numpy, safe_open


def functions(framework, to_numpy):
    """`save`, `save_file`, `load` and `load_file` of a framework."""
    from_numpy = _OTHERS[framework]

    def save(tensors, metadata=None):
        """The bytes of a file with these tensors."""
        return numpy.save({name: to_numpy(tensor) for name, tensor in tensors.items()}, metadata=metadata)

    def save_file(tensors, filename, metadata=None):
        """Writes these tensors to a file."""
        numpy.save_file({name: to_numpy(tensor) for name, tensor in tensors.items()}, filename, metadata=metadata)

    def load(data):
        """The tensors of a file's bytes."""
        return {name: from_numpy(array) for name, array in numpy.load(data).items()}

    def load_file(filename, *, backend="mmap"):
        """The tensors of a file."""
        with safe_open(filename, framework=framework, backend=backend) as file:
            return file.get_tensors()

    return save, save_file, load, load_file
