"""Loads by the ranks of a process group of PyTorch: `torch.distributed` moves bytes, and tells where ranks meet."""

import ctypes
import operator
import os
import queue
import secrets
import socket
import threading
import weakref

from . import _fst
from ._errors import FstRuntimeError, FstTypeError, FstValueError

#: Groups whose messages a failed load left under way: the next load would take them for its own.
_LEFT = weakref.WeakSet()


class _CudaMemory:
    """Memory of a CUDA device, for `torch.as_tensor`."""

    def __init__(self, address, length):
        self.__cuda_array_interface__ = {"shape": (length,), "typestr": "|u1", "data": (address, False), "version": 2}


class Carrier:
    """Moves bytes between ranks by a process group, out of and into memory of its own: what a load that has failed
    leaves under way touches nothing of the load's."""

    def __init__(self, group, cuda):
        import torch
        import torch.distributed as dist

        self._torch, self._dist = torch, dist
        self._group = group
        self._cuda = cuda
        #: Ranks of the whole world by those of the group.
        self._ranks = dist.get_process_group_ranks(group)
        backends = dict(one.split(":") for one in dist.get_backend_config(group).split(","))
        own = "cpu" if cuda is None else "cuda"
        # gloo moves memory of the host only, whatever it is registered for.
        if own in backends and (own == "cpu" or backends[own] != "gloo"):
            device = own if cuda is None else f"cuda:{cuda}"
        else:
            device = "cpu" if "cpu" in backends else f"cuda:{torch.cuda.current_device()}"
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)
        self._waits = queue.SimpleQueue()
        # A thread of its own, since most backends have no wait that ends when the load does.
        threading.Thread(target=_wait, args=(self._waits, self._memory.device), name="fst-group", daemon=True).start()

    def start(self, transfers, done):
        """Begins to move `(receives, peers, address, length)`; returns what `finish` takes once `done` was called."""
        size = sum(length for *_, length in transfers)
        if len(self._memory) < size:
            self._memory = self._memory.new_empty(size)
        moves, arriving, at = [], [], 0
        for receives, peers, address, length in transfers:
            staged = self._memory[at : at + length]
            at += length
            if receives:
                arriving.append((staged, address))
            else:
                staged.copy_(self._view(address, length))
            call = self._dist.irecv if receives else self._dist.isend
            moves += [self._dist.P2POp(call, staged, self._ranks[peer], self._group) for peer in peers]
        _LEFT.add(self._group)
        self._waits.put((self._dist.batch_isend_irecv(moves), moves, done))
        return arriving

    def finish(self, arriving):
        """Copies what has arrived to where it belongs."""
        for staged, address in arriving:
            self._view(address, len(staged)).copy_(staged)
        if self._cuda is not None:
            self._torch.cuda.current_stream(self._cuda).synchronize()
        _LEFT.discard(self._group)

    def _view(self, address, length):
        if self._cuda is not None:
            return self._torch.as_tensor(_CudaMemory(address, length), device=f"cuda:{self._cuda}")
        memory = (ctypes.c_ubyte * length).from_address(address)
        return self._torch.frombuffer(memory, dtype=self._torch.uint8)

    def __del__(self):
        if waits := getattr(self, "_waits", None):
            waits.put(None)


def _wait(waits, device):
    while (batch := waits.get()) is not None:
        works, _, done = batch
        try:
            for work in works:
                work.wait()
            if device.type == "cuda":
                import torch

                torch.cuda.current_stream(device).synchronize()
        except Exception as error:  # noqa: BLE001  whatever it is ends the load
            done(str(error))
        else:
            done(None)
        del batch, works, _, done


def _address():
    """An address of this machine that others reach."""
    try:
        # The one that leads to where the world's ranks have met. Nothing is sent.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((os.environ.get("MASTER_ADDR", ""), 9))
            address = probe.getsockname()[0]
        if not address.startswith("127."):
            return address
    except OSError:
        pass
    return socket.gethostname()


def _machine():
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return f"{socket.gethostname()} {file.read()}"


def join(group, prepare):
    """Calls `prepare` on every rank of a group, and has the ranks meet for a load to the host, or to the CUDA device
    whose number it returns first.

    An error of one rank is one of all, so that nobody waits for a rank that does not come. Returns what `prepare`
    returns second, and the rank for the extension module.
    """
    import torch.distributed as dist

    if not isinstance(group, dist.ProcessGroup):
        raise FstTypeError(f"a group is a torch.distributed.ProcessGroup, not {group!r}")
    own, cuda, error = None, None, None
    try:
        if group in _LEFT:
            raise FstRuntimeError("a load by this process group failed while bytes were under way: make a new group")
        cuda, own = prepare()
    except Exception as raised:  # noqa: BLE001  raised below
        error = raised
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    meeting = None
    # The port stays this process's until rank 0 listens there.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as reserved:
        if rank == 0:
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reserved.bind(("", 0))
            meeting = _address(), reserved.getsockname()[1], secrets.token_hex(16)
        told = [None] * world
        failed = None if error is None else f"{type(error).__name__}: {error}"
        dist.all_gather_object(told, (failed, _machine(), meeting), group=group)
        if error is not None:
            raise error
        for other, (failed, *_) in enumerate(told):
            if failed is not None:
                raise FstRuntimeError(f"rank {other} failed: {failed}")
        machines = [machine for _, machine, _ in told]
        nodes = [machines.index(machine) for machine in machines]
        address, port, job = told[0][2]
        if not any(nodes):
            address = "127.0.0.1"
        elif rank == 0:
            address = "0.0.0.0"
        return own, _fst.RankGroup(rank, nodes, (address, port, job), Carrier(group, cuda), cuda)


def shards(checkpoint, shard):
    """What the ranks keep of each tensor, as the extension module takes it: a preset's name, or `Shard`s by name."""
    if shard is None or isinstance(shard, str):
        return shard or "replicate"
    if callable(shard):
        said = {name: shard(checkpoint[name]) for name in checkpoint}
    else:
        said = dict(shard)
    return {name: _shard(checkpoint[name], one) for name, one in said.items() if one is not None}


def _shard(info, said):
    if isinstance(said, _fst.Shard):
        return said
    try:
        dim = operator.index(said)
    except TypeError:
        raise FstTypeError(f"a shard is a dimension, a fst.Shard or None, not {said!r}") from None
    dims = len(info.shape)
    if not -dims <= dim < dims:
        raise FstValueError(f"tensor {info.name!r} has {dims} dimensions, and no dimension {dim}")
    return _fst.Shard.split(dim % dims)
