"""`safe_open`: single tensors and parts of them."""

import itertools
import os
import pickle
import random
import threading

import fst
import numpy
import pytest
import torch
from conftest import same

SHAPE = (4, 5, 6)


def indices():
    """Indices of all kinds for three dimensions, and a choice of what combines them."""
    parts = [0, -1, 3, slice(None), slice(1, 3), slice(-2, None), slice(None, None, 2), slice(3, 1), slice(1, 99, 3)]
    yield from parts
    yield from [..., None, (), (..., 0), (0, ..., 1), (None, 0), (..., None), (slice(1, 2), ...), (0, 0, 0)]
    yield from [numpy.int64(1), True, [0, 2], [], ([0, 1], [1, 2]), torch.tensor([0, 3]), slice(-99, 99)]
    chosen = random.Random(0).sample(list(itertools.product(parts, repeat=3)), 120)
    yield from chosen
    yield from random.Random(1).sample(list(itertools.product(parts, repeat=2)), 30)


def test_slices_are_what_torch_cuts(kinds, tensors):
    with fst.safe_open(kinds, "pt") as file:
        for index in indices():
            found = file.get_slice("i64")[index]
            assert same(found, tensors["i64"][index]), index
            assert found.is_contiguous()
            assert found.untyped_storage().nbytes() == found.nbytes, index


def test_slices_are_what_numpy_cuts(kinds, tensors):
    array = tensors["i64"].numpy()
    with fst.safe_open(kinds, "np") as file:
        extra = [slice(None, None, -1), (slice(3, 0, -2), 1), (..., slice(None, None, -3)), (0, slice(4, None, -1))]
        for index in [*indices(), *extra]:
            if isinstance(index, torch.Tensor):
                continue
            found = file.get_slice("i64")[index]
            expected = numpy.asarray(array[index])
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape), index
            assert numpy.array_equal(found, expected), index
            assert found.flags.writeable and found.base is None or found.size == 120, index


def test_slices_of_large_tensors(kinds, tensors):
    with fst.safe_open(kinds) as file:
        large = file.get_slice("large")
        for index in [..., slice(700, None), (slice(None), slice(3, 900)), (slice(None, None, 7), slice(0, 500, 3)), 5]:
            assert same(large[index], tensors["large"][index]), index


def test_slices_of_packed_elements(kinds, tensors):
    packed = tensors["f4"].view(torch.uint8)
    with fst.safe_open(kinds) as file:
        part = file.get_slice("f4")
        assert part.get_shape() == [4, 12] and part.get_dtype() == "F4"
        for index in [..., slice(1, 3), (slice(None), slice(1, 4)), (0, slice(2, 3)), (slice(None), slice(0, 6, 2))]:
            assert torch.equal(part[index].view(torch.uint8), packed[index]), index
    with fst.safe_open(kinds, "np") as file:
        whole = file.get_tensor("f4")
        for index in [..., (slice(None), slice(1, 4)), 2, (1, 3)]:
            assert numpy.array_equal(file.get_slice("f4")[index].view(numpy.uint8), whole[index].view(numpy.uint8))


def test_wrong_indices_are_refused_as_the_framework_refuses_them(kinds, tensors):
    with fst.safe_open(kinds) as file:
        for index in [4, -5, (0, 0, 0, 0), 1.0, "x", slice(None, None, -1), (0, 5)]:
            with pytest.raises(Exception) as expected:
                tensors["i64"][index]
            with pytest.raises(type(expected.value)):
                file.get_slice("i64")[index]
        with pytest.raises(IndexError):
            file.get_slice("scalar")[:]
        assert same(file.get_slice("scalar")[...], tensors["scalar"])
    with fst.safe_open(kinds, "np") as file:
        for index in [4, -5, (0, 0, 0, 0), 1.0, "x"]:
            with pytest.raises(IndexError):
                file.get_slice("i64")[index]


def test_tensors(kinds, tensors):
    with fst.safe_open(kinds, "pt", device="cpu") as file:
        assert file.keys() == sorted(tensors) and set(file.offset_keys()) == set(tensors) and len(file) == len(tensors)
        assert "f4" in file and "none" not in file
        assert file.metadata() == {"made": "by the official package"}
        for name in tensors:
            assert same(file.get_tensor(name), tensors[name])
        everything = file.get_tensors()
    assert list(everything) == fst.Checkpoint(kinds).keys()
    assert all(same(everything[name], tensors[name]) for name in tensors)
    with pytest.raises(ValueError, match="closed"):
        file.keys()
    with pytest.raises(ValueError, match="closed"):
        file.get_tensor("f32")


def test_torch_default_device_does_not_count(kinds, tensors):
    with torch.device("meta"):
        assert fst.safe_open(kinds).get_tensor("f32").device.type == "cpu"
        assert fst.load_file(kinds)["empty"].device.type == "cpu"
    assert fst.load_file(kinds, device=torch.device("cpu"))["f32"].device.type == "cpu"
    assert fst.load_file(kinds, device="meta", names=["f32"])["f32"].device.type == "meta"


def test_a_file_without_a_name_is_read(tmp_path, kinds, tensors):
    path = tmp_path / "model.safetensors"
    path.write_bytes(kinds.read_bytes())
    file = fst.safe_open(path)
    path.unlink()
    assert same(file.get_tensor("f32"), tensors["f32"])
    assert same(file.get_tensor("large"), tensors["large"])
    assert same(file.get_slice("large")[3:5], tensors["large"][3:5])
    assert all(same(tensor, tensors[name]) for name, tensor in file.get_tensors().items())
    # Another file of the same name is not what was opened.
    path.write_bytes(b"something else")
    assert same(file.get_tensor("bf16"), tensors["bf16"])


def test_errors_name_the_path(tmp_path, kinds):
    path = tmp_path / "model.safetensors"
    path.write_bytes(kinds.read_bytes()[:-1])
    with pytest.raises(ValueError) as raised:
        fst.safe_open(path)
    assert str(path) in str(raised.value) and "/proc" not in str(raised.value)
    path.write_bytes(kinds.read_bytes())
    file = fst.safe_open(path)
    with open(path, "r+b") as changed:
        changed.truncate(5000)
    for name in ["bf16", "large"]:
        with pytest.raises(OSError) as raised:
            file.get_tensor(name)
        assert str(path) in str(raised.value) and "/proc" not in str(raised.value)


def test_descriptors_are_given_back(kinds):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        file = fst.safe_open(kinds)
        file.get_tensor("f32")
        file.get_tensor("large")
        file.close()
    fst.load_file(kinds)
    assert len(os.listdir("/proc/self/fd")) == before


def test_sessions_and_checkpoints_are_pickled_by_path(kinds, tensors):
    file = pickle.loads(pickle.dumps(fst.safe_open(kinds, "pt")))
    assert same(file.get_tensor("f32"), tensors["f32"])
    checkpoint = pickle.loads(pickle.dumps(fst.Checkpoint([kinds])))
    assert checkpoint.keys() == file.offset_keys()
    with pytest.raises(FileNotFoundError) as raised:
        fst.load_file("none")
    again = pickle.loads(pickle.dumps(raised.value))
    assert type(again) is type(raised.value) and str(again) == str(raised.value) and again.errno == 2


def test_threads_share_a_session(kinds, tensors):
    wrong = []
    with fst.safe_open(kinds) as file:

        def read(seed):
            names = list(tensors)
            random.Random(seed).shuffle(names)
            wrong.extend(name for name in names * 5 if not same(file.get_tensor(name), tensors[name]))

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert not wrong
