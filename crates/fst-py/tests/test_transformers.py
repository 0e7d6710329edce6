"""`from_pretrained` by fst, with a small model that is made here."""

import fst.compat.safetensors
import fst.integrations.transformers
import pytest
import torch
from conftest import same

transformers = pytest.importorskip("transformers")


@pytest.fixture
def installed(monkeypatch):
    opened = []
    real = fst.compat.safetensors.safe_open.__init__

    def counted(self, *args, **kwargs):
        opened.append(args[0])
        real(self, *args, **kwargs)

    monkeypatch.setattr(fst.compat.safetensors.safe_open, "__init__", counted)
    fst.integrations.transformers.install()
    fst.integrations.transformers.install()
    yield opened
    fst.integrations.transformers.uninstall()


def model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, vocab_size=512)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    )


@pytest.mark.parametrize("shard", ["1GB", "200KB"])
def test_a_model_is_what_transformers_loads(tmp_path, installed, shard):
    fst.integrations.transformers.uninstall()
    expected = model()
    expected.save_pretrained(tmp_path, max_shard_size=shard)
    as_it_is = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not installed
    fst.integrations.transformers.install()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    files = [str(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert sorted(map(str, installed)) == files and (len(files) > 2) == (shard == "200KB")
    for name, tensor in as_it_is.state_dict().items():
        assert same(loaded.state_dict()[name], tensor) and same(expected.state_dict()[name], tensor)
    tokens = torch.arange(20).reshape(1, 20)
    assert torch.equal(loaded(tokens).logits, as_it_is(tokens).logits)
    # What it loaded is its own.
    before = loaded.lm_head.weight.clone()
    for path in files:
        with open(path, "r+b") as file:
            file.truncate(1000)
    assert same(loaded.lm_head.weight, before)


def test_conversion_and_saving(tmp_path, installed):
    expected = model()
    expected.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert installed
    for name, tensor in expected.state_dict().items():
        assert same(loaded.state_dict()[name], tensor.bfloat16())
