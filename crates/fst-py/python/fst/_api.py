"""Loads and saves of whole checkpoints."""

import atexit
import json
import math
import os
import re
import weakref
from typing import NamedTuple

from . import _fst, _group, _progress
from ._errors import FstTypeError, FstValueError
from ._frameworks import Target, dtype_name, is_torch, paths_of

#: Streams of ranks, whose threads need the interpreter.
_RUNNING = weakref.WeakSet()


@atexit.register
def _end():
    for running in list(_RUNNING):
        running.close()


def _checkpoint(path):
    return path if isinstance(path, _fst.Checkpoint) else _fst.Checkpoint(paths_of(path))


def _options(dtype=None, select=None, names=None, engine="auto", verify=None):
    if isinstance(select, str):
        select = [select]
    if isinstance(names, str):
        names = [names]
    return {
        "dtype": dtype_name(dtype),
        "select": None if select is None else list(select),
        "names": None if names is None else list(names),
        "engine": engine,
        "verify": None if verify is None else os.fspath(verify),
    }


def _asked(path, framework, device, options, group=None, shard=None):
    """What a load is asked for: target, checkpoint and options, and which rank it is, if there is a group."""

    def prepare():
        target = Target(framework, device)
        checkpoint = _checkpoint(path)
        kept = None if group is None else _group.shards(checkpoint, shard)
        return target.cuda, (target, checkpoint, _options(**options), kept)

    if group is None:
        if shard is not None:
            raise FstValueError("shards need a group of ranks")
        _, (*asked, _) = prepare()
        return *asked, None
    (*asked, kept), rank = _group.join(group, prepare)
    return *asked, {"group": rank, "shard": kept}


def load_file(
    filename,
    device="cpu",
    *,
    dtype=None,
    select=None,
    names=None,
    framework="pt",
    progress=None,
    engine="auto",
    verify=None,
):
    """Loads a checkpoint into a dictionary of tensors, in the order of the files.

    The tensors own their memory and are writable. Ctrl-C ends the load.

    Args:
        filename: a file, an index, a folder, a list of these, the id of a repository in the cache of the
            Hugging Face hub, or a `fst.Checkpoint`.
        device: where to: a name, a number of a CUDA device, or a `torch.device`.
        dtype: converts floating-point tensors to this type while they are loaded.
        select: patterns of names (`*`, `?`, `[a-z]`, `{a,b}`, `{0..11}`): one, or a list of which any may match.
        names: names of tensors; with `select`, besides those that it selects.
        framework: "pt" or "np"; see `safe_open` for others.
        progress: True for a bar of tqdm, a bar of one's own, or a callable that is given a `fst.Progress` about
            twenty times a second. Its exceptions end the load.
        engine: "auto", "uring", "pread", "mmap" or "gds".
        verify: the path of a manifest as `fst sum -o` writes it, to which tensors are held.
    """
    options = {"dtype": dtype, "select": select, "names": names, "engine": engine, "verify": verify}
    return _loaded(progress, *_asked(filename, framework, device, options))


def load_sharded(
    path,
    group,
    shard=None,
    device="cpu",
    *,
    dtype=None,
    select=None,
    names=None,
    framework="pt",
    progress=None,
    engine="auto",
):
    """Loads this rank's shards of a checkpoint into a dictionary. All ranks of the group call it, with the same
    arguments but for the device. The group reads each byte once, and a rank receives what it keeps.

    An error of one rank ends the load on all of them, and so does a rank that is gone. Until the load is over nobody
    else may use the group, and not at all after an error while bytes were under way.

    Args:
        group: a `torch.distributed.ProcessGroup`, of any backend that moves bytes between two ranks.
        shard: what the ranks keep: a preset's name ("llama", "gpt2", "falcon", "bloom", "gpt-neox", "opt", "moe",
            "replicate"); a dictionary from names; or a callable that takes a `fst.TensorInfo`. These say a
            dimension, of which each rank keeps a part of the size rounded up, a `fst.Shard`, or None. What nothing
            is said of, every rank keeps.

    The other arguments are those of `load_file`.
    """
    options = {"dtype": dtype, "select": select, "names": names, "engine": engine}
    if group is None:
        raise FstTypeError("a group is a torch.distributed.ProcessGroup, not None")
    return _loaded(progress, *_asked(path, framework, device, options, group, shard))


