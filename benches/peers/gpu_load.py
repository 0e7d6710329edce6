#!/usr/bin/env python3
"""Loads to a CUDA device by one Python peer; started by fst-gpu-check (src/gpu/peers.rs).

Without --once it imports, touches the device, prints {"ready": ...}, and then takes a line of JSON for each load
({"path": FOLDER}) and answers with one. Only the load is timed, up to a synchronisation with the device; afterwards
every tensor is summed there, which shows that it is usable and right. With --once it loads one checkpoint, prints
{"usable": true}, and then the answer.

--device cpu tries the script where there is no device, with those peers that know the CPU.
"""

import argparse
import glob
import json
import os
import sys
import threading
import time


def peer_safetensors(device):
    from safetensors.torch import load_file

    def load(files):
        tensors = {}
        for path in files:
            tensors.update(load_file(path, device=device))
        return tensors, None

    return load


def peer_safetensors_prefetch(device):
    """0.9: all files' loads are started, then the tensors are taken as they land."""
    from safetensors import safe_open

    def load(files):
        tensors = {}
        handles = [safe_open(path, framework="pt", device=device) for path in files]
        loaders = [handle.prefetch() for handle in handles]
        for loader in loaders:
            for name, tensor in loader:
                tensors[name] = tensor
            loader.close()
        return tensors, handles

    return load


def peer_fastsafetensors(device):
    """Without GDS, default threads. Its tensors share the loader's buffers."""
    from fastsafetensors import SafeTensorsFileLoader

    def load(files):
        loader = SafeTensorsFileLoader(None, device=device, nogds=True)
        loader.add_filenames({0: files})
        buffers = loader.copy_files_to_device()
        tensors = {name: buffers.get_tensor(name) for name in buffers.key_to_rank_lidx}
        return tensors, (buffers, loader)

    return load


def peer_instanttensor(device):
    """At its defaults: the tensors that it yields are the caller's."""
    from instanttensor import safe_open

    def load(files):
        with safe_open(files, framework="pt", device=device) as opened:
            return dict(opened.tensors()), None

    return load


def peer_runai(device):
    """At its defaults: the tensors that it yields are the caller's."""
    from runai_model_streamer import SafetensorsStreamer

    def load(files):
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(files, device=device)
            return {name: tensor.to(device) for name, tensor in streamer.get_tensors()}, None

    return load


PEERS = {
    "safetensors-0.8.0": peer_safetensors,
    "safetensors-0.9-prefetch": peer_safetensors_prefetch,
    "fastsafetensors-0.5.0": peer_fastsafetensors,
    "instanttensor-0.2.2": peer_instanttensor,
    "runai-0.17.0": peer_runai,
}


def word_sum(tensors):
    """Sum of all little-endian 64-bit words, each tensor's tail filled up with zeros, modulo 2**64."""
    import torch

    sums, rest = [], 0
    for tensor in tensors.values():
        data = tensor.contiguous().reshape(-1).view(torch.uint8)
        whole = data.numel() // 8 * 8
        head, tail = data[:whole], data[whole:]
        if whole:
            if head.data_ptr() % 8:
                head = head.clone()
            sums.append(head.view(torch.int64).sum())
        if tail.numel():
            rest += int.from_bytes(bytes(tail.cpu().tolist()), "little")
    total = int(torch.stack(sums).sum().item()) if sums else 0
    return (total + rest) % 2**64


class OwnMemory:
    """The most that the process's own memory (not mapped files) grew, looked at every few milliseconds."""

    def __enter__(self):
        self.before = self.peak = self.now()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()
        self.grown = self.peak - self.before

    def watch(self):
        while not self.done.wait(0.005):
            self.peak = max(self.peak, self.now())

    @staticmethod
    def now():
        with open("/proc/self/statm") as statm:
            fields = statm.read().split()
        return (int(fields[1]) - int(fields[2])) * 4096


def measure(load, path, device, usable=lambda: None):
    import torch

    files = sorted(glob.glob(os.path.join(path, "*.safetensors")))
    cuda = device.startswith("cuda")
    with OwnMemory() as memory:
        start = time.perf_counter()
        tensors, keep = load(files)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    usable()
    answer = {
        "seconds": seconds,
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "sum": str(word_sum(tensors)),
        "host_bytes": memory.grown,
        "detail": {"tensors": len(tensors), "torch": torch.__version__},
    }
    strangers = [name for name, tensor in tensors.items() if tensor.device.type != device.split(":")[0]]
    if strangers:
        answer["error"] = f"{len(strangers)} tensors are not on {device}"
    tensors.clear()
    for owner in keep if isinstance(keep, tuple) else ():
        owner.close()
    del tensors, keep
    if cuda:
        # The next contender needs the memory.
        torch.cuda.empty_cache()
    return answer


def say(answer):
    # One write, straight to the descriptor: libraries print what they like through the same one.
    os.write(1, (json.dumps(answer) + "\n").encode())


def serve(make, device):
    try:
        import torch

        if device.startswith("cuda"):
            torch.zeros(1, device=device)
            torch.cuda.synchronize()
        load = make(device)
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        return
    say({"ready": True, "torch": torch.__version__})
    for line in sys.stdin:
        try:
            say(measure(load, json.loads(line)["path"], device))
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--peer", required=True, choices=PEERS)
    arguments.add_argument("--device", default="cuda:0")
    arguments.add_argument("--once", metavar="FOLDER")
    options = arguments.parse_args()
    make = PEERS[options.peer]
    if options.once is None:
        serve(make, options.device)
        return
    try:
        load = make(options.device)
        say(measure(load, options.once, options.device, lambda: say({"usable": True})))
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
    # Destructors of half-closed peers are not part of the measurement.
    os._exit(0)
