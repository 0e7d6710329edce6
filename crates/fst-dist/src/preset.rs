//! Named shard specifications, chosen by tensor names: how tensor-parallel engines cut the usual
//! model families.
//!
//! A preset looks at the last components of a name (`q_proj.weight`, `c_attn.bias`), so prefixes do
//! not matter. Names that it does not know are replicated, which is always right and never smallest.

use std::ops::Range;
use std::sync::Arc;

use crate::shard::{Shard, Split};
use crate::tensor::TensorDesc;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    Llama,
    Gpt2,
    Falcon,
    Bloom,
    NeoX,
    Opt,
    Moe,
    Replicate,
}

/// What becomes of a mixture-of-experts model's experts.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Experts {
    /// Rank `r` keeps the `r`-th block of whole experts, blocks of `ceil(experts / world)`.
    Linear,
    /// Every expert is split over all ranks, as a dense layer is. Experts that are stored as one
    /// three-dimensional tensor are kept as by `Linear`: their inner layout differs between models.
    Split,
    /// Expert `i` is kept by the ranks of the `i`-th list.
    Map(Arc<[Vec<u32>]>),
}

/// A family of checkpoints with its tensor-parallel cuts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preset {
    family: Family,
    head_dim: Option<u64>,
    vocab_multiple: u64,
    fused: bool,
    experts: Experts,
}

/// What a tensor is to tensor parallelism.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Replicated,
    /// Rows of an embedding or output head.
    Vocab,
    /// Cut along the output features.
    Column,
    /// The same, made of heads; with its position among query, key and value.
    Heads(u32),
    /// The same, gate (0) and up (1) of a gated layer.
    Gate(u32),
    /// Query, key and value in one tensor.
    Qkv,
    /// Gate and up in one tensor, one after the other.
    GateUp,
    /// Cut along the input features.
    Row,
}

impl Preset {
    fn of(family: Family) -> Self {
        let (head_dim, experts) = (None, Experts::Linear);
        Self { family, head_dim, vocab_multiple: 64, fused: false, experts }
    }

    /// Llama, Mistral, Qwen, Gemma, Phi-3 and others with `q_proj` ... `down_proj`; also their GPTQ,
    /// AWQ and FP8 forms.
    #[must_use]
    pub fn llama() -> Self {
        Self::of(Family::Llama)
    }

    /// GPT-2, whose `Conv1D` weights are stored transposed: `[in, out]`.
    #[must_use]
    pub fn gpt2() -> Self {
        Self::of(Family::Gpt2)
    }

    /// Falcon: query, key and value fused, interleaved by group. Set [`head_dim`](Self::head_dim) to
    /// keep groups (40B) or the shared key and value head (7B) whole.
    #[must_use]
    pub fn falcon() -> Self {
        Self::of(Family::Falcon)
    }

    /// Bloom: query, key and value fused, interleaved by head.
    #[must_use]
    pub fn bloom() -> Self {
        Self::of(Family::Bloom)
    }

    /// GPT-NeoX and Pythia: query, key and value fused, interleaved by head.
    #[must_use]
    pub fn gpt_neox() -> Self {
        Self::of(Family::NeoX)
    }

    /// OPT, and other transformers whose layers have `q_proj`, `out_proj`, `fc1` and `fc2`.
    #[must_use]
    pub fn opt() -> Self {
        Self::of(Family::Opt)
    }

    /// Every rank keeps every tensor: for families without cuts here, such as T5, BERT and Mamba.
    #[must_use]
    pub fn replicate() -> Self {
        Self::of(Family::Replicate)
    }

    /// Mixture of experts (Mixtral, Qwen-MoE, DeepSeek): the Llama cuts, and whole experts on ranks.
    #[must_use]
    pub fn moe() -> Self {
        Self::of(Family::Moe)
    }

