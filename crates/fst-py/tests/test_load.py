"""Whole loads, streams, loads into given tensors, and saves."""

import gc
import json
import os
import sys
import threading

import fst
import numpy
import pytest
import safetensors.torch
import torch
from conftest import same


def test_all_kinds_are_what_the_official_package_loads(kinds, tensors):
    official = safetensors.torch.load_file(kinds)
    loaded = fst.load_file(kinds)
    assert list(loaded) == safetensors.safe_open(kinds, "pt").offset_keys()
    for name, tensor in loaded.items():
        assert same(tensor, official[name]) and same(tensor, tensors[name])


def test_tensors_are_writable_and_their_own(kinds, tensors):
    before = kinds.read_bytes()
    loaded = fst.load_file(kinds)
    others = fst.load_file(kinds)
    for name, tensor in loaded.items():
        if tensor.numel():
            tensor.view(-1).view(torch.uint8).fill_(7)
    for name, tensor in others.items():
        assert same(tensor, tensors[name])
    # Neighbours in memory are not touched.
    others["i16"].fill_(9)
    assert all(same(others[name], tensors[name]) for name in tensors if name != "i16")
    assert kinds.read_bytes() == before


def test_tensors_outlive_each_other(kinds, tensors):
    kept = fst.load_file(kinds)["f16"]
    gc.collect()
    torch.empty(1 << 20).fill_(1)
    assert same(kept, tensors["f16"])


def test_numpy(kinds, tensors):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    loaded = fst.load_file(kinds, framework="np")
    for name, array in loaded.items():
        expected = tensors[name]
        assert array.flags.writeable and array.flags.c_contiguous
        if name == "f4":
            assert array.dtype == ml_dtypes.float4_e2m1fn and array.shape == (4, 12)
            packed = array.view(numpy.uint8).reshape(-1, 2)
            packed = (packed[:, 0] | packed[:, 1] << 4).reshape(4, 6)
            assert numpy.array_equal(packed, expected.view(torch.uint8).numpy())
            continue
        assert array.dtype.name == str(expected.dtype).split(".")[-1]
        assert array.shape == tuple(expected.shape)
        assert array.tobytes() == expected.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if array.size else True
    loaded["i64"][:] = 1
    assert same(torch.from_numpy(fst.load_file(kinds, framework="np")["i64"]), tensors["i64"])


def test_selection_and_conversion(kinds, tensors):
    loaded = fst.load_file(kinds, select=["f16", "bf1?"], names=["i64"], dtype=torch.float32)
    assert set(loaded) == {"f16", "bf16", "i64"}
    assert same(loaded["f16"], tensors["f16"].float()) and same(loaded["bf16"], tensors["bf16"].float())
    assert same(loaded["i64"], tensors["i64"])
    for dtype in ["bfloat16", "BF16", torch.bfloat16, "torch.bfloat16"[6:]]:
        assert fst.load_file(kinds, names="f32", dtype=dtype)["f32"].dtype == torch.bfloat16
    assert fst.load_file(kinds, names="f32", dtype=numpy.float64)["f32"].dtype == torch.float64


@pytest.mark.parametrize("engine", ["auto", "uring", "pread", "mmap"])
def test_engines(kinds, tensors, engine):
    assert all(same(tensor, tensors[name]) for name, tensor in fst.load_file(kinds, engine=engine).items())


def test_streams(kinds, tensors):
    streamed = dict(fst.stream(kinds))
    assert set(streamed) == set(tensors) and all(same(streamed[name], tensors[name]) for name in tensors)
    in_order = [name for name, _ in fst.stream(kinds, in_order=True)]
    assert in_order == fst.Checkpoint(kinds).keys()
    assert all(isinstance(array, numpy.ndarray) for _, array in fst.stream(kinds, framework="np"))


def test_a_stream_keeps_its_budget_and_can_be_left(big):
    budget = 80 << 20
    seen = 0
    for name, tensor in fst.stream(big, memory_budget=budget, in_order=True):
        assert tensor[0, 0] == float(name[1:]) and tensor[-1, -1] == float(name[1:])
        seen += tensor.nbytes
        del tensor
    assert seen == fst.Checkpoint(big).nbytes > budget
    stream = fst.stream(big, memory_budget=budget)
    next(stream)
    stream.close()
    assert list(stream) == []