def _loaded(progress, target, checkpoint, options, ranks):
    with _progress.hook(progress) as hook:
        tensors = _fst.load(checkpoint, target.core, options, hook, target.cuda, ranks)
    if target.finish is not None:
        for name in tensors:
            tensors[name] = target.finish(tensors[name])
    return tensors


def stream(
    path,
    device="cpu",
    *,
    names=None,
    select=None,
    dtype=None,
    memory_budget=None,
    in_order=False,
    group=None,
    shard=None,
    framework="pt",
    progress=None,
    engine="auto",
    verify=None,
):
    """Loads tensors in the background and yields `(name, tensor)` as they land.

    What is in memory stays within `memory_budget` bytes (2 GiB, or half of what is available where that is less;
    `math.inf` for no bound): tensors that are still held count, and hold the reading back. Their memory is used
    again once they are dropped. The other arguments are those of `load_file`; tensors for other devices pass
    through host memory.

    With a `group`, this rank's shards are yielded, as `load_sharded` returns them. All are loaded at once, or with a
    `memory_budget` so many bytes of whole tensors at a time, whatever is still held of those before. A rank that
    stops before the end ends the load on all.
    """
    options = {"dtype": dtype, "select": select, "names": names, "engine": engine, "verify": verify}
    target, checkpoint, options, ranks = _asked(path, framework, device, options, group, shard)
    finish, turns = target.finish, []
    if ranks is None and target.cuda is not None:
        place = f"cuda:{target.cuda}"
        finish = lambda tensor: tensor.to(place)  # noqa: E731
    if ranks is not None and memory_budget is not None:
        if isinstance(ranks["shard"], dict) and any(one.fused_into for one in ranks["shard"].values()):
            raise FstValueError("tensors that become one are loaded at once, without a memory budget")
        planned = [_Planned(*one) for one in _fst.planned(checkpoint, options)]
        turns = [[one.name for one in turn] for turn in _divided(planned, memory_budget)]
        options, *turns = [options | {"select": None, "names": turn} for turn in turns]
        memory_budget = None
    elif memory_budget == math.inf:
        memory_budget = 2**64 - 1

    def start(options):
        with _progress.hook(progress) as hook:
            running = _fst.Stream(checkpoint, target.core, options, memory_budget, in_order, hook, ranks)
        _RUNNING.add(running)
        return running

    # Here, so that what is wrong with the arguments is said at once.
    running = start(options)
    return running if finish is None and not turns else _finished(running, finish, turns, start)


class _Planned(NamedTuple):
    """A tensor that is to be loaded."""

    name: str
    len: int


def _divided(sized, most):
    """Groups of at most so many bytes each, in order; larger ones alone."""
    groups, size = [[]], 0
    for one in sized:
        if groups[-1] and size + one.len > most:
            groups.append([])
            size = 0
        groups[-1].append(one)
        size += one.len
    return groups


def _finished(running, finish, turns, start):
    try:
        while True:
            for name, tensor in running:
                if finish is not None:
                    tensor = finish(tensor)
                yield name, tensor
                del tensor
            if not turns:
                return
            running = start(turns.pop(0))
    finally:
        running.close()


class _Spec(NamedTuple):
    """A tensor's memory, as the extension module takes it."""

    name: str
    dtype: str
    #: As the file has it.
    shape: tuple
    address: int
    len: int


def _spec(name, tensor):
    """The memory of a tensor that is contiguous, with its type and shape as the file has them."""
    shape = tuple(tensor.shape)
    if is_torch(tensor):
        dtype = str(tensor.dtype).split(".")[-1]
        if dtype == "float4_e2m1fn_x2" and shape:
            shape = (*shape[:-1], 2 * shape[-1])
        return _Spec(name, dtype, shape, tensor.data_ptr(), tensor.numel() * tensor.element_size())
    return _Spec(name, tensor.dtype.name, shape, tensor.ctypes.data, tensor.nbytes)