    /// The preset of that name, one of [`NAMES`](Self::NAMES).
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "llama" => Self::llama(),
            "gpt2" => Self::gpt2(),
            "falcon" => Self::falcon(),
            "bloom" => Self::bloom(),
            "gpt-neox" => Self::gpt_neox(),
            "opt" => Self::opt(),
            "moe" => Self::moe(),
            "replicate" => Self::replicate(),
            _ => return None,
        })
    }

    /// The names that [`named`](Self::named) knows.
    pub const NAMES: [&str; 8] =
        ["llama", "gpt2", "falcon", "bloom", "gpt-neox", "opt", "moe", "replicate"];

    /// This preset's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self.family {
            Family::Llama => "llama",
            Family::Gpt2 => "gpt2",
            Family::Falcon => "falcon",
            Family::Bloom => "bloom",
            Family::NeoX => "gpt-neox",
            Family::Opt => "opt",
            Family::Moe => "moe",
            Family::Replicate => "replicate",
        }
    }

    /// The preset that fits a checkpoint's tensor names, if one does: [`replicate`](Self::replicate)
    /// where the family is known and has no cuts here.
    #[must_use]
    pub fn detect<'a>(names: impl IntoIterator<Item = &'a str>) -> Option<Self> {
        let (mut found, mut separate) = (None, false);
        for name in names {
            let (parent, module, _) = components(name);
            let family = match module {
                _ if expert(name).is_some() || module == "experts" => return Some(Self::moe()),
                "c_attn" => Family::Gpt2,
                "word_embeddings_layernorm" => Family::Bloom,
                "query_key_value" if parent == "self_attention" => match found {
                    Some(Family::Bloom) => continue,
                    _ => Family::Falcon,
                },
                "query_key_value" if parent == "attention" => Family::NeoX,
                // Beside a `q_proj`; alone it is of a family that has its own names for the rest.
                "fc1" | "out_proj" => Family::Opt,
                "q_proj" | "qkv_proj" | "q_b_proj" => Family::Llama,
                // T5, BERT, Mamba.
                "q" if parent == "SelfAttention" => Family::Replicate,
                "query" if parent == "self" => Family::Replicate,
                "in_proj" | "x_proj" if parent == "mixer" => Family::Replicate,
                _ => continue,
            };
            separate |= module == "q_proj";
            found = match (found, family) {
                (Some(Family::Bloom), Family::Falcon) => found,
                (Some(Family::Opt), Family::Llama) => found,
                (Some(found), Family::Opt) if found != Family::Llama => Some(found),
                _ => Some(family),
            };
        }
        found.filter(|family| *family != Family::Opt || separate).map(Self::of)
    }

    /// Elements of an attention head: heads then stay whole, and are shared where there are fewer than
    /// ranks. Of projections that do not divide into such heads there is no plan
    /// ([`ShardError::Unit`](crate::ShardError::Unit)).
    #[must_use]
    pub fn head_dim(mut self, elements: u64) -> Self {
        self.head_dim = Some(elements);
        self
    }

    /// Vocabularies of more rows than this are padded to a multiple of it (64 unless set, as vLLM does).
    #[must_use]
    pub fn vocab_multiple(mut self, rows: u64) -> Self {
        self.vocab_multiple = rows;
        self
    }

    /// Concatenate query, key and value into `qkv_proj` and gate and up into `gate_up_proj`.
    #[must_use]
    pub fn fused(mut self) -> Self {
        self.fused = true;
        self
    }

    /// What becomes of experts.
    #[must_use]
    pub fn experts(mut self, experts: Experts) -> Self {
        self.experts = experts;
        self
    }

    /// The specifications for the tensors of one checkpoint on `world` ranks.
    pub fn rules<'t>(
        &self,
        tensors: impl IntoIterator<Item = &'t TensorDesc>,
        world: u32,
    ) -> PresetRules {
        let count = |name: &str| expert(name).map_or(0, |index| index + 1);
        let experts = tensors.into_iter().map(|tensor| count(&tensor.name)).max().unwrap_or(0);
        PresetRules { preset: self.clone(), experts, world: world.max(1) }
    }
}

/// A [`Preset`] fitted to a checkpoint and a world size.
#[derive(Clone, Debug)]
pub struct PresetRules {
    preset: Preset,
    experts: u64,
    world: u32,
}

impl PresetRules {
    /// The specification of one tensor.
    #[must_use]
    pub fn shard(&self, tensor: &TensorDesc) -> Shard {
        let preset = &self.preset;
        if preset.family == Family::Replicate {
            return Shard::replicate();
        }
        let (parent, module, leaf) = components(&tensor.name);
        if let Some(index) = expert(&tensor.name)
            && preset.experts != Experts::Split
        {
            return self.expert_shard(index);
        }
        if module == "experts" {
            return self.packed_experts(tensor);
        }
        let role = match preset.family {
            Family::Llama | Family::Moe => llama_role(parent, module),
            Family::Gpt2 => gpt2_role(module),
            Family::Falcon | Family::Bloom => falcon_role(module),
            Family::NeoX => neox_role(module),
            Family::Opt => opt_role(module),
            Family::Replicate => Role::Replicated,
        };
        let transposed = preset.family == Family::Gpt2;
        self.cut(tensor, role, leaf, transposed)
    }