def test_load_into(kinds, tensors):
    given = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    report = fst.load_into(kinds, given)
    assert report.tensors == len(tensors) and report.bytes == fst.Checkpoint(kinds).nbytes
    assert all(same(given[name], tensors[name]) for name in tensors)
    arrays = {"f32": numpy.empty((4, 5, 6), numpy.float64), "i8": numpy.empty(8, numpy.int8)}
    fst.load_into(kinds, arrays)
    assert same(torch.from_numpy(arrays["f32"]), tensors["f32"].double())


def test_load_into_refuses_what_does_not_suit(kinds):
    shared = torch.empty(2, 120)
    for given, error in [
        ({"f32": torch.empty(4, 5, 7)}, ValueError),
        ({"f32": torch.empty(6, 5, 4).permute(2, 1, 0)}, ValueError),
        ({"i64": torch.empty(4, 5, 6)}, TypeError),
        ({"f32": [1.0]}, TypeError),
        ({"none": torch.empty(1)}, KeyError),
        ({"f32": torch.empty(4, 5, 6, device="meta")}, ValueError),
        ({"f32": shared[0].view(4, 5, 6), "i64": shared.view(-1)[:240].view(torch.int64).view(4, 5, 6)}, ValueError),
    ]:
        with pytest.raises(error) as raised:
            fst.load_into(kinds, given)
        assert isinstance(raised.value, fst.FstError), raised.value
    read_only = numpy.empty((4, 5, 6), numpy.float32)
    read_only.flags.writeable = False
    with pytest.raises(ValueError):
        fst.load_into(kinds, {"f32": read_only})


def test_progress(big):
    told = []
    fst.load_file(big, progress=told.append)
    assert told[-1].bytes_done == told[-1].bytes_total and told[-1].tensors_total == 16
    assert [one.bytes_done for one in told] == sorted(one.bytes_done for one in told)
    tqdm = pytest.importorskip("tqdm")
    with tqdm.tqdm(disable=False, file=open(os.devnull, "w")) as bar:
        fst.load_file(big, progress=bar)
        assert bar.n == bar.total > 0

    def refuses(progress):
        raise LookupError("enough")

    for load in [
        lambda: fst.load_file(big, progress=refuses),
        lambda: fst.load_into(big, {"w0": torch.empty(1024, 4096)}, progress=refuses),
        lambda: list(fst.stream(big, progress=refuses)),
    ]:
        with pytest.raises(LookupError, match="enough"):
            load()
    with pytest.raises(TypeError):
        fst.load_file(big, progress=3)


def test_saves_are_what_the_official_package_reads(tmp_path, tensors):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"before")
    path.chmod(0o640)
    fst.save_file(tensors, path, {"key": "value"})
    assert path.stat().st_mode & 0o777 == 0o640 and os.listdir(tmp_path) == ["model.safetensors"]
    official = safetensors.torch.load_file(path)
    assert all(same(official[name], tensors[name]) for name in tensors)
    assert safetensors.safe_open(path, "pt").metadata() == {"key": "value"}
    strided = {"a": torch.arange(12).reshape(3, 4).T, "c": numpy.arange(12).reshape(3, 4).T, "b": numpy.arange(6, dtype=">i4").reshape(2, 3)[:, ::2]}
    fst.save_file(strided, path)
    loaded = safetensors.torch.load_file(path)
    assert same(loaded["a"], strided["a"]) and same(loaded["c"], strided["a"]) and loaded["b"].tolist() == [[0, 2], [3, 5]]


