//! Presets on small checkpoints of every family: what ranks load together is what the official reader
//! slices.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use fst_dist::{
    Cause, Experts, LocalGroup, Plan, Planner, Preset, ReadInto, Reader, Shard, Split, TensorDesc,
    Topology, load_host,
};
use fst_format::Checkpoint;
use safetensors::slice::IndexOp;
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize_to_file};

/// A family's tensors: names and shapes. Dimensions are such that few world sizes divide them all.
fn model(family: &str) -> Vec<(String, Vec<usize>)> {
    let (hidden, inner, vocab) = (48, 96, 131);
    let mut list: Vec<(String, Vec<usize>)> = Vec::new();
    let mut add = |name: &str, shape: &[usize]| list.push((name.to_owned(), shape.to_vec()));
    for layer in 0..2 {
        let mut layer = |name: &str, shape: &[usize]| match family {
            "gpt2" | "bloom" => add(&format!("h.{layer}.{name}"), shape),
            "falcon" => add(&format!("transformer.h.{layer}.{name}"), shape),
            _ => add(&format!("model.layers.{layer}.{name}"), shape),
        };
        match family {
            "llama" | "moe" => {
                layer("input_layernorm.weight", &[hidden]);
                layer("self_attn.q_proj.weight", &[hidden, hidden]);
                layer("self_attn.q_proj.bias", &[hidden]);
                layer("self_attn.k_proj.weight", &[16, hidden]);
                layer("self_attn.v_proj.weight", &[16, hidden]);
                layer("self_attn.o_proj.weight", &[hidden, hidden]);
            }
            "gpt2" => {
                layer("ln_1.weight", &[hidden]);
                layer("attn.c_attn.weight", &[hidden, 3 * hidden]);
                layer("attn.c_attn.bias", &[3 * hidden]);
                layer("attn.c_proj.weight", &[hidden, hidden]);
                layer("attn.c_proj.bias", &[hidden]);
                layer("mlp.c_fc.weight", &[hidden, inner]);
                layer("mlp.c_fc.bias", &[inner]);
                layer("mlp.c_proj.weight", &[inner, hidden]);
            }
            _ => {
                let rows = if family == "bloom" { 3 * hidden } else { hidden + 2 * 8 };
                layer("self_attention.query_key_value.weight", &[rows, hidden]);
                layer("self_attention.dense.weight", &[hidden, hidden]);
                layer("mlp.dense_h_to_4h.weight", &[inner, hidden]);
                layer("mlp.dense_4h_to_h.weight", &[hidden, inner]);
            }
        }
        match family {
            "llama" => {
                layer("mlp.gate_proj.weight", &[inner, hidden]);
                layer("mlp.up_proj.weight", &[inner, hidden]);
                layer("mlp.down_proj.weight", &[hidden, inner]);
            }
            "moe" => {
                layer("mlp.gate.weight", &[5, hidden]);
                for expert in 0..5 {
                    let name = |part| format!("mlp.experts.{expert}.{part}.weight");
                    layer(&name("gate_proj"), &[inner, hidden]);
                    layer(&name("up_proj"), &[inner, hidden]);
                    layer(&name("down_proj"), &[hidden, inner]);
                }
            }
            _ => {}
        }
    }
    match family {
        "gpt2" => add("wte.weight", &[vocab, hidden]),
        "bloom" => {
            add("word_embeddings_layernorm.weight", &[hidden]);
            add("word_embeddings.weight", &[vocab, hidden]);
        }
        "falcon" => add("transformer.word_embeddings.weight", &[vocab, hidden]),
        _ => {
            add("model.embed_tokens.weight", &[vocab, hidden]);
            add("lm_head.weight", &[vocab, hidden]);
        }
    }
    list
}

