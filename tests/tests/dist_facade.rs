//! Loads by several ranks in host memory, against slices of what the official reader gives.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod dist_support;

use std::collections::BTreeMap;

use dist_support::{
    ByName, FAMILIES, LONG, Values, assert_little_moves, assert_same, expected, load, official,
    pick, synth, values,
};
use fst::{
    Checkpoint, DistError, Dtype, Engine, Error, Loader, LocalGroup, Preset, Shard, Split, Topology,
};

const WORLDS: [u32; 5] = [1, 2, 3, 4, 8];

#[test]
fn presets_keep_what_slices_of_the_official_reader_hold() {
    for (model, family, layers, shrink) in FAMILIES {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        synth(&path, model, |recipe| recipe.layers(layers).shrink(shrink).shards(2));
        let all = official(&path);
        let names: Vec<&str> = all.keys().map(String::as_str).collect();
        let preset = Preset::detect(names).unwrap();
        assert_eq!(preset.name(), family);
        for world in WORLDS {
            let loader = |_| Loader::new().preset(preset.clone());
            let results = load(world, LONG, loader, |_| Checkpoint::open(&path).unwrap());
            for (rank, result) in results.into_iter().enumerate() {
                let tensors = result.unwrap();
                let what = format!("{model}, rank {rank} of {world}");
                let expected = expected(family, &all, rank, world as usize);
                assert_same(&values(&tensors), &expected, &what);
                let report = tensors.report().rank.unwrap();
                assert_eq!((report.rank, report.world), (rank as u32, world));
            }
        }
    }
}

/// Enough bytes for reads in place, several units of exchange and edges of all kinds.
fn larger(folder: &std::path::Path) -> ByName {
    synth(folder, "llama-2-7b", |recipe| recipe.layers(1).shrink(4).shards(3));
    official(folder)
}

#[test]
fn each_engine_and_staging_gives_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    let all = larger(&path);
    let world = 3;
    let expected: Vec<_> = (0..world).map(|rank| expected("llama", &all, rank, world)).collect();
    for engine in [Engine::Auto, Engine::Pread, Engine::Mmap] {
        for staging in [8 << 20, 64 << 20] {
            let loader = |_| Loader::new().engine(engine).preset(Preset::llama()).staging(staging);
            let results = load(world as u32, LONG, loader, |_| Checkpoint::open(&path).unwrap());
            for (rank, result) in results.into_iter().enumerate() {
                let what = format!("{engine}, {staging} bytes of staging, rank {rank}");
                assert_same(&values(&result.unwrap()), &expected[rank], &what);
            }
        }
    }
}

#[test]
fn nothing_is_read_twice_and_nobody_receives_what_it_drops() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    let all = larger(&path);
    let results = load(
        4,
        LONG,
        |_| Loader::new().preset(Preset::llama()),
        |_| Checkpoint::open(&path).unwrap(),
    );
    let results: Vec<_> = results.into_iter().map(Result::unwrap).collect();
    assert_eq!(results.len(), 4);
    assert_little_moves(&results, "llama", &all);
}

#[test]
fn projections_are_fused_under_their_own_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    synth(&path, "llama-2-7b", |recipe| recipe.layers(1).shrink(37).shards(2));
    let all = official(&path);
    let fuse = |parts: &[&Values]| {
        let mut shape = parts[0].shape.clone();
        shape[0] = parts.iter().map(|part| part.shape[0]).sum();
        let bytes = parts.iter().flat_map(|part| part.bytes.iter().copied()).collect();
        Values { dtype: parts[0].dtype.clone(), shape, bytes }
    };
    for world in [1, 3, 4] {
        let results = load(
            world,
            LONG,
            |_| Loader::new().preset(Preset::llama().fused()),
            |_| Checkpoint::open(&path).unwrap(),
        );
        for (rank, result) in results.into_iter().enumerate() {
            let mut expected = expected("llama", &all, rank, world as usize);
            for (into, parts) in [
                (
                    "self_attn.qkv_proj",
                    &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"][..],
                ),
                ("mlp.gate_up_proj", &["mlp.gate_proj", "mlp.up_proj"]),
            ] {
                let name = |module: &str| format!("model.layers.0.{module}.weight");
                let parts: Vec<Values> =
                    parts.iter().map(|part| expected.remove(&name(part)).unwrap()).collect();
                expected.insert(name(into), fuse(&parts.iter().collect::<Vec<_>>()));
            }
            assert_same(&values(&result.unwrap()), &expected, &format!("rank {rank} of {world}"));
        }
    }
}

