"""Checkpoints that all tests use. The oracle is the official package."""

import pytest
import torch
from safetensors.torch import save_file


def all_kinds():
    """A tensor of each type that torch can hold, of odd shapes too."""
    torch.manual_seed(0)
    bytes_ = lambda *shape: torch.randint(0, 255, shape, dtype=torch.uint8)  # noqa: E731
    return {
        "bf16": torch.randn(300, 700).bfloat16(),
        "large": torch.randn(1200, 1000),
        "f16": torch.randn(3, 5, 7).half(),
        "f32": torch.randn(4, 5, 6),
        "f64": torch.randn(11, dtype=torch.float64),
        "c64": torch.randn(3, dtype=torch.complex64),
        "i8": torch.arange(-4, 4, dtype=torch.int8),
        "i16": torch.arange(6, dtype=torch.int16).reshape(2, 3),
        "i32": torch.arange(6, dtype=torch.int32).reshape(1, 6),
        "i64": torch.arange(120).reshape(4, 5, 6),
        "u8": bytes_(13),
        "u16": torch.tensor([1, 2, 65535], dtype=torch.uint16),
        "u32": torch.tensor([1, 2**32 - 1], dtype=torch.uint32),
        "u64": torch.tensor([1, 2**63], dtype=torch.uint64),
        "bool": torch.tensor([True, False, True]),
        "e4m3": torch.randn(4, 8).to(torch.float8_e4m3fn),
        "e5m2": torch.randn(4, 8).to(torch.float8_e5m2),
        "e4m3fnuz": torch.randn(4, 8).to(torch.float8_e4m3fnuz),
        "e5m2fnuz": torch.randn(4, 8).to(torch.float8_e5m2fnuz),
        "e8m0": torch.tensor([0.5, 2.0]).to(torch.float8_e8m0fnu),
        "f4": bytes_(4, 6).view(torch.float4_e2m1fn_x2),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
    }


def raw(tensor):
    """A tensor's bytes."""
    if not tensor.numel():
        return torch.empty(0, dtype=torch.uint8)
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def same(found, expected):
    """Whether two tensors are the same in type, shape and every bit."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(raw(found), raw(expected))
    return True


@pytest.fixture(scope="session")
def tensors():
    return all_kinds()


@pytest.fixture(scope="session")
def kinds(tensors, tmp_path_factory):
    """A file with tensors of all kinds."""
    path = tmp_path_factory.mktemp("kinds") / "model.safetensors"
    save_file(tensors, path, {"made": "by the official package"})
    return path


@pytest.fixture(scope="session")
def big(tmp_path_factory):
    """A file that takes long enough to load for a load to be interrupted, where it is read slowly."""
    path = tmp_path_factory.mktemp("big") / "model.safetensors"
    save_file({f"w{i}": torch.full((1024, 4096), float(i)) for i in range(16)}, path)
    return path
