//! Names, shapes, dtypes and order of tensors, as the published checkpoints of each family have them.

use serde::Serialize;

/// One tensor of a checkpoint to synthesize.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TensorSpec {
    /// Name in the header.
    pub name: String,
    /// Dtype as the header spells it.
    pub dtype: &'static str,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    fn new(name: impl Into<String>, dtype: &'static str, shape: &[usize]) -> Self {
        Self { name: name.into(), dtype, shape: shape.to_vec() }
    }

    /// Bytes of data.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let size = if self.dtype == "F32" { 4 } else { 2 };
        self.shape.iter().map(|&dim| dim as u64).product::<u64>() * size
    }
}

/// A llama-shaped model in bf16.
#[derive(Debug, Clone, Copy)]
pub struct Llama {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward layers.
    pub ffn: usize,
    /// Width of the keys and values.
    pub kv: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Vocabulary.
    pub vocab: usize,
}

impl Llama {
    /// The tensors in the order of the published checkpoints.
    #[must_use]
    pub fn tensors(self) -> Vec<TensorSpec> {
        let Self { hidden, ffn, kv, layers, vocab } = self;
        let bf16 = |name: String, shape: &[usize]| TensorSpec::new(name, "BF16", shape);
        let mut all = vec![bf16("model.embed_tokens.weight".into(), &[vocab, hidden])];
        for layer in 0..layers {
            let at = |part: &str| format!("model.layers.{layer}.{part}.weight");
            all.extend([
                bf16(at("input_layernorm"), &[hidden]),
                bf16(at("mlp.down_proj"), &[hidden, ffn]),
                bf16(at("mlp.gate_proj"), &[ffn, hidden]),
                bf16(at("mlp.up_proj"), &[ffn, hidden]),
                bf16(at("post_attention_layernorm"), &[hidden]),
                bf16(at("self_attn.k_proj"), &[kv, hidden]),
                bf16(at("self_attn.o_proj"), &[hidden, hidden]),
                bf16(at("self_attn.q_proj"), &[hidden, hidden]),
                bf16(at("self_attn.v_proj"), &[kv, hidden]),
            ]);
        }
        all.push(bf16("model.norm.weight".into(), &[hidden]));
        all.push(bf16("lm_head.weight".into(), &[vocab, hidden]));
        all
    }
}

/// A model of the Qwen3 mixture-of-experts family in bf16.
#[derive(Debug, Clone, Copy)]
pub struct QwenMoe {
    /// Decoder layers (48 in Qwen3-30B-A3B).
    pub layers: usize,
    /// Experts in each layer (128 there).
    pub experts: usize,
    /// Width of one expert (768 there).
    pub expert_ffn: usize,
    /// Width of the residual stream (2048 there).
    pub hidden: usize,
    /// Vocabulary (151936 there).
    pub vocab: usize,
}

impl QwenMoe {
    /// Qwen3-30B-A3B as published: 18,867 tensors.
    pub const FULL: Self =
        Self { layers: 48, experts: 128, expert_ffn: 768, hidden: 2048, vocab: 151_936 };

    /// The tensors, layer by layer.
    #[must_use]
    pub fn tensors(self) -> Vec<TensorSpec> {
        let Self { layers, experts, expert_ffn, hidden, vocab } = self;
        let (q, kv, head) = (2 * hidden, hidden / 4, 128);
        let bf16 = |name: String, shape: &[usize]| TensorSpec::new(name, "BF16", shape);
        let mut all = vec![bf16("model.embed_tokens.weight".into(), &[vocab, hidden])];
        for layer in 0..layers {
            let at = |part: &str| format!("model.layers.{layer}.{part}.weight");
            all.push(bf16(at("input_layernorm"), &[hidden]));
            for expert in 0..experts {
                let at = |part: &str| at(&format!("mlp.experts.{expert}.{part}"));
                all.push(bf16(at("down_proj"), &[hidden, expert_ffn]));
                all.push(bf16(at("gate_proj"), &[expert_ffn, hidden]));
                all.push(bf16(at("up_proj"), &[expert_ffn, hidden]));
            }
            all.extend([
                bf16(at("mlp.gate"), &[experts, hidden]),
                bf16(at("post_attention_layernorm"), &[hidden]),
                bf16(at("self_attn.k_norm"), &[head]),
                bf16(at("self_attn.k_proj"), &[kv, hidden]),
                bf16(at("self_attn.o_proj"), &[hidden, q]),
                bf16(at("self_attn.q_norm"), &[head]),
                bf16(at("self_attn.q_proj"), &[q, hidden]),
                bf16(at("self_attn.v_proj"), &[kv, hidden]),
            ]);
        }
        all.push(bf16("model.norm.weight".into(), &[hidden]));
        all.push(bf16("lm_head.weight".into(), &[vocab, hidden]));
        all
    }
}