/// Writes a model into three files with an index.
fn write(folder: &Path, model: &[(String, Vec<usize>)]) {
    let mut seed = 7u64;
    let mut byte = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 56) as u8
    };
    let mut map = BTreeMap::new();
    for (file, part) in model.chunks(model.len().div_ceil(3)).enumerate() {
        let file = format!("model-{file}.safetensors");
        let data: Vec<(&String, &Vec<usize>, Vec<u8>)> = part
            .iter()
            .map(|(name, shape)| {
                let len = shape.iter().product::<usize>() * 2;
                (name, shape, (0..len).map(|_| byte()).collect())
            })
            .collect();
        let views = data.iter().map(|(name, shape, bytes)| {
            map.insert((*name).clone(), file.clone());
            (*name, TensorView::new(Dtype::BF16, (*shape).clone(), bytes).unwrap())
        });
        serialize_to_file(views.collect::<Vec<_>>(), None, &folder.join(&file)).unwrap();
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": map });
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

struct Files(Vec<File>);

impl Reader for &Files {
    fn read(&self, ranges: &mut [ReadInto<'_>]) -> Result<(), (usize, Cause)> {
        for (index, range) in ranges.iter_mut().enumerate() {
            let file = &self.0[range.shard as usize];
            file.read_exact_at(range.into, range.offset).map_err(|e| (index, e.into()))?;
        }
        Ok(())
    }
}

/// A rank's outputs by name: shape and bytes.
type Kept = BTreeMap<String, (Vec<u64>, Vec<u8>)>;

fn load(plan: &Plan, files: &Files) -> Vec<Kept> {
    std::thread::scope(|scope| {
        let run = |(rank, group): (u32, LocalGroup)| {
            scope.spawn(move || {
                let view = plan.rank(rank);
                let mut outputs: Vec<Vec<u8>> =
                    view.outputs().iter().map(|o| vec![0xEE; o.bytes as usize]).collect();
                let mut slices: Vec<&mut [u8]> = outputs.iter_mut().map(|o| &mut o[..]).collect();
                load_host(&view, &group, files, &mut slices).unwrap();
                let named = view.outputs().iter().zip(outputs);
                named.map(|(o, bytes)| (o.name.to_owned(), (o.shape.clone(), bytes))).collect()
            })
        };
        let threads: Vec<_> = (0..).zip(LocalGroup::host(plan.world())).map(run).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// What the official reader slices: index ranges along a dimension, one after the other.
fn sliced(view: &TensorView<'_>, dim: usize, ranges: &[std::ops::Range<u64>]) -> Vec<u8> {
    let rows: usize = view.shape()[..dim].iter().product();
    let mut bytes = Vec::new();
    // One row at a time, so that the ranges of a row follow one another.
    for row in 0..rows {
        for range in ranges.iter().filter(|range| !range.is_empty()) {
            let (start, end) = (range.start as usize, range.end as usize);
            let slice = match dim {
                0 => view.slice((start..end,)),
                1 => view.slice((row..row + 1, start..end)),
                _ => panic!("matrices at most"),
            };
            slice.unwrap().for_each(|part| bytes.extend_from_slice(part));
        }
    }
    bytes
}

fn check(family: &str, preset: &Preset, worlds: &[u32]) {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &model(family));
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let tensors = TensorDesc::table(&checkpoint);
    let found = Preset::detect(tensors.iter().map(|t| t.name.as_str())).unwrap();
    assert_eq!(found.name(), preset.name());
    let files = Files(checkpoint.shards().iter().map(|s| File::open(s.path()).unwrap()).collect());
    let raw: Vec<Vec<u8>> =
        checkpoint.shards().iter().map(|s| std::fs::read(s.path()).unwrap()).collect();
    let official: Vec<SafeTensors<'_>> =
        raw.iter().map(|bytes| SafeTensors::deserialize(bytes).unwrap()).collect();
    for &world in worlds {
        let rules = preset.rules(&tensors, world);
        let plan = Planner::new(Topology::one_node(world))
            .budget(2 << 20)
            .plan(tensors.clone(), |t| rules.shard(t))
            .unwrap();
        let checkpoint_bytes: u64 = tensors.iter().map(TensorDesc::byte_len).sum();
        let read: u64 = plan.loads().iter().map(|load| load.read()).sum();
        assert!(read <= checkpoint_bytes, "{family} on {world}: read {read}");
        for (rank, outputs) in (0u32..).zip(load(&plan, &files)) {
            let mut names = 0;
            for tensor in &tensors {
                let Some(part) = rules.shard(tensor).kept(tensor, rank, world).unwrap() else {
                    continue;
                };
                names += 1;
                let view = official[tensor.shard as usize].tensor(&tensor.name).unwrap();
                let mut expected = sliced(&view, part.dim, &part.ranges);
                let (shape, bytes) = &outputs[&tensor.name];
                assert_eq!(*shape, part.shape);
                expected.resize(bytes.len().max(expected.len()), 0);
                assert!(*bytes == expected, "{family}, rank {rank} of {world}: {}", tensor.name);
            }
            assert_eq!(names, outputs.len());
        }
    }
}

#[test]
fn llama() {
    check("llama", &Preset::llama(), &[1, 2, 3, 4, 5, 8]);
    check("llama", &Preset::llama().head_dim(8), &[2, 4]);
}

#[test]
fn gpt2() {
    check("gpt2", &Preset::gpt2(), &[1, 2, 3, 5, 8]);
    check("gpt2", &Preset::gpt2().head_dim(8), &[2, 3, 6]);
}

#[test]
fn falcon() {
    check("falcon", &Preset::falcon(), &[2, 3, 4]);
    // One head of key and value, which all ranks keep.
    check("falcon", &Preset::falcon().head_dim(8), &[2, 3, 4]);
}

#[test]
fn bloom() {
    check("bloom", &Preset::bloom(), &[2, 3, 4, 8]);
    check("bloom", &Preset::bloom().head_dim(8), &[2, 3]);
}

#[test]
fn mixture_of_experts() {
    check("moe", &Preset::moe(), &[2, 3, 4, 8]);
    check("moe", &Preset::moe().experts(Experts::Split), &[2, 3]);
    let map: Vec<Vec<u32>> = vec![vec![2], vec![0, 1], vec![1], vec![2], vec![0]];
    check("moe", &Preset::moe().experts(Experts::Map(map.into())), &[3, 4]);
}

/// The files' padding and the fused tensors of several projections.
#[test]
fn fused_projections() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &model("llama"));
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let tensors = TensorDesc::table(&checkpoint);
    let files = Files(checkpoint.shards().iter().map(|s| File::open(s.path()).unwrap()).collect());
    let world = 2;
    // The preset's fusing, and one by hand along the inner dimension.
    let rules = Preset::llama().fused().head_dim(8).rules(&tensors, world);
    let shard = |t: &TensorDesc| match t.name.as_str() {
        "model.layers.0.self_attn.o_proj.weight" => Split::along(1).fused_into("wide", 1).into(),
        "model.layers.0.mlp.down_proj.weight" => Split::along(1).fused_into("wide", 0).into(),
        _ => rules.shard(t),
    };
    let plan = Planner::new(Topology::one_node(world)).plan(tensors.clone(), shard).unwrap();
    let whole = Planner::new(Topology::one_node(1)).plan(tensors, |_| Shard::replicate()).unwrap();
    let whole = load(&whole, &files).remove(0);
    let part = |name: &str, rows: std::ops::Range<usize>, columns: std::ops::Range<usize>| {
        let (shape, bytes) = &whole[name];
        let width = shape[1] as usize * 2;
        let row = |r: usize| bytes[r * width + columns.start * 2..][..columns.len() * 2].to_vec();
        rows.map(row).collect::<Vec<_>>()
    };
    for (rank, outputs) in load(&plan, &files).into_iter().enumerate() {
        let qkv = "model.layers.1.self_attn.qkv_proj.weight";
        let name = |p: &str| format!("model.layers.1.self_attn.{p}_proj.weight");
        let expected = [
            part(&name("q"), rank * 24..(rank + 1) * 24, 0..48),
            part(&name("k"), rank * 8..(rank + 1) * 8, 0..48),
            part(&name("v"), rank * 8..(rank + 1) * 8, 0..48),
        ];
        assert_eq!(outputs[qkv].0, [24 + 8 + 8, 48]);
        assert!(outputs[qkv].1 == expected.concat().concat(), "rank {rank}: {qkv}");
        let down = "model.layers.0.mlp.down_proj.weight";
        let o = "model.layers.0.self_attn.o_proj.weight";
        let down = part(down, 0..48, rank * 48..(rank + 1) * 48);
        let o = part(o, 0..48, rank * 24..(rank + 1) * 24);
        let expected: Vec<u8> =
            down.iter().zip(&o).flat_map(|(a, b)| [&a[..], b].concat()).collect();
        assert_eq!(outputs["wide"].0, [48, 48 + 24]);
        assert!(outputs["wide"].1 == expected, "rank {rank}: wide");
    }
}