#[test]
fn shards_are_converted_where_they_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    synth(&path, "llama-2-7b", |recipe| recipe.layers(1).shrink(37).shards(2).dtype(Dtype::BF16));
    // Every bfloat16 is the upper half of a float.
    let widen = |tensor: Values| match tensor.dtype.as_str() {
        "BF16" => {
            let widened = tensor.bytes.chunks_exact(2).flat_map(|b| [0, 0, b[0], b[1]]).collect();
            Values { dtype: "F32".to_owned(), shape: tensor.shape, bytes: widened }
        }
        _ => tensor,
    };
    let all = official(&path);
    for world in [1, 3] {
        let results = load(
            world,
            LONG,
            |_| Loader::new().preset(Preset::llama()).dtype(Dtype::F32),
            |_| Checkpoint::open(&path).unwrap(),
        );
        for (rank, result) in results.into_iter().enumerate() {
            let expected = expected("llama", &all, rank, world as usize);
            let expected = expected.into_iter().map(|(name, t)| (name, widen(t))).collect();
            assert_same(&values(&result.unwrap()), &expected, &format!("rank {rank} of {world}"));
        }
    }
}

#[test]
fn closures_say_what_ranks_keep_of_a_selection() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    synth(&path, "gpt2", |recipe| recipe.layers(2).shrink(12));
    let all = official(&path);
    let loader = |_| {
        Loader::new().select("h.1.*").shard(|tensor| match tensor.name() {
            "h.1.mlp.c_fc.weight" => Split::along(1).remainder(fst::Remainder::Balanced).into(),
            "h.1.mlp.c_proj.weight" => {
                Shard::ranges(0, vec![vec![7..9, 0..3], vec![], vec![100..101]])
            }
            "h.1.ln_1.weight" => Shard::keep_on(2),
            "h.1.ln_1.bias" => Shard::skip(),
            _ => Shard::replicate(),
        })
    };
    let results = load(3, LONG, loader, |_| Checkpoint::open(&path).unwrap());
    for (rank, result) in results.into_iter().enumerate() {
        let mut expected: BTreeMap<_, _> = all
            .iter()
            .filter(|(name, _)| name.starts_with("h.1."))
            .map(|(name, tensor)| (name.clone(), tensor.clone()))
            .collect();
        expected.remove("h.1.ln_1.bias");
        if rank != 2 {
            expected.remove("h.1.ln_1.weight");
        }
        let mut cut = |name: &str, dim: usize, indices: Vec<usize>| {
            let indices: Vec<_> = indices.into_iter().map(Some).collect();
            let tensor = pick(&all[name], dim, &indices);
            expected.insert(name.to_owned(), tensor);
        };
        let n = all["h.1.mlp.c_fc.weight"].shape[1];
        let start = |rank: usize| rank * (n / 3) + rank.min(n % 3);
        cut("h.1.mlp.c_fc.weight", 1, (start(rank)..start(rank + 1)).collect());
        let picked = [vec![7, 8, 0, 1, 2], vec![], vec![100]];
        cut("h.1.mlp.c_proj.weight", 0, picked[rank].clone());
        if picked[rank].is_empty() {
            expected.remove("h.1.mlp.c_proj.weight");
        }
        assert_same(&values(&result.unwrap()), &expected, &format!("rank {rank}"));
    }
}

