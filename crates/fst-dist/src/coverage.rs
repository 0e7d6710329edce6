//! How much of a checkpoint a preset knows: one of another family replicates nearly everything.

use crate::preset::Preset;
use crate::shard::Shard;
use crate::tensor::TensorDesc;

/// How many of a checkpoint's bytes a [`Preset`] cuts, or deals out to ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Coverage {
    /// Bytes of the tensors that not every rank keeps whole.
    pub cut_bytes: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
}

impl Coverage {
    /// The share of the bytes that are cut, from 0 to 1. Presets cut nearly all of the checkpoints that
    /// they are for.
    #[must_use]
    pub fn fraction(&self) -> f64 {
        if self.bytes == 0 { 1.0 } else { self.cut_bytes as f64 / self.bytes as f64 }
    }
}

impl Preset {
    /// How much of a checkpoint's tensors the preset cuts for more than one rank.
    #[must_use]
    pub fn coverage(&self, tensors: &[TensorDesc]) -> Coverage {
        let rules = self.rules(tensors, 2);
        let add = |sum: Coverage, tensor: &TensorDesc| {
            let bytes = tensor.byte_len();
            let cut = rules.shard(tensor) != Shard::replicate();
            Coverage {
                cut_bytes: sum.cut_bytes + if cut { bytes } else { 0 },
                bytes: sum.bytes + bytes,
            }
        };
        tensors.iter().fold(Coverage::default(), add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_cut_the_checkpoints_that_they_are_for() {
        let tensor = |(name, shape): (&str, &[u64])| TensorDesc {
            name: name.into(),
            bits: 8,
            shape: shape.into(),
            shard: 0,
            file_range: 0..shape.iter().product(),
        };
        let llama: Vec<TensorDesc> = [
            ("model.layers.0.self_attn.q_proj.weight", &[20, 20][..]),
            ("model.layers.0.mlp.down_proj.weight", &[20, 30]),
            ("model.layers.0.input_layernorm.weight", &[20]),
            ("lm_head.weight", &[10, 20]),
        ]
        .map(tensor)
        .into();
        assert_eq!(Preset::llama().coverage(&llama), Coverage { cut_bytes: 1200, bytes: 1220 });
        assert_eq!(Preset::gpt2().coverage(&llama), Coverage { cut_bytes: 200, bytes: 1220 });
        let expert = [tensor(("model.layers.0.mlp.experts.1.up_proj.weight", &[4, 4]))];
        assert_eq!(Preset::moe().coverage(&expert).fraction(), 1.0);
        assert_eq!(Preset::moe().coverage(&[]).fraction(), 1.0);
    }
}
