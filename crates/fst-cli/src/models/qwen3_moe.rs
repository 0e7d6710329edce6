//! Qwen3-30B-A3B: a mixture of experts whose checkpoint has 18,867 tensors, most of them 3 MiB.

use fst::Dtype::BF16;

use super::shard::FileNames;
use super::{Block, Layout, Model, ShardRule};

const HIDDEN: usize = 2048;
const VOCABULARY: usize = 151_936;
const HEAD: usize = 128;
const HEADS: usize = 32;
const KEY_VALUE_HEADS: usize = 4;
const EXPERTS: usize = 128;
const EXPERT_INTERMEDIATE: usize = 768;

pub(super) const QWEN3_30B_A3B: Model = Model {
    name: "qwen3-30b-a3b",
    aliases: &["qwen3-moe"],
    hub_name: "Qwen/Qwen3-30B-A3B",
    layers: 48,
    layout: Layout { before, layer, after, tail: None },
    rule: ShardRule::MaxBytes(4_000_000_000),
    file_names: FileNames::Dash,
};

fn before(block: &mut Block<'_>) {
    block.push("model.embed_tokens.weight", BF16, &[VOCABULARY, HIDDEN]);
}

fn layer(block: &mut Block<'_>, index: usize) {
    let mut block = block.part(&format!("model.layers.{index}."));
    block.push("self_attn.q_proj.weight", BF16, &[HEADS * HEAD, HIDDEN]);
    block.push("self_attn.k_proj.weight", BF16, &[KEY_VALUE_HEADS * HEAD, HIDDEN]);
    block.push("self_attn.v_proj.weight", BF16, &[KEY_VALUE_HEADS * HEAD, HIDDEN]);
    block.push("self_attn.o_proj.weight", BF16, &[HIDDEN, HEADS * HEAD]);
    block.push("self_attn.q_norm.weight", BF16, &[HEAD]);
    block.push("self_attn.k_norm.weight", BF16, &[HEAD]);
    block.push("mlp.gate.weight", BF16, &[EXPERTS, HIDDEN]);
    for expert in 0..EXPERTS {
        let mut block = block.part(&format!("mlp.experts.{expert}."));
        block.push("gate_proj.weight", BF16, &[EXPERT_INTERMEDIATE, HIDDEN]);
        block.push("up_proj.weight", BF16, &[EXPERT_INTERMEDIATE, HIDDEN]);
        block.push("down_proj.weight", BF16, &[HIDDEN, EXPERT_INTERMEDIATE]);
    }
    block.push("input_layernorm.weight", BF16, &[HIDDEN]);
    block.push("post_attention_layernorm.weight", BF16, &[HIDDEN]);
}

fn after(block: &mut Block<'_>) {
    block.push("model.norm.weight", BF16, &[HIDDEN]);
    block.push("lm_head.weight", BF16, &[VOCABULARY, HIDDEN]);
}