def load_into(path, tensors, *, dtype=None, progress=None, engine="auto", verify=None):
    """Loads into tensors that are there already: a dictionary of names and tensors of PyTorch or arrays of NumPy,
    which are contiguous, have the shapes of the checkpoint's, and are all in host memory or on one CUDA device.

    Floating-point tensors are converted to the types of the given ones, or all to `dtype`, which these must have
    then. When the load fails, they hold anything.

    Returns a `fst.Report`.
    """
    checkpoint = _checkpoint(path)
    specs, devices = [], set()
    for name, tensor in tensors.items():
        if is_torch(tensor):
            if not tensor.is_contiguous():
                raise FstValueError(f"tensor {name!r} is not contiguous")
            devices.add((tensor.device.type, tensor.device.index))
        elif hasattr(tensor, "__array_interface__"):
            if not (tensor.flags.c_contiguous and tensor.flags.writeable):
                raise FstValueError(f"array {name!r} is not contiguous or not writable")
            if not tensor.dtype.isnative:
                raise FstTypeError(f"array {name!r} has another byte order")
            devices.add(("cpu", None))
        else:
            raise FstTypeError(f"{name!r} is a {type(tensor).__name__}, not a tensor or an array")
        spec = _spec(name, tensor)
        if checkpoint[name].shape != spec.shape:
            found, wanted = list(checkpoint[name].shape), list(spec.shape)
            raise FstValueError(f"tensor {name!r} has the shape {found} in the checkpoint, not {wanted}")
        specs.append(spec)
    cuda = None
    if devices - {("cpu", None)}:
        if len(devices) > 1 or next(iter(devices))[0] != "cuda":
            named = ", ".join(sorted(f"{kind}:{index}" for kind, index in devices))
            raise FstValueError(f"the tensors are not all in host memory or on one CUDA device: {named}")
        cuda = next(iter(devices))[1]
    options = _options(dtype=dtype, engine=engine, verify=verify)
    with _progress.hook(progress) as hook:
        return _fst.load_into(checkpoint, specs, options, hook, cuda)


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}I": 2 ** (10 * power) for power, unit in enumerate("KMGT", 1)}


def _bytes(size):
    """A number of bytes, also as "5GB" or "500MiB"."""
    if isinstance(size, int) and size > 0:
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(size).upper())
    if not found or found[2] not in _UNITS or float(found[1]) <= 0:
        raise FstValueError(f"not a number of bytes: {size!r}")
    return int(float(found[1]) * _UNITS[found[2]])


def _plain(name, tensor):
    """The tensor in host memory, contiguous and of the file's byte order."""
    if is_torch(tensor):
        if tensor.layout.__str__() != "torch.strided":
            raise FstTypeError(f"tensor {name!r} is sparse: make it dense first")
        return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    import numpy

    if not isinstance(tensor, (numpy.ndarray, numpy.generic)):
        raise FstTypeError(f"{name!r} is a {type(tensor).__name__}, not a tensor or an array")
    tensor = numpy.asarray(tensor, order="C")
    return tensor if tensor.dtype.isnative else tensor.astype(tensor.dtype.newbyteorder("="))


def save_file(tensors, filename, metadata=None, *, max_shard_size=None):
    """Saves tensors of PyTorch or arrays of NumPy, given by name, as a file whose data is aligned for direct I/O.

    The file takes the place of one that is there once all is written. With `max_shard_size`, a number of bytes or
    such as "5GB", and more tensors than that, several files `NAME-00001-of-00003.safetensors` are written, and
    `NAME.safetensors.index.json`.
    """
    filename = os.fspath(filename)
    kept = {name: _plain(name, tensor) for name, tensor in tensors.items()}
    metadata = None if metadata is None else list(metadata.items())
    specs = [_spec(name, tensor) for name, tensor in kept.items()]
    shards = [specs] if max_shard_size is None else _divided(specs, _bytes(max_shard_size))
    if len(shards) == 1:
        return _fst.write_file(filename, shards[0], metadata, 4096)
    folder, base = os.path.split(filename)
    stem, suffix = os.path.splitext(base)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05}-of-{len(shards):05}{suffix}"
        _fst.write_file(os.path.join(folder, name), shard, metadata, 4096)
        weight_map.update((spec.name, name) for spec in shard)
    index = {"metadata": {"total_size": sum(spec.len for spec in specs)}, "weight_map": weight_map}
    with open(f"{filename}.index.json", "w", encoding="utf-8") as file:
        file.write(json.dumps(index, indent=2, sort_keys=True) + "\n")
