//! Llama 2 (7B, 13B, 70B): `F16`, with the rotary frequencies that transformers saved at the time.

use fst::Dtype::{self, F16, F32};

use super::shard::FileNames;
use super::{Block, Layout, Model, ShardRule};

const VOCABULARY: usize = 32_000;
const HEAD: usize = 128;

/// What tells the sizes of Llama 2 apart.
struct Config {
    hidden: usize,
    intermediate: usize,
    /// Rows of the key and value projections: fewer than `hidden` under grouped-query attention.
    key_value: usize,
    /// The dtype of `rotary_emb.inv_freq`, which differs between the published checkpoints.
    rotary: Dtype,
}

const B7: Config = Config { hidden: 4096, intermediate: 11_008, key_value: 4096, rotary: F16 };
const B13: Config = Config { hidden: 5120, intermediate: 13_824, key_value: 5120, rotary: F32 };
const B70: Config = Config { hidden: 8192, intermediate: 28_672, key_value: 1024, rotary: F32 };

pub(super) const LLAMA_2_7B: Model = Model {
    name: "llama-2-7b",
    aliases: &["llama2-7b", "Llama-2-7b-hf"],
    hub_name: "meta-llama/Llama-2-7b-hf",
    layers: 32,
    layout: Layout {
        before: |block| before(block, &B7),
        layer: |block, index| layer(block, index, &B7),
        after: |block| after(block, &B7),
        tail: None,
    },
    rule: ShardRule::MaxBytes(10_000_000_000),
    file_names: FileNames::Dash,
};

pub(super) const LLAMA_2_13B: Model = Model {
    name: "llama-2-13b",
    aliases: &["llama2-13b", "Llama-2-13b-hf"],
    hub_name: "meta-llama/Llama-2-13b-hf",
    layers: 40,
    layout: Layout {
        before: |block| before(block, &B13),
        layer: |block, index| layer(block, index, &B13),
        after: |block| after(block, &B13),
        tail: None,
    },
    rule: ShardRule::MaxBytes(10_000_000_000),
    file_names: FileNames::Dash,
};

pub(super) const LLAMA_2_70B: Model = Model {
    name: "llama-2-70b",
    aliases: &["llama2-70b", "llama-70b", "Llama-2-70b-hf"],
    hub_name: "meta-llama/Llama-2-70b-hf",
    layers: 80,
    layout: Layout {
        before: |block| before(block, &B70),
        layer: |block, index| layer(block, index, &B70),
        after: |block| after(block, &B70),
        tail: None,
    },
    rule: ShardRule::MaxBytes(10_000_000_000),
    file_names: FileNames::Dash,
};

fn before(block: &mut Block<'_>, config: &Config) {
    block.push("model.embed_tokens.weight", F16, &[VOCABULARY, config.hidden]);
}

fn layer(block: &mut Block<'_>, index: usize, config: &Config) {
    let &Config { hidden, intermediate, key_value, rotary } = config;
    let mut block = block.part(&format!("model.layers.{index}."));
    block.push("self_attn.q_proj.weight", F16, &[hidden, hidden]);
    block.push("self_attn.k_proj.weight", F16, &[key_value, hidden]);
    block.push("self_attn.v_proj.weight", F16, &[key_value, hidden]);
    block.push("self_attn.o_proj.weight", F16, &[hidden, hidden]);
    block.push("self_attn.rotary_emb.inv_freq", rotary, &[HEAD / 2]);
    block.push("mlp.gate_proj.weight", F16, &[intermediate, hidden]);
    block.push("mlp.up_proj.weight", F16, &[intermediate, hidden]);
    block.push("mlp.down_proj.weight", F16, &[hidden, intermediate]);
    block.push("input_layernorm.weight", F16, &[hidden]);
    block.push("post_attention_layernorm.weight", F16, &[hidden]);
}

fn after(block: &mut Block<'_>, config: &Config) {
    block.push("model.norm.weight", F16, &[config.hidden]);
    block.push("lm_head.weight", F16, &[VOCABULARY, config.hidden]);
}
