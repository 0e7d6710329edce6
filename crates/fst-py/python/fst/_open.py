"""`safe_open`: reads of single tensors and of parts of them."""

from . import _fst, _slices
from ._errors import FstError, FstIndexError, FstValueError
from ._frameworks import Target, paths_of

_ENGINES = {None: "auto", "mmap": "auto", "pread": "auto"}


class Slice:
    """A tensor of which nothing has been read yet: index it to read that part.

    What `get_slice(name)[index]` returns is what `get_tensor(name)[index]` would, but owns its memory. No more
    is read than the index needs, but for positions of the last dimension between those of a step.
    """

    __slots__ = ("_name", "_open")

    def __init__(self, open_, name):
        self._open = open_
        self._name = name

    def get_shape(self):
        """The shape, as the file has it."""
        return list(self._open._session.info(self._name)[1])

    def get_dtype(self):
        """The format's name of the type of the elements, such as "BF16"."""
        return self._open._session.info(self._name)[0]

    def __getitem__(self, index):
        open_ = self._open
        session = open_._session
        dtype, shape = session.info(self._name)
        torch = open_._target.core == "pt"
        packed = dtype == "F4"
        if packed and torch:
            shape = (*shape[:-1], shape[-1] // 2)
        planned = _slices.plan(shape, index)
        if planned is None:
            # The framework refuses it, or understands what is no plain index.
            _check(torch, shape, index)
            planned = [], index
        cuts, rest = planned
        if packed and torch and cuts and cuts[-1][0] == len(shape) - 1:
            # The last dimension is counted by the byte.
            dim, start, end, step = cuts.pop()
            cuts.append((dim, 2 * start, 2 * end, step))
        elif packed and not torch:
            # A cut may lie inside a byte.
            cuts, rest = [], index
        read = session.tensor(self._name, cuts)
        whole = isinstance(rest, tuple) and _slices.is_whole(rest)
        return open_._finished(read if whole else _part(torch, read, rest))

    def __repr__(self):
        return f"Slice({self._name!r}, {self.get_dtype()}, {self.get_shape()})"


def _check(torch, shape, index):
    """Raises what the framework raises for an index of a tensor of this shape."""
    if torch:
        import torch

        torch.empty(shape, device="meta")[index]
    else:
        import numpy

        try:
            numpy.broadcast_to(numpy.empty((), numpy.uint8), shape)[index]
        except IndexError as error:
            raise FstIndexError(str(error)) from None


def _part(torch, tensor, index):
    """A part of a tensor in memory of its own."""
    part = tensor[index]
    if not torch:
        import numpy

        return numpy.array(part, order="C")
    storage = part.untyped_storage()
    if part.is_contiguous() and storage.nbytes() == part.numel() * part.element_size():
        return part
    return part.contiguous() if not part.is_contiguous() else part.clone()


class safe_open:
    """An open checkpoint: a file, an index, a folder, a list of these, or the id of a repository in the cache of
    the Hugging Face hub. Headers are read at once, tensors when they are asked for, from files that stay open.

    Tensors own their memory: they are writable, and stay when this is closed. Any number of threads may read.

    Args:
        filename: the path, or a list of paths.
        framework: "pt" (PyTorch), "np" (NumPy; types of the package ml_dtypes for what NumPy does not have), or
            "flax", "tf", "paddle" and "mlx", whose tensors are made from NumPy's.
        device: where tensors are made: a name, a number of a CUDA device, or a `torch.device`.
        backend: the engine for large reads; "mmap" and "pread" of safetensors are taken for the default.
    """

    _error = FstValueError

    def __init__(self, filename, framework="pt", device="cpu", *, backend=None):
        self._arguments = (filename, framework, device, backend)
        self._target = Target(framework, device)
        engine = _ENGINES.get(backend, backend)
        if not isinstance(engine, str):
            raise FstValueError(f"unknown backend {backend!r}")
        self._opened = _fst.Session(paths_of(filename), self._target.core, engine, self._target.cuda)

    @classmethod
    def _of_descriptor(cls, file, framework="pt", device="cpu"):
        """The same of an open file: anything with a `fileno`."""
        self = cls.__new__(cls)
        self._arguments = None
        self._target = Target(framework, device)
        self._opened = _fst.Session(None, self._target.core, "auto", self._target.cuda, file.fileno())
        return self

    @property
    def _session(self):
        if self._opened is None:
            raise FstValueError("the file is closed")
        return self._opened

    def _finished(self, tensor):
        finish = self._target.finish
        return tensor if finish is None else finish(tensor)

    def keys(self):
        """Names of the tensors, sorted."""
        return sorted(self._session.names())

    def offset_keys(self):
        """Names of the tensors, by file, and by place in it."""
        return self._session.names()

    def metadata(self):
        """The metadata, a dictionary of strings, or None if there is none."""
        return self._session.metadata() or None

    def get_tensor(self, name):
        """Reads a tensor."""
        session = self._opened
        if session is None:
            session = self._session
        tensor = session.tensor(name)
        finish = self._target.finish
        return tensor if finish is None else finish(tensor)

    def get_tensors(self):
        """Reads all tensors, into a dictionary in the order of `offset_keys`."""
        tensors = self._session.tensors()
        finish = self._target.finish
        if finish is not None:
            for name, tensor in tensors.items():
                tensors[name] = finish(tensor)
        return tensors

    def get_slice(self, name):
        """A tensor to be indexed: `get_slice("w")[10:20, ::2]` reads a part of it."""
        self._session.info(name)
        return Slice(self, name)

    def close(self):
        """Closes the files. Tensors stay."""
        self._opened = None

    def __contains__(self, name):
        return self._session.contains(name)

    def __len__(self):
        return len(self._session.names())

    def __enter__(self):
        self._session
        return self

    def __exit__(self, *_):
        self.close()

    def __reduce__(self):
        if self._arguments is None:
            raise FstError("what was opened by a descriptor has no path to be opened again by")
        return _reopened, (type(self), *self._arguments)

    def __repr__(self):
        state = "closed" if self._opened is None else f"{len(self)} tensors"
        return f"<safe_open: {state}>"


def _reopened(cls, filename, framework, device, backend):
    return cls(filename, framework, device, backend=backend)
