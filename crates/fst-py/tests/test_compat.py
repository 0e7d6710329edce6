"""`fst.compat`, beside the packages whose names it has. Their own tests are run by the scripts in `peers`."""

import pickle
import subprocess
import sys

import fst.compat.safetensors as ours
import fst.compat.safetensors.numpy as our_numpy
import fst.compat.safetensors.torch as our_torch
import numpy
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from conftest import same


def outcome(call):
    """What a call gives, or the name and message of what it raises."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001
        return type(error).__name__, str(error)


def test_files_are_the_same_byte_for_byte(tensors, tmp_path):
    for metadata in [None, {"key": "välue"}]:
        expected = safetensors.torch.save(tensors, metadata)
        assert our_torch.save(tensors, metadata) == expected
        our_torch.save_file(tensors, tmp_path / "file", metadata)
        assert (tmp_path / "file").read_bytes() == expected
    arrays = {"b": numpy.arange(6, dtype=">i4").reshape(2, 3), "a": numpy.ones(3, numpy.float16), "c": numpy.array(True)}
    assert our_numpy.save(arrays) == safetensors.numpy.save(arrays)


def test_bytes_and_files_are_loaded(kinds, tensors):
    data = kinds.read_bytes()
    for loaded in [our_torch.load(data), our_torch.load_file(kinds), our_torch.load_file(kinds, backend="pread")]:
        assert set(loaded) == set(tensors) and all(same(loaded[name], tensors[name]) for name in tensors)
    for loaded in [our_numpy.load(data), our_numpy.load_file(kinds)]:
        assert loaded["i64"].tolist() == tensors["i64"].tolist() and loaded["f4"].shape == (4, 12)
    entries = {name: (entry["dtype"], entry["shape"], bytes(entry["data"])) for name, entry in ours.deserialize(data)}
    for name, entry in safetensors.deserialize(data):
        assert entries[name] == (entry["dtype"], entry["shape"], bytes(entry["data"]))


@pytest.mark.parametrize("framework", ["pt", "np"])
def test_slices_say_what_safetensors_says(kinds, framework):
    """Where both give something it is the same, and where safetensors refuses so does this, in the same words."""
    good = [slice(None), slice(1, 3), (slice(None), 2), (0, slice(1, 4, 2)), ..., (..., 1), (1, ..., slice(2, 4)), ()]
    bad = [4, -5, slice(0, 9), slice(7, None), (0, 0, 0, 0), [0, 1], (slice(None, None, -1),), "x", 1.5]
    with ours.safe_open(kinds, framework) as mine, safetensors.safe_open(kinds, framework) as theirs:
        for index in good + bad:
            found, expected = (outcome(lambda: file.get_slice("i64")[index]) for file in (mine, theirs))
            if isinstance(expected, tuple):
                assert found == expected, index
            else:
                assert found.shape == expected.shape and found.tolist() == expected.tolist(), index


def test_errors_say_what_safetensors_says(kinds, tmp_path):
    missing = tmp_path / "missing"
    for call in [
        lambda module: module.safe_open(missing, "pt"),
        lambda module: module.safe_open(kinds, "none"),
        lambda module: module.safe_open(kinds, "pt", device="none"),
        lambda module: module.safe_open(kinds, "np", device="cuda:0"),
        lambda module: module.safe_open(kinds, "pt", backend="none"),
        lambda module: module.safe_open(kinds, "pt").get_tensor("none"),
        lambda module: module.safe_open(kinds, "pt").get_slice("none"),
        lambda module: module.TensorSpec(dtype="none", shape=[1], data_ptr=0, data_len=0),
        lambda module: module.serialize({"a": 1}),
        lambda module: module.safe_open(kinds, "pt").keys(),
        lambda module: module.safe_open(kinds, "pt").metadata(),
    ]:
        assert outcome(lambda: call(ours)) == outcome(lambda: call(safetensors))
    for wrong in [b"", b"1234567", kinds.read_bytes()[:-1]]:
        (tmp_path / "wrong").write_bytes(wrong)
        with pytest.raises(ours.SafetensorError, match="Error while deserializing header"):
            ours.safe_open(tmp_path / "wrong", "pt")
        with pytest.raises(ours.SafetensorError):
            ours.deserialize(wrong)
    file = ours.safe_open(kinds, "pt")
    with file:
        pass
    with pytest.raises(ours.SafetensorError, match="closed"):
        file.get_tensor("f32")


def test_open_files_and_pickles(kinds, tensors):
    with open(kinds, "rb") as handle:
        file = ours._safe_open_handle(handle, "pt")
    assert same(file.get_tensor("f32"), tensors["f32"])
    assert same(pickle.loads(pickle.dumps(ours.safe_open(kinds, "pt"))).get_tensor("f32"), tensors["f32"])


def test_install(kinds):
    program = f"""
