//! Checks the tables against what is known of the published checkpoints.

use super::*;

fn model(name: &str) -> &'static Model {
    Model::find(name).unwrap()
}

fn total(tensors: &[TensorSpec]) -> u64 {
    tensors.iter().map(TensorSpec::bytes).sum()
}

/// Size of the file that the official writer makes of a shard with the usual metadata.
fn published_file_size(shard: &ShardSpec) -> u64 {
    let mut header = String::from(r#"{"__metadata__":{"format":"pt"}"#);
    let mut offset = 0;
    for TensorSpec { name, dtype, shape } in &shard.tensors {
        let bits: u64 = shape.iter().map(|&d| d as u64).product::<u64>() * u64::from(dtype.bits());
        let end = offset + bits / 8;
        let shape = shape.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
        header += &format!(
            r#","{name}":{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{offset},{end}]}}"#
        );
        offset = end;
    }
    header.push('}');
    8 + (header.len() as u64).next_multiple_of(8) + offset
}

fn published_sizes(model: &Model) -> Vec<u64> {
    let shards = model.shards(model.tensors(), model.shard_rule()).unwrap();
    shards.iter().map(published_file_size).collect()
}

/// Which file holds a tensor, counted from 1 as in file names.
fn file_of(shards: &[ShardSpec], name: &str) -> usize {
    1 + shards.iter().position(|s| s.tensors.iter().any(|t| t.name == name)).unwrap()
}

#[test]
fn totals_are_those_of_the_published_checkpoints() {
    for (name, tensors, bytes) in [
        ("gpt2", 160, 548_090_880),
        ("llama-2-7b", 323, 13_476_835_328),
        ("llama-2-13b", 403, 26_031_738_880),
        ("llama-2-70b", 803, 137_953_316_864),
        ("falcon-40b", 484, 83_671_941_120),
        ("bloom-176b", 845, 352_494_542_848),
        ("qwen3-30b-a3b", 18_867, 61_064_245_248),
    ] {
        let list = model(name).tensors();
        assert_eq!((list.len(), total(&list)), (tensors, bytes), "{name}");
    }
    let deepseek = model("deepseek-v3").tensors();
    assert_eq!(deepseek.len(), 91_991);
    let parameters: u64 = deepseek.iter().map(TensorSpec::elements).sum();
    // The listing rounds to thousands.
    assert_eq!(parameters / 1000, 684_531_386);
}

#[test]
fn file_sizes_are_those_of_the_published_checkpoints() {
    let llama = published_sizes(model("llama-2-7b"));
    assert_eq!((llama.len(), llama[1]), (2, 3_500_296_424));
    let qwen = [
        3_999_417_504,
        3_999_974_192,
        3_997_360_832,
        3_999_975_056,
        3_999_975_400,
        3_999_975_400,
        3_999_975_472,
        3_997_362_064,
        3_999_975_408,
        3_999_975_400,
        3_999_975_408,
        3_987_400_496,
        3_997_353_632,
        3_999_975_400,
        3_999_975_400,
        1_087_928_584,
    ];
    assert_eq!(published_sizes(model("qwen3-30b-a3b")), qwen);
}

#[test]
fn files_begin_where_the_published_ones_do() {
    for (name, files) in [
        ("gpt2", 1),
        ("llama-2-13b", 3),
        ("llama-2-70b", 15),
        ("falcon-40b", 9),
        ("bloom", 72),
        ("deepseek-v3", 163),
    ] {
        let model = model(name);
        assert_eq!(
            model.shards(model.tensors(), model.shard_rule()).unwrap().len(),
            files,
            "{name}"
        );
    }
    let falcon = model("falcon-40b");
    let shards = falcon.shards(falcon.tensors(), falcon.shard_rule()).unwrap();
    for (name, file) in [
        ("transformer.h.10.ln_attn.bias", 2),
        ("transformer.h.13.self_attention.dense.weight", 2),
        ("transformer.h.13.mlp.dense_h_to_4h.weight", 3),
        ("transformer.h.20.ln_mlp.weight", 3),
        ("transformer.h.20.mlp.dense_h_to_4h.weight", 4),
        ("transformer.h.27.self_attention.dense.weight", 4),
        ("transformer.h.27.mlp.dense_h_to_4h.weight", 5),
        ("lm_head.weight", 9),
    ] {
        assert_eq!(file_of(&shards, name), file, "{name}");
    }
    let llama = model("llama-2-70b");
    let shards = llama.shards(llama.tensors(), llama.shard_rule()).unwrap();
    for (name, file) in [
        ("model.layers.5.mlp.gate_proj.weight", 1),
        ("model.layers.5.mlp.up_proj.weight", 2),
        ("model.layers.11.self_attn.o_proj.weight", 2),
        ("model.layers.11.mlp.gate_proj.weight", 3),
        ("model.layers.17.self_attn.q_proj.weight", 4),
        ("model.layers.22.mlp.up_proj.weight", 4),
    ] {
        assert_eq!(file_of(&shards, name), file, "{name}");
    }
    let bloom = model("bloom-176b");
    let shards = bloom.shards(bloom.tensors(), bloom.shard_rule()).unwrap();
    for (name, file) in
        [("word_embeddings.weight", 1), ("h.0.mlp.dense_h_to_4h.bias", 2), ("ln_f.bias", 72)]
    {
        assert_eq!(file_of(&shards, name), file, "{name}");
    }
    assert_eq!(shards[71].file_name, "model_00072-of-00072.safetensors");
}

#[test]
fn cutting_layers_keeps_both_ends() {
    for model in MODELS {
        let all = model.tensors();
        let none = model.first_layers(0);
        let one = model.first_layers(1);
        assert!(none.len() < one.len() && one.len() < all.len());
        assert!(one.iter().all(|tensor| all.contains(tensor)), "{}", model.name());
        assert_eq!(model.first_layers(usize::MAX), all);
    }
}

#[test]
fn names_are_unique_and_models_are_found_by_every_name() {
    for model in MODELS {
        let mut names: Vec<String> = model.tensors().into_iter().map(|t| t.name).collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count, "{}", model.name());
        for name in model.aliases().iter().chain([&model.name(), &model.hub_name()]) {
            assert_eq!(Model::find(&name.to_uppercase()).unwrap().name(), model.name());
        }
    }
    assert!(Model::find("gpt-5").is_none());
}