    fn expert_shard(&self, index: u64) -> Shard {
        match &self.preset.experts {
            Experts::Map(map) => {
                Shard::keep_on_ranks(map.get(index as usize).into_iter().flatten().copied())
            }
            _ => {
                let block = self.experts.div_ceil(u64::from(self.world)).max(1);
                Shard::keep_on((index / block) as u32)
            }
        }
    }

    /// Experts along the first dimension of one tensor.
    fn packed_experts(&self, tensor: &TensorDesc) -> Shard {
        let Some(&experts) = tensor.shape.first() else {
            return Shard::replicate();
        };
        match &self.preset.experts {
            Experts::Map(map) => {
                let mine = |rank: u32| -> Vec<Range<u64>> {
                    let keeps = |i: &u64| map.get(*i as usize).is_some_and(|r| r.contains(&rank));
                    (0..experts).filter(keeps).map(|i| i..i + 1).collect()
                };
                Shard::ranges(0, (0..self.world).map(mine).collect::<Vec<_>>())
            }
            _ => Shard::split(0),
        }
    }

    fn cut(&self, tensor: &TensorDesc, role: Role, leaf: &str, transposed: bool) -> Shard {
        let preset = &self.preset;
        if role == Role::Vocab {
            return match tensor.shape.first() {
                None => Shard::replicate(),
                // Padding a few rows could make a tensor many times its size.
                Some(&rows) if rows <= preset.vocab_multiple => Split::along(0).into(),
                Some(_) => Shard::vocab_rows(preset.vocab_multiple),
            };
        }
        let Some(dim) = cut_dim(role, leaf, transposed) else {
            return Shard::replicate();
        };
        // Scales and zero points may have one value for the whole tensor, or one along this dimension.
        let Some(&extent) = tensor.shape.get(dim).filter(|&&extent| extent > 1) else {
            return Shard::replicate();
        };
        let split = Split::along(dim);
        // Head sizes are in elements of the weight; packed and block-wise companions have others.
        let plain = leaf == "weight" || leaf == "bias";
        let head = preset.head_dim.filter(|_| plain);
        let sibling = |fused: &str| {
            let prefix = tensor.name.rsplitn(3, '.').nth(2).unwrap_or_default();
            let dot = if prefix.is_empty() { "" } else { "." };
            format!("{prefix}{dot}{fused}.{leaf}")
        };
        match role {
            Role::Heads(position) => {
                let split = head.map_or(split.clone(), |head| split.heads(head));
                match preset.fused {
                    true => split.fused_into(sibling("qkv_proj"), position).into(),
                    false => split.into(),
                }
            }
            Role::Gate(position) if preset.fused => {
                split.fused_into(sibling("gate_up_proj"), position).into()
            }
            Role::GateUp if extent.is_multiple_of(2) => split.sections(2).into(),
            Role::Qkv => self.qkv(tensor, split, extent, head),
            _ => split.into(),
        }
    }

    /// Query, key and value in one tensor, as each family stores them.
    fn qkv(&self, tensor: &TensorDesc, split: Split, extent: u64, head: Option<u64>) -> Shard {
        // Heads of key and value: the output features beyond those of the hidden size.
        let hidden = tensor.shape.iter().copied().filter(|&n| n != extent).max();
        let key_value = match (head, hidden) {
            (Some(head), Some(hidden)) if hidden.is_multiple_of(head) && extent > hidden => {
                let heads = (extent - hidden) / head;
                heads.is_multiple_of(2).then_some((head, hidden, heads / 2))
            }
            _ => None,
        };
        match self.preset.family {
            Family::Gpt2 if extent.is_multiple_of(3) => {
                let split = split.sections(3);
                match head {
                    Some(head) => split.heads(head).into(),
                    None => split.into(),
                }
            }
            Family::Bloom | Family::NeoX => match head {
                Some(head) => split.unit(3 * head).into(),
                None => split.into(),
            },
            Family::Falcon => match key_value {
                Some((head, hidden, 1)) => {
                    split.heads(head).section_sizes([hidden, head, head]).into()
                }
                Some((head, hidden, groups)) if (hidden / head).is_multiple_of(groups) => {
                    split.heads((hidden / head / groups + 2) * head).into()
                }
                _ => split.into(),
            },
            _ => match key_value {
                Some((head, hidden, groups)) => {
                    let side = groups * head;
                    split.heads(head).section_sizes([hidden, side, side]).into()
                }
                None if extent.is_multiple_of(3) => split.sections(3).into(),
                None => split.into(),
            },
        }
    }
}