#[test]
fn a_rank_opens_only_the_files_that_it_reads() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    synth(&path, "llama-2-7b", |recipe| recipe.layers(1).shrink(37).shards(4));
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.shards().len(), 4);
    // Each rank keeps what is in a file of its own; nobody what is in the last one.
    let loader = Loader::new().shard(|tensor| match tensor.shard() {
        3 => Shard::skip(),
        shard => Shard::keep_on(shard as u32),
    });
    let plan = loader.clone().topology(Topology::one_node(4)).rank_plan(&checkpoint).unwrap();
    let path = |shard: u32| checkpoint.shards()[shard as usize].path().to_owned();
    let results = load(4, LONG, |_| loader.clone(), |_| checkpoint.clone());
    let mut opened = 0;
    for (rank, result) in (0..).zip(results) {
        let tensors = result.unwrap();
        let files = &tensors.report().files;
        let read: Vec<_> = plan.rank(rank).shards().into_iter().map(path).collect();
        assert_eq!(*files, read, "rank {rank}");
        assert!(!files.contains(&path(3)), "rank {rank}");
        opened += files.len();
    }
    // Before, every rank opened the three of which somebody keeps a part, and the fourth.
    assert!((3..9).contains(&opened), "{opened}");
}

#[test]
fn tensors_outlive_ranks_and_without_a_rule_all_is_replicated() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    synth(&path, "gpt2", |recipe| recipe.layers(1).shrink(12));
    let all = official(&path);
    let results = load(2, LONG, |_| Loader::new(), |_| Checkpoint::open(&path).unwrap());
    std::fs::remove_dir_all(&path).unwrap();
    for result in results {
        assert_same(&values(&result.unwrap()), &all, "replicated");
    }
}

#[test]
fn plans_can_be_looked_at_without_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    synth(&path, "llama-2-7b", |recipe| recipe.layers(1).shrink(37));
    let checkpoint = Checkpoint::open(&path).unwrap();
    let loader = Loader::new().preset(Preset::llama());
    let plan = loader.clone().topology(Topology::one_node(8)).rank_plan(&checkpoint).unwrap();
    assert_eq!(plan.world(), 8);
    assert_eq!(plan.checkpoint_bytes(), checkpoint.byte_len());
    let error = loader.rank_plan(&checkpoint).unwrap_err();
    assert!(matches!(error, Error::Dist(DistError::NoGroup)), "{error}");
}

#[test]
fn requests_that_ranks_cannot_serve_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    synth(&path, "gpt2", |recipe| recipe.layers(1).shrink(12));
    let checkpoint = Checkpoint::open(&path).unwrap();
    let group = || std::sync::Arc::new(LocalGroup::host(1).remove(0));
    let dist = |error: Error| match error {
        Error::Dist(error) => error,
        error => panic!("{error}"),
    };
    let error = Loader::new().preset(Preset::gpt2()).load(&checkpoint).unwrap_err();
    assert!(matches!(dist(error), DistError::NoGroup));
    let loader = Loader::new().group(group());
    let budget = loader.memory_budget(1 << 30);
    assert!(matches!(dist(budget.stream(&checkpoint).unwrap_err()), DistError::LoadOnly { .. }));
    let sliced = Loader::new().group(group()).slice("wte.weight", 0, 0..1);
    assert!(matches!(dist(sliced.load(&checkpoint).unwrap_err()), DistError::Sliced { .. }));
    let world = Loader::new().group(group()).topology(Topology::one_node(2));
    let error = dist(world.load(&checkpoint).unwrap_err());
    assert!(matches!(error, DistError::World { topology: 2, group: 1 }));
    let wrong = Loader::new().group(group()).shard(|_| Shard::split(7));
    let error = wrong.load(&checkpoint).unwrap_err().to_string();
    assert!(error.contains("dimension 7"), "{error}");
}
