"""Loads by the ranks of process groups of PyTorch, each rank a process of its own. The oracle is the official package."""

import multiprocessing
import os
import signal
import time
import traceback

import fst
import pytest
import torch
import torch.distributed as dist
from conftest import same
from fst import _group
from safetensors import safe_open
from safetensors.torch import save_file


def _rank(case, rank, world, meeting, arguments, answers):
    try:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
        answers.put((rank, case(rank, world, *arguments)))
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001
        answers.put((rank, traceback.format_exc()))


@pytest.fixture
def run(tmp_path):
    """Runs `case(rank, world, *arguments)` in as many processes, which end in time; what each returns, by rank."""
    context = multiprocessing.get_context("spawn")

    def run(case, world, *arguments):
        answers = context.Queue()
        meeting = tmp_path / f"meeting-{time.monotonic_ns()}"
        ranks = [
            context.Process(target=_rank, args=(case, rank, world, meeting, arguments, answers))
            for rank in range(world)
        ]
        for rank in ranks:
            rank.start()
        until = time.monotonic() + 300
        answered = {}
        while len(answered) < world and time.monotonic() < until and any(rank.is_alive() for rank in ranks):
            while not answers.empty():
                answered.update([answers.get()])
            time.sleep(0.05)
        for rank in ranks:
            rank.join(timeout=10)
        while not answers.empty():
            answered.update([answers.get()])
        late = [at for at, rank in enumerate(ranks) if rank.is_alive()]
        for rank in ranks:
            rank.kill()
        assert not late, f"ranks {late} did not end: {answered}"
        return [answered.get(rank) for rank in range(world)]

    return run


