//! BLOOM 176B: `BF16`, biases everywhere, the head tied to the embeddings, one file per layer.

use fst::Dtype::BF16;

use super::shard::FileNames;
use super::{Block, Layout, Model, ShardRule};

const HIDDEN: usize = 14_336;
const VOCABULARY: usize = 250_880;

pub(super) const BLOOM_176B: Model = Model {
    name: "bloom-176b",
    aliases: &["bloom"],
    hub_name: "bigscience/bloom",
    layers: 70,
    layout: Layout { before, layer, after, tail: None },
    rule: ShardRule::PerLayer,
    file_names: FileNames::Underscore,
};

fn before(block: &mut Block<'_>) {
    block.push("word_embeddings.weight", BF16, &[VOCABULARY, HIDDEN]);
    block.push("word_embeddings_layernorm.weight", BF16, &[HIDDEN]);
    block.push("word_embeddings_layernorm.bias", BF16, &[HIDDEN]);
}

fn layer(block: &mut Block<'_>, index: usize) {
    let mut block = block.part(&format!("h.{index}."));
    block.push("input_layernorm.weight", BF16, &[HIDDEN]);
    block.push("input_layernorm.bias", BF16, &[HIDDEN]);
    block.push("self_attention.query_key_value.weight", BF16, &[3 * HIDDEN, HIDDEN]);
    block.push("self_attention.query_key_value.bias", BF16, &[3 * HIDDEN]);
    block.push("self_attention.dense.weight", BF16, &[HIDDEN, HIDDEN]);
    block.push("self_attention.dense.bias", BF16, &[HIDDEN]);
    block.push("post_attention_layernorm.weight", BF16, &[HIDDEN]);
    block.push("post_attention_layernorm.bias", BF16, &[HIDDEN]);
    block.push("mlp.dense_h_to_4h.weight", BF16, &[4 * HIDDEN, HIDDEN]);
    block.push("mlp.dense_h_to_4h.bias", BF16, &[4 * HIDDEN]);
    block.push("mlp.dense_4h_to_h.weight", BF16, &[HIDDEN, 4 * HIDDEN]);
    block.push("mlp.dense_4h_to_h.bias", BF16, &[HIDDEN]);
}

fn after(block: &mut Block<'_>) {
    block.push("ln_f.weight", BF16, &[HIDDEN]);
    block.push("ln_f.bias", BF16, &[HIDDEN]);
}