#[test]
fn an_even_cut_is_even_and_keeps_everything() {
    let model = model("llama-2-7b");
    let tensors = model.tensors();
    for count in [1, 2, 3, 7, 64, tensors.len()] {
        let shards = model.shards(tensors.clone(), ShardRule::Count(count)).unwrap();
        assert_eq!(shards.len(), count);
        assert!(shards.iter().all(|shard| !shard.tensors.is_empty()));
        assert_eq!(shards.iter().map(|s| s.tensors.len()).sum::<usize>(), tensors.len());
        let largest = tensors.iter().map(TensorSpec::bytes).max().unwrap();
        let mean = total(&tensors) / count as u64;
        let spread = shards.iter().map(|s| s.bytes().abs_diff(mean)).max().unwrap();
        assert!(spread <= largest, "{count} files: {spread} bytes off the mean");
    }
    assert_eq!(model.shards(tensors.clone(), ShardRule::Count(0)), Err(ShardError::NoFiles));
    assert_eq!(
        model.shards(tensors, ShardRule::Count(1000)),
        Err(ShardError::TooManyFiles { files: 1000, tensors: 323 })
    );
}

#[test]
fn files_are_ordered_as_the_official_writer_orders_them() {
    let shards =
        model("deepseek-v3").shards(model("deepseek-v3").first_layers(1), ShardRule::Single);
    let shard = &shards.unwrap()[0];
    assert_eq!(shard.tensors[0].dtype, Dtype::F32);
    assert_eq!(shard.tensors.last().unwrap().dtype, Dtype::F8E4M3);
    assert!(
        shard
            .tensors
            .is_sorted_by(|a, b| { a.dtype > b.dtype || (a.dtype == b.dtype && a.name < b.name) })
    );
}
