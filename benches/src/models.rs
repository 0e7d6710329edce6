//! Checkpoints that the tables of published models do not have, and the cuts of those that they do.

use fst::Dtype;
use fst_cli::models::{Model, ShardSpec, TensorSpec};
use fst_cli::synth::Recipe;

/// A published model in bf16, cut to `layers`, its dimensions divided by `shrink`, in `files` files.
/// Empty where there is no such model or cut, which a test of the workloads would see.
#[must_use]
pub fn cut(model: &str, layers: usize, shrink: usize, files: usize) -> Vec<ShardSpec> {
    let recipe = |model| Recipe::new(model).layers(layers).shrink(shrink).shards(files);
    plan(Model::find(model).map(|model| recipe(model).dtype(Dtype::BF16)))
}

/// A published model as it is.
#[must_use]
pub fn published(model: &str) -> Vec<ShardSpec> {
    plan(Model::find(model).map(Recipe::new))
}

fn plan(recipe: Option<Recipe>) -> Vec<ShardSpec> {
    recipe.and_then(|recipe| recipe.plan().ok()).unwrap_or_default()
}

fn one_file(tensors: Vec<TensorSpec>) -> Vec<ShardSpec> {
    vec![ShardSpec { file_name: "model.safetensors".into(), tensors }]
}

fn bf16(name: impl Into<String>, shape: &[usize]) -> TensorSpec {
    TensorSpec { name: name.into(), dtype: Dtype::BF16, shape: shape.to_vec() }
}

/// `count` small tensors, named as experts are: what a header parser has to cope with.
#[must_use]
pub fn many(count: usize) -> Vec<ShardSpec> {
    let name = |i: usize| {
        let (layer, expert) = (i / 1024, i % 1024);
        format!("model.layers.{layer}.mlp.experts.{expert}.up_proj.weight")
    };
    one_file((0..count).map(|i| bf16(name(i), &[64, 32])).collect())
}

/// A few tensors of awkward sizes: odd, empty, scalar, unaligned in the file.
#[must_use]
pub fn odd() -> Vec<ShardSpec> {
    one_file(vec![
        bf16("odd.matrix", &[1023, 511]),
        bf16("odd.vector", &[3]),
        bf16("empty", &[0, 4]),
        bf16("scalar", &[]),
        bf16("large", &[3, 700_001]),
        bf16("cube", &[5, 7, 9]),
    ])
}
