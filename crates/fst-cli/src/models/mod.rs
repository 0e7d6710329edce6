//! The published checkpoints that `fst synth` imitates, as pure tables: which tensors, of which shape
//! and dtype, in which order, in which files.
//!
//! A [`Model`] lists its tensors in *state-dict order* (the order of the modules in the model's code),
//! because that is the order in which checkpoints are cut into shards. Inside a file the official
//! writer orders tensors differently, see [`ShardSpec`].
//!
//! # What is verified and what is derived
//!
//! | model | names, shapes, dtypes | cut into files |
//! |---|---|---|
//! | `gpt2` | tensor count (160), data size (548,090,880 bytes) and `F32` as published; no `transformer.` prefix; mask buffers `h.N.attn.bias` included | one file, as published; the order inside the published file is that of an old writer (random), ours is that of the current one |
//! | `llama-2-7b` | `total_size` of the published index (13,476,835,328), which holds only with an `F16` `rotary_emb.inv_freq` per layer | two files as published; size of the second to the byte; that of the first follows from the rule |
//! | `llama-2-13b` | configuration; `inv_freq` as `F32`, as in the 70b one | derived: 10 GB rule, three files as published |
//! | `llama-2-70b` | `total_size` of a published index (137,953,316,864), which holds only with an `F32` `inv_freq` | 10 GB rule; 15 files, and their borders as in the index of a published fine-tune |
//! | `falcon-40b` | names and `total_size` (83,671,941,120) of the published index, that of its PyTorch files | 10 GB rule; 9 files and their borders as in that index |
//! | `bloom-176b` | names and `total_size` (352,494,542,848) of the published index | one file per layer, names with an underscore, as published |
//! | `qwen3-30b-a3b` | tensor count (18,867) and `total_size` (61,064,245,248) as published | sizes of all 16 published files, to the byte |
//! | `deepseek-v3` | names, shapes, dtypes and count (91,991) from a listing of the published files | derived: the published cut follows the vendor's own converter; ours fills files in order up to 4.27 GB, which gives as many (163) with other borders |
//!
//! The tests of this module check these figures.

mod bloom;
mod deepseek;
mod falcon;
mod gpt2;
mod llama;
mod qwen3_moe;
mod shard;

use fst::Dtype;

pub use shard::{ShardError, ShardRule, ShardSpec};

/// One tensor of a model: what its checkpoint says about it, without any data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// The name in the published checkpoint.
    pub name: String,
    /// The dtype in the published checkpoint.
    pub dtype: Dtype,
    /// The shape in the published checkpoint; empty for a scalar.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// The number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&dim| dim as u64).product()
    }

    /// The number of bytes in the file, rounded up where elements are smaller than a byte.
    pub fn bytes(&self) -> u64 {
        (self.elements() * self.dtype.bits() as u64).div_ceil(8)
    }
}

/// The decoder blocks of a model and what stands before and after them.
///
/// `layer` builds the tensors of one block; it is called for the blocks that are kept.
struct Layout {
    before: fn(&mut Block<'_>),
    layer: fn(&mut Block<'_>, usize),
    after: fn(&mut Block<'_>),
    /// Appended only when no layer was cut: parts that continue the numbering of the layers.
    tail: Option<fn(&mut Block<'_>)>,
}

/// A published model whose checkpoint `fst synth` can imitate.
pub struct Model {
    name: &'static str,
    aliases: &'static [&'static str],
    hub_name: &'static str,
    layers: usize,
    layout: Layout,
    rule: ShardRule,
    file_names: shard::FileNames,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model").field("name", &self.name).field("layers", &self.layers).finish()
    }
}

/// Every model, smallest first.
pub const MODELS: &[Model] = &[
    gpt2::GPT2,
    llama::LLAMA_2_7B,
    llama::LLAMA_2_13B,
    qwen3_moe::QWEN3_30B_A3B,
    falcon::FALCON_40B,
    llama::LLAMA_2_70B,
    bloom::BLOOM_176B,
    deepseek::DEEPSEEK_V3,
];

impl Model {
    /// The model of this name or alias, compared without regard to case.
    pub fn find(name: &str) -> Option<&'static Model> {
        MODELS.iter().find(|model| {
            let names = [model.name, model.hub_name];
            names.iter().chain(model.aliases).any(|known| known.eq_ignore_ascii_case(name))
        })
    }

    /// The name `fst synth --model` takes.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Other names of the model.
    pub fn aliases(&self) -> &'static [&'static str] {
        self.aliases
    }

    /// Where the imitated checkpoint is published: `owner/name` on the Hugging Face hub.
    pub fn hub_name(&self) -> &'static str {
        self.hub_name
    }

    /// The number of decoder layers.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// How the published checkpoint is cut into files.
    pub fn shard_rule(&self) -> ShardRule {
        self.rule
    }

    /// All tensors, in state-dict order.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        self.first_layers(self.layers)
    }

    /// The tensors of the model cut to its first `layers` decoder layers, in state-dict order.
    ///
    /// Embeddings, the final norm and the head stay. More layers than the model has are its own.
    pub fn first_layers(&self, layers: usize) -> Vec<TensorSpec> {
        let mut tensors = Vec::new();
        (self.layout.before)(&mut Block { prefix: String::new(), tensors: &mut tensors });
        for index in 0..layers.min(self.layers) {
            let mut block = Block { prefix: String::new(), tensors: &mut tensors };
            (self.layout.layer)(&mut block, index);
        }
        (self.layout.after)(&mut Block { prefix: String::new(), tensors: &mut tensors });
        if let Some(tail) = self.layout.tail.filter(|_| layers >= self.layers) {
            tail(&mut Block { prefix: String::new(), tensors: &mut tensors });
        }
        tensors
    }

    /// Cuts `tensors` into files by `rule` and names the files as this model's checkpoint does.
    pub fn shards(
        &self,
        tensors: Vec<TensorSpec>,
        rule: ShardRule,
    ) -> Result<Vec<ShardSpec>, ShardError> {
        shard::cut(tensors, rule, self.file_names)
    }
}

/// Collects the tensors of one part of a model under a common prefix.
struct Block<'a> {
    prefix: String,
    tensors: &'a mut Vec<TensorSpec>,
}

impl Block<'_> {
    fn push(&mut self, name: &str, dtype: Dtype, shape: &[usize]) {
        self.tensors.push(TensorSpec {
            name: format!("{}{name}", self.prefix),
            dtype,
            shape: shape.to_vec(),
        });
    }

    /// A part of this block: its tensors' names start with `prefix` as well.
    fn part(&mut self, prefix: &str) -> Block<'_> {
        Block { prefix: format!("{}{prefix}", self.prefix), tensors: self.tensors }
    }
}

#[cfg(test)]
mod tests;