/// The dimension that a role cuts, given what the tensor is to its layer.
fn cut_dim(role: Role, leaf: &str, transposed: bool) -> Option<usize> {
    let column = !matches!(role, Role::Replicated | Role::Vocab | Role::Row);
    if !column && role != Role::Row {
        return None;
    }
    match leaf {
        "bias" if !column => None,
        "input_scale" | "output_scale" | "activation_scale" => None,
        "bias" => Some(0),
        // GPTQ and AWQ store [in, out], packed along one or the other.
        "qweight" | "qzeros" | "scales" => Some(usize::from(column)),
        "g_idx" => (!column).then_some(0),
        _ => Some(usize::from(column == transposed)),
    }
}

/// The last three components of a name: parent, module, leaf.
fn components(name: &str) -> (&str, &str, &str) {
    let mut parts = name.rsplit('.');
    let leaf = parts.next().unwrap_or_default();
    let module = parts.next().unwrap_or_default();
    (parts.next().unwrap_or_default(), module, leaf)
}

/// The expert that a tensor belongs to, if it is one expert's own.
fn expert(name: &str) -> Option<u64> {
    let (_, rest) = name.split_once(".experts.")?;
    let (index, _) = rest.split_once('.')?;
    index.parse().ok().filter(|&index: &u64| index < 1 << 32)
}

fn llama_role(parent: &str, module: &str) -> Role {
    match module {
        "embed_tokens" | "lm_head" | "tok_embeddings" => Role::Vocab,
        "head" if parent == "shared_head" => Role::Vocab,
        "q_proj" => Role::Heads(0),
        "k_proj" => Role::Heads(1),
        "v_proj" => Role::Heads(2),
        "qkv_proj" => Role::Qkv,
        "gate_up_proj" => Role::GateUp,
        "gate_proj" | "w1" => Role::Gate(0),
        "up_proj" | "w3" => Role::Gate(1),
        // Multi-head latent attention: the small down-projections stay whole.
        "q_b_proj" | "kv_b_proj" => Role::Column,
        "o_proj" | "down_proj" | "w2" => Role::Row,
        _ => Role::Replicated,
    }
}

fn gpt2_role(module: &str) -> Role {
    match module {
        "wte" | "lm_head" => Role::Vocab,
        "c_attn" => Role::Qkv,
        "c_fc" => Role::Column,
        "c_proj" => Role::Row,
        _ => Role::Replicated,
    }
}

fn opt_role(module: &str) -> Role {
    match module {
        "embed_tokens" | "lm_head" => Role::Vocab,
        "q_proj" => Role::Heads(0),
        "k_proj" => Role::Heads(1),
        "v_proj" => Role::Heads(2),
        "fc1" => Role::Column,
        "out_proj" | "fc2" => Role::Row,
        _ => Role::Replicated,
    }
}

fn neox_role(module: &str) -> Role {
    match module {
        "embed_in" | "embed_out" => Role::Vocab,
        other => falcon_role(other),
    }
}

