//! DeepSeek-V3 (671B): a mixture of experts with `F8_E4M3` weights and an `F32` scale per 128 x 128 block.

use fst::Dtype::{BF16, F8E4M3, F32};

use super::shard::FileNames;
use super::{Block, Layout, Model, ShardRule};

const HIDDEN: usize = 7168;
const VOCABULARY: usize = 129_280;
const LAYERS: usize = 61;
/// The first layers have one wide MLP instead of experts.
const DENSE_LAYERS: usize = 3;
const INTERMEDIATE: usize = 18_432;
const EXPERTS: usize = 256;
const EXPERT_INTERMEDIATE: usize = 2048;
const HEADS: usize = 128;
const QUERY_RANK: usize = 1536;
const KEY_VALUE_RANK: usize = 512;
/// Per head: 128 dimensions without and 64 with rotary embedding; values have 128.
const HEAD_NO_ROTARY: usize = 128;
const HEAD_ROTARY: usize = 64;
const HEAD_VALUE: usize = 128;
/// Edge of the blocks that share a scale.
const SCALE_BLOCK: usize = 128;

pub(super) const DEEPSEEK_V3: Model = Model {
    name: "deepseek-v3",
    aliases: &["deepseek-671b", "moe-671b", "deepseek-r1"],
    hub_name: "deepseek-ai/DeepSeek-V3",
    layers: LAYERS,
    layout: Layout { before, layer, after, tail: Some(next_token_layer) },
    rule: ShardRule::MaxBytes(4_270_000_000),
    file_names: FileNames::DashSixDigitTotal,
};

fn before(block: &mut Block<'_>) {
    block.push("model.embed_tokens.weight", BF16, &[VOCABULARY, HIDDEN]);
}

/// An `F8_E4M3` matrix and its scales.
fn quantized(block: &mut Block<'_>, name: &str, rows: usize, columns: usize) {
    block.push(&format!("{name}.weight"), F8E4M3, &[rows, columns]);
    let scales = [rows.div_ceil(SCALE_BLOCK), columns.div_ceil(SCALE_BLOCK)];
    block.push(&format!("{name}.weight_scale_inv"), F32, &scales);
}

fn gated_mlp(block: &mut Block<'_>, intermediate: usize) {
    quantized(block, "gate_proj", intermediate, HIDDEN);
    quantized(block, "up_proj", intermediate, HIDDEN);
    quantized(block, "down_proj", HIDDEN, intermediate);
}

fn layer(block: &mut Block<'_>, index: usize) {
    let mut block = block.part(&format!("model.layers.{index}."));
    {
        let mut block = block.part("self_attn.");
        quantized(&mut block, "q_a_proj", QUERY_RANK, HIDDEN);
        block.push("q_a_layernorm.weight", BF16, &[QUERY_RANK]);
        let query = HEADS * (HEAD_NO_ROTARY + HEAD_ROTARY);
        quantized(&mut block, "q_b_proj", query, QUERY_RANK);
        quantized(&mut block, "kv_a_proj_with_mqa", KEY_VALUE_RANK + HEAD_ROTARY, HIDDEN);
        block.push("kv_a_layernorm.weight", BF16, &[KEY_VALUE_RANK]);
        let key_value = HEADS * (HEAD_NO_ROTARY + HEAD_VALUE);
        quantized(&mut block, "kv_b_proj", key_value, KEY_VALUE_RANK);
        quantized(&mut block, "o_proj", HIDDEN, HEADS * HEAD_VALUE);
    }
    if index < DENSE_LAYERS {
        gated_mlp(&mut block.part("mlp."), INTERMEDIATE);
    } else {
        let mut block = block.part("mlp.");
        block.push("gate.weight", BF16, &[EXPERTS, HIDDEN]);
        block.push("gate.e_score_correction_bias", F32, &[EXPERTS]);
        gated_mlp(&mut block.part("shared_experts."), EXPERT_INTERMEDIATE);
        for expert in 0..EXPERTS {
            gated_mlp(&mut block.part(&format!("experts.{expert}.")), EXPERT_INTERMEDIATE);
        }
    }
    block.push("input_layernorm.weight", BF16, &[HIDDEN]);
    block.push("post_attention_layernorm.weight", BF16, &[HIDDEN]);
}

fn after(block: &mut Block<'_>) {
    block.push("model.norm.weight", BF16, &[HIDDEN]);
    block.push("lm_head.weight", BF16, &[VOCABULARY, HIDDEN]);
}

/// The multi-token-prediction module, numbered as one more layer, with embeddings and head of its own.
fn next_token_layer(block: &mut Block<'_>) {
    let mut part = block.part(&format!("model.layers.{LAYERS}."));
    part.push("embed_tokens.weight", BF16, &[VOCABULARY, HIDDEN]);
    part.push("enorm.weight", BF16, &[HIDDEN]);
    part.push("hnorm.weight", BF16, &[HIDDEN]);
    part.push("eh_proj.weight", BF16, &[HIDDEN, 2 * HIDDEN]);
    layer(block, LAYERS);
    let mut part = block.part(&format!("model.layers.{LAYERS}."));
    part.push("shared_head.norm.weight", BF16, &[HIDDEN]);
    part.push("shared_head.head.weight", BF16, &[VOCABULARY, HIDDEN]);
}
