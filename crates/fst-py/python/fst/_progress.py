"""Progress of loads, told to tqdm or to a callable."""

import contextlib

from ._errors import FstTypeError


class _Bar:
    """Moves a bar of tqdm, or one with the same methods."""

    def __init__(self, bar):
        self._bar = bar
        self._done = 0

    def __call__(self, progress):
        if self._bar.total != progress.bytes_total:
            self._bar.total = progress.bytes_total
        self._bar.update(progress.bytes_done - self._done)
        self._done = progress.bytes_done


@contextlib.contextmanager
def hook(progress):
    """What the extension module calls: None, or a callable that takes a `fst.Progress`."""
    if progress is None or progress is False:
        yield None
    elif progress is True:
        from tqdm.auto import tqdm

        with tqdm(unit="B", unit_scale=True, desc="loading") as bar:
            yield _Bar(bar)
    elif hasattr(progress, "update") and hasattr(progress, "total"):
        yield _Bar(progress)
    elif callable(progress):
        yield progress
    else:
        raise FstTypeError(f"progress is True, a bar of tqdm or a callable, not {progress!r}")
