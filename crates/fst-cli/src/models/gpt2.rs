//! GPT-2 (124M): `F32`, Conv1D weights stored `[in, out]`, the causal masks saved as `attn.bias`.

use fst::Dtype::F32;

use super::shard::FileNames;
use super::{Block, Layout, Model, ShardRule};

const HIDDEN: usize = 768;
const CONTEXT: usize = 1024;
const VOCABULARY: usize = 50_257;

pub(super) const GPT2: Model = Model {
    name: "gpt2",
    aliases: &["gpt-2", "gpt2-124m"],
    hub_name: "openai-community/gpt2",
    layers: 12,
    layout: Layout { before, layer, after, tail: None },
    rule: ShardRule::Single,
    file_names: FileNames::Dash,
};

fn before(block: &mut Block<'_>) {
    block.push("wte.weight", F32, &[VOCABULARY, HIDDEN]);
    block.push("wpe.weight", F32, &[CONTEXT, HIDDEN]);
}

fn layer(block: &mut Block<'_>, index: usize) {
    let mut block = block.part(&format!("h.{index}."));
    block.push("ln_1.weight", F32, &[HIDDEN]);
    block.push("ln_1.bias", F32, &[HIDDEN]);
    block.push("attn.bias", F32, &[1, 1, CONTEXT, CONTEXT]);
    block.push("attn.c_attn.weight", F32, &[HIDDEN, 3 * HIDDEN]);
    block.push("attn.c_attn.bias", F32, &[3 * HIDDEN]);
    block.push("attn.c_proj.weight", F32, &[HIDDEN, HIDDEN]);
    block.push("attn.c_proj.bias", F32, &[HIDDEN]);
    block.push("ln_2.weight", F32, &[HIDDEN]);
    block.push("ln_2.bias", F32, &[HIDDEN]);
    block.push("mlp.c_fc.weight", F32, &[HIDDEN, 4 * HIDDEN]);
    block.push("mlp.c_fc.bias", F32, &[4 * HIDDEN]);
    block.push("mlp.c_proj.weight", F32, &[4 * HIDDEN, HIDDEN]);
    block.push("mlp.c_proj.bias", F32, &[HIDDEN]);
}

fn after(block: &mut Block<'_>) {
    block.push("ln_f.weight", F32, &[HIDDEN]);
    block.push("ln_f.bias", F32, &[HIDDEN]);
}
