"""What goes wrong: `FstError`, and for each cause a class that is also the built-in one that fits."""

import errno as _errno


class FstError(Exception):
    """Something that fst could not do. All its errors are of this class, and of the built-in class that fits
    their cause: `FileNotFoundError`, `KeyError`, `MemoryError` and so on."""

    #: Whether it is made of an error number, a message and a path.
    _of_system = False


class _SystemError(FstError):
    _of_system = True

    def __init__(self, errno=None, message="", path=None):
        OSError.__init__(self, errno, message, path)
        self.message = message

    def __str__(self):
        return self.message

    def __reduce__(self):
        return type(self), (self.errno, self.message, self.filename)


class FstOSError(_SystemError, OSError):
    """The system refused something, or a file is not what it was."""


class FstFileNotFoundError(_SystemError, FileNotFoundError):
    """There is no such file, or no checkpoint in a folder."""


class FstPermissionError(_SystemError, PermissionError):
    """A file may not be read or written."""


class FstIsADirectoryError(_SystemError, IsADirectoryError):
    """A folder where a file is needed."""


class FstKeyError(FstError, KeyError):
    """No tensor of this name."""

    def __str__(self):
        return str(self.args[0])


class FstIndexError(FstError, IndexError):
    """A slice that its tensor does not have."""


class FstMemoryError(FstError, MemoryError):
    """There is less memory than the load needs."""


class FstTypeError(FstError, TypeError):
    """Elements of another type than what is needed, or of one that the framework does not have."""


class FstValueError(FstError, ValueError):
    """A bad file, or an argument that makes no sense."""


class FstRuntimeError(FstError, RuntimeError):
    """A device or a thread failed."""


class FstTimeoutError(FstError, TimeoutError):
    """A stream waits for memory that tensors which are still held fill. It goes on once some are dropped."""

    def __init__(self, message=""):
        TimeoutError.__init__(self, message)


def not_found(path):
    """The error for a path that is not there."""
    return FstFileNotFoundError(_errno.ENOENT, f"{path}: no such file or folder", str(path))