def _sharded(rank, world, path):
    world_group = dist.group.WORLD
    with safe_open(path, "pt") as file:
        whole = {name: file.get_tensor(name) for name in file.keys()}

    def part(name, dim):
        size = -(-whole[name].shape[dim] // world)
        return whole[name][(slice(None),) * dim + (slice(rank * size, (rank + 1) * size),)]

    # Everything, on every rank; each byte is read once.
    read = {}
    loaded = fst.load_sharded(path, world_group, progress=lambda progress: read.update(bytes=progress.bytes_total))
    assert loaded.keys() == whole.keys() and all(same(loaded[name], whole[name]) for name in whole)
    total = [None] * world
    dist.all_gather_object(total, read["bytes"])
    assert sum(total) < 1.05 * os.path.getsize(path), total

    # By dimensions, and by what a callable says.
    dims = {"large": 0, "bf16": 1, "i64": -1, "f4": 0, "f32": None}
    loaded = fst.load_sharded(path, world_group, dims)
    for name in whole:
        expected = whole[name] if dims.get(name) is None else part(name, dims[name] % whole[name].dim())
        assert same(loaded[name], expected), name

    def rule(info):
        assert info.shape == tuple(fst.Checkpoint(path)[info.name].shape)
        return {"large": fst.Shard.keep_on(1), "bf16": fst.Shard.skip(), "f16": fst.Shard.split(1, remainder="balanced")}.get(
            info.name, fst.Shard.replicate()
        )

    loaded = fst.load_sharded(path, world_group, rule, select="{large,bf16,f16,e4m3}")
    assert set(loaded) == {"f16", "e4m3"} | ({"large"} if rank == 1 else set())
    assert same(loaded["f16"], whole["f16"].tensor_split(world, 1)[rank])
    fused = {
        "f32": fst.Shard.split(0, fused_into="both", position=1),
        "f32b": fst.Shard.split(0, fused_into="both", position=0),
    }
    loaded = fst.load_sharded(path, world_group, fused, names=["f32", "f32b"], dtype="bfloat16")
    expected = torch.cat([part("f32b", 0), part("f32", 0)]).bfloat16()
    assert list(loaded) == ["both"] and same(loaded["both"], expected)
    arrays = fst.load_sharded(path, world_group, {"i64": 1}, names=["i64"], framework="np")
    assert arrays["i64"].tolist() == part("i64", 1).tolist()

    # As they land.
    for budget in [None, 1 << 20]:
        streamed = dict(fst.stream(path, group=world_group, shard={"large": 1}, memory_budget=budget))
        assert streamed.keys() == whole.keys()
        assert all(same(streamed[name], part("large", 1) if name == "large" else whole[name]) for name in whole)
    with pytest.raises(ValueError, match="loaded at once"):
        fst.stream(path, group=world_group, shard=fused, memory_budget=1 << 20)

    # What all ranks refuse leaves the group as it was.
    for wrong, error in [
        ({"none": 0}, KeyError),
        ({"f32": 3}, ValueError),
        ({"f32": "x"}, TypeError),
        ("none", ValueError),
        (lambda info: 1 / 0, ZeroDivisionError),
    ]:
        with pytest.raises(error):
            fst.load_sharded(path, world_group, wrong)
    with pytest.raises(TypeError):
        fst.load_sharded(path, "group")
    # So does a rank that cannot come along, for the others too.
    error = FileNotFoundError if rank == 1 else fst.FstError
    with pytest.raises(error, match="none" if rank == 1 else "rank 1.*none"):
        fst.load_sharded(path if rank != 1 else "/none", world_group)
    # A part of the ranks.
    some = dist.new_group([0, 1])
    if rank < 2:
        loaded = fst.load_sharded(path, some, {"large": 0}, names=["large"])
        assert same(loaded["large"], whole["large"].chunk(2)[rank])
    return "done"


@pytest.mark.parametrize("world", [2, 4])
def test_shards_are_slices(run, tensors, tmp_path, world):
    path = tmp_path / "model.safetensors"
    save_file(tensors | {"f32b": tensors["f32"] + 1}, path)
    assert run(_sharded, world, path) == ["done"] * world


def _preset(rank, world, path):
    loaded = fst.load_sharded(path, dist.group.WORLD, "llama")
    return {name: tensor.tolist() for name, tensor in loaded.items()}


def test_presets(run, tmp_path):
    path = tmp_path / "model.safetensors"
    layer = "model.layers.0."
    whole = {
        f"{layer}self_attn.q_proj.weight": torch.arange(64.0).reshape(8, 8),
        f"{layer}self_attn.o_proj.weight": torch.arange(64.0).reshape(8, 8) + 64,
        f"{layer}input_layernorm.weight": torch.arange(8.0),
    }
    save_file(whole, path)
    loaded = run(_preset, 2, path)
    q, o, norm = whole
    for rank in range(2):
        assert loaded[rank] == {
            q: whole[q].chunk(2)[rank].tolist(),
            o: whole[o].chunk(2, 1)[rank].tolist(),
            norm: whole[norm].tolist(),
        }


def _failing(rank, world, path, how):
    """Rank 1 fails when it is to exchange for the second time."""
    calls = []
    start = _group.Carrier.start

    def fail(self, transfers, done):
        calls.append(None)
        if rank == 1 and len(calls) == 2:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("as wished")
        return start(self, transfers, done)

    _group.Carrier.start = fail
    found = []
    for _ in range(2):
        try:
            fst.load_sharded(path, dist.group.WORLD)
        except fst.FstError as error:
            found.append(str(error))
        if how == "killed":
            break
    return found


@pytest.mark.parametrize("how", ["killed", "raises"])
def test_a_rank_that_fails_ends_the_load_on_all(run, big, how):
    found = run(_failing, 2, big, how)
    if how == "killed":
        assert found[1] is None and len(found[0]) == 1 and "rank 1 is lost" in found[0][0], found
    else:
        for rank in range(2):
            assert "rank 1 failed" in found[rank][0] and "as wished" in found[rank][0], found
        # Bytes may be under way: the group is refused, by the ranks that know and through them by the others.
        assert all(len(errors) == 2 and "make a new group" in errors[1] for errors in found), found


def _stopping(rank, world, path):
    stream = fst.stream(path, group=dist.group.WORLD)
    next(stream)
    if rank == 1:
        # Its load ends, which may need the interpreter, and with it that of the others unless all are through.
        del stream
        return "done"
    try:
        return "done" if len(list(stream)) == 15 else "too few"
    except fst.FstError as error:
        return "done" if "rank 1" in str(error) else str(error)


def test_a_stream_that_is_dropped_ends_the_load(run, big):
    assert run(_stopping, 2, big) == ["done", "done"]
