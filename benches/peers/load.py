#!/usr/bin/env python3
"""One load of one Python peer, in a process of its own; prints one line of JSON.

The protocol is that of src/child.rs: only the load is timed (imports and a first small tensor are not),
from before the first open to the last tensor usable. The harness puts the peer's packages on PYTHONPATH.
"""

import argparse
import glob
import hashlib
import json
import mmap
import os
import resource
import struct
import time


def peer_safetensors(mode):
    """safetensors: safe_open and get_tensor; the tensors view a mapping until they are cloned."""
    from safetensors import safe_open

    def load(files, op):
        tensors, opened = {}, []
        for path in files:
            handle = safe_open(path, framework="pt", device="cpu")
            opened.append(handle)
            for name in handle.keys():
                if op in ("half-dim0", "half-dim1"):
                    tensors[name] = half(handle, name, op)
                    continue
                tensor = handle.get_tensor(name)
                if mode == "copy":
                    tensor = tensor.clone()
                else:
                    touch(tensor)
                tensors[name] = tensor
        return tensors, opened

    return load


def half(handle, name, op):
    piece = handle.get_slice(name)
    shape = piece.get_shape()
    if len(shape) < 2:
        return handle.get_tensor(name).clone()
    if op == "half-dim0":
        return piece[: shape[0] // 2].clone()
    return piece[:, : shape[1] // 2].clone()


def touch(tensor):
    flat = tensor.view(torch.uint8).flatten() if tensor.dim() else tensor.reshape(1).view(torch.uint8)
    if flat.numel():
        flat[::4096].sum().item()
        flat[-1].item()


def peer_fastsafetensors():
    """fastsafetensors: files copied to the CPU without GDS, default threads; tensors share its buffers."""
    from fastsafetensors import SafeTensorsFileLoader

    def load(files, op):
        loader = SafeTensorsFileLoader(None, device="cpu", nogds=True)
        loader.add_filenames({0: files})
        buffers = loader.copy_files_to_device()
        return {name: buffers.get_tensor(name) for name in buffers.key_to_rank_lidx}, (loader, buffers)

    return load


def peer_runai():
    """Run:ai model streamer at its defaults: since 0.17 the tensors it yields belong to the caller."""
    from runai_model_streamer import SafetensorsStreamer

    def load(files, op):
        tensors = {}
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(files)
            for name, tensor in streamer.get_tensors():
                tensors[name] = tensor
        return tensors, None

    return load


def contender(name):
    if name.startswith("py-safetensors-"):
        return peer_safetensors(name.rsplit("-", 1)[1])
    if name == "fastsafetensors":
        return peer_fastsafetensors()
    if name == "runai":
        return peer_runai()
    raise SystemExit(f"no Python contender named {name}")


def status_bytes(key):
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    raise SystemExit(f"no {key} in /proc/self/status")


def settle(size):
    """Touches and frees memory, as src/memory.rs does and for the reason given there."""
    with open("/proc/meminfo") as meminfo:
        free = next(int(line.split()[1]) * 1024 for line in meminfo if line.startswith("MemFree:"))
    size = min(size, free - (512 << 20))
    if size <= 0:
        return
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    numpy.frombuffer(block, dtype=numpy.uint8)[::4096] = 0
    block.close()


def returned_bytes():
    try:
        with open("/sys/module/page_reporting/parameters/reported_kib") as reported:
            return int(reported.read()) * 1024
    except OSError:
        return None


def cpu_seconds():
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def digest(tensors):
    total = hashlib.sha256()
    for name in sorted(tensors, key=str.encode):
        tensor = tensors[name].contiguous()
        data = tensor.reshape(-1).view(torch.uint8).numpy()
        one = hashlib.sha256()
        one.update(name.encode() + b"\0" + struct.pack("<Q", tensor.dim()))
        for dim in tensor.shape:
            one.update(struct.pack("<Q", dim))
        one.update(struct.pack("<Q", data.size))
        one.update(data)
        total.update(one.digest())
    return total.hexdigest()


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--contender", required=True)
    arguments.add_argument("--op", default="load")
    arguments.add_argument("--path", required=True)
    arguments.add_argument("--settle", type=int, default=0)
    arguments.add_argument("--digest", action="store_true")
    options = arguments.parse_args()

    load = contender(options.contender)
    torch.zeros(1).clone()
    files = sorted(glob.glob(os.path.join(options.path, "*.safetensors")))
    settle(options.settle)
    try:
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")
    except OSError:
        pass  # the peak then covers the imports too
    returned_before = returned_bytes()
    base_rss = status_bytes("VmRSS:")
    cpu_before = cpu_seconds()
    start = time.perf_counter()
    tensors, _keep = load(files, options.op)
    seconds = time.perf_counter() - start
    result = {
        "seconds": seconds,
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "cpu_seconds": cpu_seconds() - cpu_before,
        "peak_rss_bytes": status_bytes("VmHWM:"),
        "base_rss_bytes": base_rss,
    }
    if returned_before is not None:
        result["returned_bytes"] = returned_bytes() - returned_before
    if options.digest:
        result["digest"] = digest(tensors)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    import numpy
    import torch

    main()
    # Destructors of half-closed peers are not part of the measurement, and must not fail it.
    os._exit(0)