import fst.compat
fst.compat.install("safetensors", "fastsafetensors")
fst.compat.install("safetensors")
import safetensors, safetensors.torch, fastsafetensors
from safetensors.numpy import load_file
from safetensors import SafetensorError
import fst.compat.safetensors.torch
assert safetensors is fst.compat.safetensors and safetensors.torch is fst.compat.safetensors.torch
assert fst.compat.safetensors.torch.__spec__.name == "fst.compat.safetensors.torch"
assert issubclass(SafetensorError, Exception) and len(load_file({str(kinds)!r})) == 23
from fastsafetensors.st_types import DType
from fst.compat.fastsafetensors.st_types import DType as Same
assert DType is Same
try:
    import safetensors.none
except ModuleNotFoundError:
    print("done")
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "done\n"


def test_models(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(4, 3)
            self.b = self.a

    model, other = Tied(), Tied()
    our_torch.save_model(model, tmp_path / "model")
    assert safetensors.safe_open(tmp_path / "model", "pt").metadata() == {"b.bias": "a.bias", "b.weight": "a.weight"}
    for load in [our_torch.load_model, safetensors.torch.load_model]:
        assert load(other, tmp_path / "model") in [(set(), []), ([], [])]
        assert torch.equal(model.a.weight, other.a.weight)


def test_fastsafetensors(tmp_path, tensors):
    from fst.compat import fastsafetensors
    from fst.compat.fastsafetensors.st_types import DType

    one, two = str(tmp_path / "one.safetensors"), str(tmp_path / "two.safetensors")
    safetensors.torch.save_file({"a": tensors["f32"], "h": tensors["f16"]}, one, {"key": "value"})
    safetensors.torch.save_file({"b": tensors["f32"] + 1, "i": tensors["i64"]}, two)
    with fastsafetensors.fastsafe_open([one, two]) as file:
        assert set(file.keys()) == {"a", "b", "h", "i"}
        assert file.metadata() == {one: {"key": "value"}, two: ""}
        kept = file.get_tensor("a")
    assert same(kept, tensors["f32"])
    loader = fastsafetensors.SafeTensorsFileLoader(None, "cpu", nogds=True)
    loader.set_tensor_filter(lambda name: name != "h")
    loader.add_filenames({0: [two, one]})
    assert loader.get_shape("a") == [4, 5, 6] and set(loader.get_keys()) == {"a", "b", "i"}
    buffer = loader.copy_files_to_device()
    assert buffer.get_filename("b") == two and buffer.get_shape("i") == [4, 5, 6]
    assert same(buffer.get_sharded("b", 0), tensors["f32"] + 1)
    assert same(buffer.get_multi_cols(["a", "b"], 1).get_raw(), torch.cat([tensors["f32"], tensors["f32"] + 1], 1))
    assert same(buffer.as_dict({"i": -1})["i"].get_raw(), tensors["i64"])
    assert same(buffer.push_tensor("a", 0), tensors["f32"]) and buffer.push_tensor("a", 1) is None
    assert same(buffer.get_tensor("a", dtype=DType.BF16), tensors["f32"].bfloat16())
    for name in ["h", "none"]:
        with pytest.raises(ValueError):
            buffer.get_tensor(name)
    buffer.close()
    loader.close()
    loader = fastsafetensors.SafeTensorsFileLoader(fastsafetensors.SingleGroup(), "cpu")
    loader.add_filenames({0: [one]})
    converted = loader.copy_files_to_device(dtype=DType.F16)
    assert same(converted.get_tensor("a"), tensors["f32"].half()) and same(converted.get_tensor("h"), tensors["f16"])
    with pytest.raises(Exception, match="larger sizes"):
        loader.copy_files_to_device(dtype=DType.F64)
    with pytest.raises(NotImplementedError):
        loader.add_filenames({1: [two]})