def test_saves_in_shards(tmp_path, tensors):
    fst.save_file(tensors, tmp_path / "model.safetensors", max_shard_size="1MB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert sorted(os.listdir(tmp_path)) == [*files, "model.safetensors.index.json"]
    loaded = fst.load_file(tmp_path)
    assert set(loaded) == set(tensors) and all(same(loaded[name], tensors[name]) for name in tensors)
    one = fst.load_file([tmp_path / files[0], tmp_path / files[1]])
    assert 0 < len(one) < len(tensors)
    for wrong in ["", "5 apples", 0, -1, "0GB"]:
        with pytest.raises(ValueError):
            fst.save_file(tensors, tmp_path / "x", max_shard_size=wrong)


def test_a_failed_save_leaves_what_was_there(tmp_path, tensors):
    path = tmp_path / "model.safetensors"
    fst.save_file({"a": torch.ones(3)}, path)
    with pytest.raises(ValueError):
        fst.save_file({"__metadata__": torch.zeros(2)}, path)
    with pytest.raises(TypeError):
        fst.save_file({"a": [1, 2]}, path)
    assert os.listdir(tmp_path) == ["model.safetensors"] and same(fst.load_file(path)["a"], torch.ones(3))
    with pytest.raises(FileNotFoundError):
        fst.save_file(tensors, tmp_path / "none" / "x")


def test_verify(tmp_path, kinds):
    import hashlib

    loaded = fst.load_file(kinds, names=["f32"])
    digest = hashlib.sha256(loaded["f32"].numpy().tobytes()).hexdigest()
    manifest = tmp_path / "sums.json"
    manifest.write_text(json.dumps({"tensors": [{"name": "f32", "sha256": digest}]}))
    fst.load_file(kinds, names=["f32"], verify=manifest)
    manifest.write_text(json.dumps({"tensors": [{"name": "f32", "sha256": digest[::-1]}]}))
    with pytest.raises(ValueError, match="sha256"):
        fst.load_file(kinds, names=["f32"], verify=manifest)


def test_errors_are_built_in_ones_too(tmp_path, kinds):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(kinds.read_bytes()[:-1])
    locked = tmp_path / "locked.safetensors"
    os.symlink("/nowhere", tmp_path / "link.safetensors")
    cases = [
        (lambda: fst.load_file(tmp_path / "none"), FileNotFoundError),
        (lambda: fst.load_file(tmp_path / "link.safetensors"), FileNotFoundError),
        (lambda: fst.load_file(bad), ValueError),
        (lambda: fst.load_file(kinds, names=["none"]), KeyError),
        (lambda: fst.load_file(kinds, select="none*"), ValueError),
        (lambda: fst.load_file(kinds, dtype="none"), ValueError),
        (lambda: fst.load_file(kinds, dtype=object()), TypeError),
        (lambda: fst.load_file(kinds, engine="none"), ValueError),
        (lambda: fst.load_file(kinds, device="none"), ValueError),
        (lambda: fst.load_file(kinds, device=1.5), TypeError),
        (lambda: fst.load_file(kinds, framework="none"), ValueError),
        (lambda: fst.load_file(kinds, framework="np", device="cuda:0"), ValueError),
        (lambda: fst.safe_open(kinds).get_tensor("none"), KeyError),
        (lambda: fst.safe_open(kinds).get_slice("none"), KeyError),
        (lambda: fst.Checkpoint(kinds)["none"], KeyError),
        (lambda: fst.load_file(kinds, verify=tmp_path / "none"), FileNotFoundError),
    ]
    del locked
    for call, error in cases:
        with pytest.raises(error) as raised:
            call()
        assert isinstance(raised.value, fst.FstError), raised.value
        assert str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(FileNotFoundError) as raised:
        fst.load_file(tmp_path / "none")
    assert raised.value.errno == 2 and raised.value.filename == str(tmp_path / "none")


def test_too_large_for_memory(tmp_path):
    path = tmp_path / "huge.safetensors"
    size = 1 << 43
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(8 + len(header) + size)
        except OSError:
            pytest.skip("the file system has no files of 8 TiB")
    with pytest.raises(MemoryError):
        fst.load_file(path)


def test_checkpoints(kinds, tensors):
    checkpoint = fst.Checkpoint(kinds)
    assert len(checkpoint) == len(tensors) and "f4" in checkpoint and "none" not in checkpoint
    assert list(checkpoint) == checkpoint.keys()
    info = checkpoint["f4"]
    assert (info.name, info.dtype, info.shape, info.nbytes) == ("f4", "F4", (4, 12), 24)
    start, end = info.file_range
    assert os.fspath(info.path) == str(kinds)
    assert kinds.read_bytes()[start:end] == bytes(tensors["f4"].view(torch.uint8).flatten().tolist())
    assert checkpoint.metadata == {"made": "by the official package"} and checkpoint.notices == []
    assert same(fst.load_file(checkpoint, names=["f32"])["f32"], tensors["f32"])


def test_ids_of_the_hub(tmp_path, monkeypatch, kinds, tensors):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    os.link(kinds, snapshot / "model.safetensors")
    refs = tmp_path / "models--org--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    assert same(fst.load_file("org/name", names=["f32"])["f32"], tensors["f32"])
    assert same(fst.safe_open("org/name").get_tensor("f32"), tensors["f32"])


def test_many_threads_load_at_once(kinds, tensors):
    """With so many switches between threads that waits run into their timeouts."""
    wrong = []

    def load():
        for _ in range(10):
            loaded = fst.load_file(kinds)
            wrong.extend(name for name in tensors if name not in loaded or not same(loaded[name], tensors[name]))
            wrong.extend({*dict(fst.stream(kinds))} ^ {*tensors})

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=load) for _ in range(16)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    finally:
        sys.setswitchinterval(before)
    assert not wrong
