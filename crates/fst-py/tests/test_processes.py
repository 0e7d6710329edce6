"""Signals, and processes that are made after the import."""

import json
import multiprocessing
import os
import signal
import threading
import time

import fst
import pytest
import torch
from conftest import same


def _load(path, expected, found):
    loaded = fst.load_file(path)
    with fst.safe_open(path) as file:
        again = file.get_tensor("f32")
    found.put(bool(torch.equal(loaded["f32"], expected)) and bool(torch.equal(again, expected)))


@pytest.mark.parametrize("way", ["fork", "spawn", "forkserver"])
def test_processes_after_the_import(kinds, tensors, way):
    fst.load_file(kinds)
    context = multiprocessing.get_context(way)
    # Threads that others of the process have do not count.
    found = context.Queue()
    process = context.Process(target=_load, args=(kinds, tensors["f32"], found))
    process.start()
    assert found.get(timeout=60)
    process.join(timeout=60)
    assert process.exitcode == 0


def test_a_session_is_used_after_a_fork(kinds, tensors):
    file = fst.safe_open(kinds)
    assert same(file.get_tensor("f32"), tensors["f32"])
    expected = {name: tensors[name].numpy().tobytes() for name in ("f32", "large")}
    child = os.fork()
    if child == 0:
        # Not compared by torch, whose own threads are not there after a fork.
        os._exit(sum(file.get_tensor(name).numpy().tobytes() != expected[name] for name in expected))
    assert os.waitpid(child, 0)[1] == 0


class Interrupted(Exception):
    pass


@pytest.fixture
def soon():
    """Has a signal's handler raise an exception in a while; gives the time at which it did."""
    raised = []

    def handler(*_):
        raised.append(time.monotonic())
        raise Interrupted

    before = signal.signal(signal.SIGALRM, handler)
    yield raised
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def _held(path):
    """Whatever the load would do, it waits: nobody takes what a budget has no room for."""
    return fst.stream(path, memory_budget=72 << 20, in_order=True)


def test_a_signal_ends_a_wait(big, soon):
    stream = _held(big)
    kept = []
    signal.setitimer(signal.ITIMER_REAL, 0.4)
    with pytest.raises(Interrupted):
        for _, tensor in stream:
            kept.append(tensor)
    assert soon and time.monotonic() - soon[0] < 0.3
    assert list(stream) == []


@pytest.fixture(scope="session")
def long(tmp_path_factory):
    """A file of 3 GiB that takes no room on disk, and longer to load than a signal may take to end that."""
    path = tmp_path_factory.mktemp("long") / "model.safetensors"
    each = 192 << 20
    entry = lambda at: {"dtype": "U8", "shape": [each], "data_offsets": [at * each, (at + 1) * each]}  # noqa: E731
    header = json.dumps({f"w{at}": entry(at) for at in range(16)}).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 16 * each)
    return path


@pytest.fixture
def heeded():
    """Ctrl-C as a terminal's program has it: what a shell runs in the background ignores it from the start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_a_load(long, heeded):
    def load_into():
        names = ["w0", "w5", "w6", "w7", "w8", "w9"]
        fst.load_into(long, {name: torch.empty(192 << 20, dtype=torch.uint8) for name in names})

    for load in [lambda: fst.load_file(long), load_into, lambda: fst.safe_open(long).get_tensors()]:
        signalled = []

        def interrupt():
            signalled.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

        timer = threading.Timer(0.1, interrupt)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            load()
            time.sleep(20)
        assert time.monotonic() - signalled[0] < 0.3
        timer.join()


def test_others_run_while_a_load_waits(big):
    """The interpreter is free: one thread counts, and another makes room for what this one waits for."""
    count, over, kept = [0], threading.Event(), []

    def work():
        while not over.is_set():
            count[0] += 1

    def make_room():
        while not over.wait(0.2):
            kept.clear()

    others = [threading.Thread(target=work), threading.Thread(target=make_room)]
    stream, counted = _held(big), 0
    [other.start() for other in others]
    while True:
        before = count[0]
        tensor = next(stream, None)
        counted = max(counted, count[0] - before)
        if tensor is None:
            break
        kept.append(tensor)
        del tensor
    over.set()
    [other.join() for other in others]
    assert counted > 1000
