//! Falcon 40B: `BF16`, no biases but those of the norms, one fused projection with 8 key-value groups.

use fst::Dtype::BF16;

use super::shard::FileNames;
use super::{Block, Layout, Model, ShardRule};

const HIDDEN: usize = 8192;
const VOCABULARY: usize = 65_024;
const HEAD: usize = 64;
const HEADS: usize = 128;
const KEY_VALUE_HEADS: usize = 8;

pub(super) const FALCON_40B: Model = Model {
    name: "falcon-40b",
    aliases: &["falcon40b"],
    hub_name: "tiiuae/falcon-40b",
    layers: 60,
    layout: Layout { before, layer, after, tail: None },
    rule: ShardRule::MaxBytes(10_000_000_000),
    file_names: FileNames::Dash,
};

fn before(block: &mut Block<'_>) {
    block.push("transformer.word_embeddings.weight", BF16, &[VOCABULARY, HIDDEN]);
}

fn layer(block: &mut Block<'_>, index: usize) {
    let mut block = block.part(&format!("transformer.h.{index}."));
    block.push("ln_attn.weight", BF16, &[HIDDEN]);
    block.push("ln_attn.bias", BF16, &[HIDDEN]);
    block.push("ln_mlp.weight", BF16, &[HIDDEN]);
    block.push("ln_mlp.bias", BF16, &[HIDDEN]);
    let fused = (HEADS + 2 * KEY_VALUE_HEADS) * HEAD;
    block.push("self_attention.query_key_value.weight", BF16, &[fused, HIDDEN]);
    block.push("self_attention.dense.weight", BF16, &[HIDDEN, HIDDEN]);
    block.push("mlp.dense_h_to_4h.weight", BF16, &[4 * HIDDEN, HIDDEN]);
    block.push("mlp.dense_4h_to_h.weight", BF16, &[HIDDEN, 4 * HIDDEN]);
}

fn after(block: &mut Block<'_>) {
    block.push("transformer.ln_f.weight", BF16, &[HIDDEN]);
    block.push("transformer.ln_f.bias", BF16, &[HIDDEN]);
    block.push("lm_head.weight", BF16, &[VOCABULARY, HIDDEN]);
}