/// GPT-2 in f32 (small: 12 layers of width 768, 0.5 GB).
#[must_use]
pub fn gpt2(layers: usize, width: usize, vocab: usize) -> Vec<TensorSpec> {
    let f32 = |name: String, shape: &[usize]| TensorSpec::new(name, "F32", shape);
    let mut all =
        vec![f32("wte.weight".into(), &[vocab, width]), f32("wpe.weight".into(), &[1024, width])];
    for layer in 0..layers {
        let at = |part: &str| format!("h.{layer}.{part}");
        all.extend([
            f32(at("ln_1.weight"), &[width]),
            f32(at("ln_1.bias"), &[width]),
            f32(at("attn.bias"), &[1, 1, 1024, 1024]),
            f32(at("attn.c_attn.weight"), &[width, 3 * width]),
            f32(at("attn.c_attn.bias"), &[3 * width]),
            f32(at("attn.c_proj.weight"), &[width, width]),
            f32(at("attn.c_proj.bias"), &[width]),
            f32(at("ln_2.weight"), &[width]),
            f32(at("ln_2.bias"), &[width]),
            f32(at("mlp.c_fc.weight"), &[width, 4 * width]),
            f32(at("mlp.c_fc.bias"), &[4 * width]),
            f32(at("mlp.c_proj.weight"), &[4 * width, width]),
            f32(at("mlp.c_proj.bias"), &[width]),
        ]);
    }
    all.extend([f32("ln_f.weight".into(), &[width]), f32("ln_f.bias".into(), &[width])]);
    all
}

/// `count` small tensors, named as experts are: what a header parser has to cope with.
#[must_use]
pub fn many(count: usize) -> Vec<TensorSpec> {
    let name = |i: usize| {
        let (layer, expert) = (i / 1024, i % 1024);
        format!("model.layers.{layer}.mlp.experts.{expert}.up_proj.weight")
    };
    (0..count).map(|i| TensorSpec::new(name(i), "BF16", &[64, 32])).collect()
}

/// A few tensors of awkward sizes: odd, empty, scalar, unaligned in the file.
#[must_use]
pub fn odd() -> Vec<TensorSpec> {
    let bf16 = |name: &str, shape: &[usize]| TensorSpec::new(name, "BF16", shape);
    vec![
        bf16("odd.matrix", &[1023, 511]),
        bf16("odd.vector", &[3]),
        bf16("empty", &[0, 4]),
        bf16("scalar", &[]),
        bf16("large", &[3, 700_001]),
        bf16("cube", &[5, 7, 9]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_full_mixture_of_experts_model_is_as_published() {
        let tensors = QwenMoe::FULL.tensors();
        assert_eq!(tensors.len(), 18_867);
        // total_size of the published index.
        assert_eq!(tensors.iter().map(TensorSpec::bytes).sum::<u64>(), 61_064_245_248);
    }

    #[test]
    fn llama_2_7b_is_as_published() {
        let llama = Llama { hidden: 4096, ffn: 11008, kv: 4096, layers: 32, vocab: 32000 };
        let bytes: u64 = llama.tensors().iter().map(TensorSpec::bytes).sum();
        assert_eq!(bytes, 13_476_831_232);
    }
}