/// Falcon and Bloom use the same names.
fn falcon_role(module: &str) -> Role {
    match module {
        "word_embeddings" | "lm_head" => Role::Vocab,
        "query_key_value" => Role::Qkv,
        "dense_h_to_4h" => Role::Column,
        "dense" | "dense_4h_to_h" => Role::Row,
        _ => Role::Replicated,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, shape: &[u64]) -> TensorDesc {
        let len = shape.iter().product::<u64>() * 2;
        TensorDesc {
            name: name.into(),
            bits: 16,
            shape: shape.into(),
            shard: 0,
            file_range: 0..len,
        }
    }

    fn kept(preset: &Preset, name: &str, shape: &[u64], rank: u32, world: u32) -> Vec<u64> {
        let tensor = tensor(name, shape);
        let shard = preset.rules([&tensor], world).shard(&tensor);
        let part = shard.kept(&tensor, rank, world).unwrap();
        part.map_or(vec![], |part| part.shape)
    }

    #[test]
    fn llama_cuts_columns_and_rows() {
        let llama = Preset::llama();
        let kept = |name: &str, shape: &[u64]| kept(&llama, name, shape, 1, 4);
        assert_eq!(kept("model.layers.3.self_attn.q_proj.weight", &[32, 16]), [8, 16]);
        assert_eq!(kept("model.layers.3.self_attn.q_proj.bias", &[32]), [8]);
        assert_eq!(kept("model.layers.3.self_attn.o_proj.weight", &[32, 16]), [32, 4]);
        assert_eq!(kept("model.layers.3.mlp.down_proj.bias", &[32]), [32]);
        assert_eq!(kept("model.layers.3.mlp.down_proj.weight_scale_inv", &[4, 8]), [4, 2]);
        assert_eq!(kept("model.layers.3.mlp.down_proj.weight_scale", &[32, 1]), [32, 1]);
        assert_eq!(kept("model.layers.3.mlp.up_proj.weight_scale", &[]), Vec::<u64>::new());
        assert_eq!(kept("model.layers.3.mlp.up_proj.qweight", &[16, 32]), [16, 8]);
        assert_eq!(kept("model.layers.3.mlp.down_proj.qweight", &[16, 32]), [4, 32]);
        assert_eq!(kept("model.layers.3.mlp.gate_up_proj.weight", &[32, 16]), [8, 16]);
        assert_eq!(kept("model.layers.3.input_layernorm.weight", &[16]), [16]);
        assert_eq!(kept("model.embed_tokens.weight", &[1000, 16]), [256, 16]);
        assert_eq!(kept("model.embed_tokens.weight", &[8, 16]), [2, 16], "no padding to 64 rows");
    }

    #[test]
    fn gpt2_cuts_transposed_weights() {
        let gpt2 = Preset::gpt2();
        let kept = |name: &str, shape: &[u64]| kept(&gpt2, name, shape, 0, 2);
        assert_eq!(kept("h.0.attn.c_attn.weight", &[16, 48]), [16, 24]);
        assert_eq!(kept("h.0.attn.c_proj.weight", &[16, 16]), [8, 16]);
        assert_eq!(kept("h.0.mlp.c_fc.weight", &[16, 64]), [16, 32]);
        assert_eq!(kept("h.0.mlp.c_proj.bias", &[16]), [16]);
    }

    #[test]
    fn opt_and_neox_cut_columns_and_rows() {
        let opt = |name: &str, shape: &[u64]| kept(&Preset::opt(), name, shape, 1, 2);
        assert_eq!(opt("model.decoder.layers.0.fc1.weight", &[32, 8]), [16, 8]);
        assert_eq!(opt("model.decoder.layers.0.fc1.bias", &[32]), [16]);
        assert_eq!(opt("model.decoder.layers.0.fc2.weight", &[8, 32]), [8, 16]);
        assert_eq!(opt("model.decoder.layers.0.fc2.bias", &[8]), [8]);
        assert_eq!(opt("model.decoder.layers.0.self_attn.out_proj.weight", &[8, 8]), [8, 4]);
        assert_eq!(opt("model.decoder.layers.0.self_attn.q_proj.weight", &[8, 8]), [4, 8]);
        assert_eq!(opt("model.decoder.embed_positions.weight", &[8, 8]), [8, 8]);
        let neox = Preset::gpt_neox().head_dim(4);
        let neox = |name: &str, shape: &[u64]| kept(&neox, name, shape, 0, 2);
        assert_eq!(neox("gpt_neox.layers.0.attention.query_key_value.weight", &[36, 12]), [24, 12]);
        assert_eq!(neox("gpt_neox.layers.0.attention.dense.weight", &[12, 12]), [12, 6]);
        assert_eq!(neox("gpt_neox.embed_in.weight", &[256, 12]), [128, 12]);
    }

    #[test]
    fn falcon_shares_its_key_and_value_head() {
        // As 7B: 71 query heads, one of key, one of value.
        let falcon = Preset::falcon().head_dim(64);
        let name = "transformer.h.0.self_attention.query_key_value.weight";
        assert_eq!(kept(&falcon, name, &[73 * 64, 71 * 64], 0, 8), [(9 + 2) * 64, 71 * 64]);
        assert_eq!(kept(&falcon, name, &[73 * 64, 71 * 64], 7, 8), [(8 + 2) * 64, 71 * 64]);
        // As 40B: 8 groups of 16 + 2 heads.
        assert_eq!(kept(&falcon, name, &[144 * 64, 128 * 64], 3, 4), [36 * 64, 128 * 64]);
    }

    #[test]
    fn experts_go_to_ranks_whole_or_as_mapped() {
        let name = |expert| format!("model.layers.1.mlp.experts.{expert}.down_proj.weight");
        let table: Vec<_> = (0..6).map(|expert| tensor(&name(expert), &[8, 4])).collect();
        let keepers = |preset: &Preset| -> Vec<Vec<u32>> {
            let rules = preset.rules(&table, 4);
            let on = |t: &TensorDesc, r| rules.shard(t).kept(t, r, 4).unwrap().is_some();
            table.iter().map(|t| (0..4).filter(|&r| on(t, r)).collect()).collect()
        };
        let linear: [&[u32]; 6] = [&[0], &[0], &[1], &[1], &[2], &[2]];
        assert_eq!(keepers(&Preset::moe()), linear);
        let map: Vec<Vec<u32>> = vec![vec![3], vec![1, 2], vec![0], vec![], vec![2], vec![1]];
        let mapped = Preset::moe().experts(Experts::Map(map.clone().into()));
        assert_eq!(keepers(&mapped), map);
        let split = Preset::moe().experts(Experts::Split);
        assert_eq!(kept(&split, &name(5), &[8, 4], 3, 4), [8, 1]);
        // One tensor of all experts.
        let packed = tensor("model.layers.1.mlp.experts.gate_up_proj", &[6, 4, 4]);
        let shard = mapped.rules([&packed], 4).shard(&packed);
        assert_eq!(shard.kept(&packed, 2, 4).unwrap().unwrap().ranges, [1..2, 4..5]);
    }

    #[test]
    fn families_are_told_by_their_names() {
        let detect = |names: &[&str]| Preset::detect(names.iter().copied()).map(|p| p.name());
        assert_eq!(detect(&["h.0.attn.c_attn.weight"]), Some("gpt2"));
        assert_eq!(detect(&["model.layers.0.self_attn.q_proj.weight"]), Some("llama"));
        let qkv = "h.0.self_attention.query_key_value.weight";
        assert_eq!(detect(&[qkv]), Some("falcon"));
        assert_eq!(detect(&[qkv, "word_embeddings_layernorm.weight"]), Some("bloom"));
        assert_eq!(detect(&["word_embeddings_layernorm.weight", qkv]), Some("bloom"));
        let expert = "model.layers.0.mlp.experts.3.up_proj.weight";
        assert_eq!(detect(&["model.layers.0.self_attn.q_proj.weight", expert]), Some("moe"));
        assert_eq!(detect(&["foo.weight"]), None);
        let opt = "model.decoder.layers.0.";
        let opt = ["self_attn.q_proj.weight", "self_attn.out_proj.weight", "fc1.weight"]
            .map(|name| format!("{opt}{name}"));
        let [q, out, fc] = &opt;
        for order in [[q, out, fc], [fc, q, out], [out, fc, q]] {
            assert_eq!(detect(&order.map(|name| &name[..])), Some("opt"));
        }
        assert_eq!(detect(&["model.fc1.weight"]), None, "any network may have one");
        let neox = "gpt_neox.layers.0.attention.query_key_value.weight";
        assert_eq!(detect(&[neox]), Some("gpt-neox"));
        let uncut = [
            "encoder.block.0.layer.0.SelfAttention.q.weight",
            "bert.encoder.layer.0.attention.self.query.weight",
            "backbone.layers.0.mixer.in_proj.weight",
        ];
        uncut.iter().for_each(|name| assert_eq!(detect(&[name]), Some("replicate"), "{name}"));
        let mamba = [uncut[2], "backbone.layers.0.mixer.out_proj.weight"];
        assert_eq!(detect(&mamba), Some("replicate"));
    }

    #[test]
    fn fused_projections_share_an_output() {
        let table = [
            tensor("model.layers.0.self_attn.q_proj.weight", &[32, 16]),
            tensor("model.layers.0.self_attn.k_proj.weight", &[8, 16]),
            tensor("model.layers.0.self_attn.v_proj.weight", &[8, 16]),
        ];
        let rules = Preset::llama().fused().head_dim(4).rules(&table, 4);
        let plan = crate::Planner::new(crate::Topology::one_node(4))
            .plan(table, |t| rules.shard(t))
            .unwrap();
        let rank = plan.rank(3);
        assert_eq!(rank.outputs().len(), 1);
        assert_eq!(rank.outputs()[0].name, "model.layers.0.self_attn.qkv_proj.weight");
        assert_eq!(rank.outputs()[0].shape, [8 + 4 + 4, 16]);
    }
}
