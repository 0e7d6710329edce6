//! `VarBuilder`s, tensor by tensor, against candle's own.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Error};
use candle_nn::VarBuilder;
use candle_nn::var_builder::{Shard, ShardedSafeTensors};
use fst::Dtype;
use fst_candle::{Repeats, Weights};
use support::{Given, address, assert_same, given, plain, write_file, write_shards};

const CPU: Device = Device::Cpu;

/// Every type that candle has, scalars, empty tensors, small and large ones.
fn tensors() -> Vec<Given> {
    let mut all = Vec::new();
    for dtype in [
        Dtype::U8,
        Dtype::U16,
        Dtype::U32,
        Dtype::I16,
        Dtype::I32,
        Dtype::I64,
        Dtype::BF16,
        Dtype::F16,
        Dtype::F32,
        Dtype::F64,
        Dtype::F8E4M3,
        Dtype::F6E2M3,
        Dtype::F6E3M2,
        Dtype::F4,
        Dtype::F8E8M0,
    ] {
        all.push(given(&format!("{dtype}.some"), dtype, &[3, 8, 4]));
        all.push(given(&format!("{dtype}.none"), dtype, &[4, 0, 8]));
        if dtype.bits() >= 8 {
            all.push(given(&format!("{dtype}.scalar"), dtype, &[]));
            all.push(given(&format!("{dtype}.odd"), dtype, &[3, 7, 5]));
        }
        all.push(given(&format!("{dtype}.large"), dtype, &[1200, 1000]));
    }
    all
}

/// The same tensors as one file and as three.
fn checkpoints(folder: &Path) -> Vec<Vec<PathBuf>> {
    let all = tensors();
    let one = folder.join("one.safetensors");
    write_file(&one, &all);
    let many = folder.join("many");
    std::fs::create_dir(&many).unwrap();
    let mut shards = vec![Vec::new(); 3];
    for (index, tensor) in all.into_iter().enumerate() {
        shards[index % 3].push(tensor);
    }
    vec![vec![one], write_shards(&many, &shards)]
}

fn candles(paths: &[PathBuf], dtype: DType) -> VarBuilder<'static> {
    // SAFETY: nobody changes the files.
    unsafe { VarBuilder::from_mmaped_safetensors(paths, dtype, &CPU).unwrap() }
}

#[test]
fn every_tensor_is_what_candle_loads() {
    let folder = tempfile::tempdir().unwrap();
    for paths in checkpoints(folder.path()) {
        let all = fst_candle::load(&paths, &CPU).unwrap();
        let mut expected = std::collections::HashMap::new();
        for path in &paths {
            expected.extend(candle_core::safetensors::load(path, &CPU).unwrap());
        }
        assert_eq!(all.len(), expected.len());
        for (name, tensor) in &expected {
            assert_same(&all[name], tensor, name);
        }
        for dtype in [DType::F32, DType::BF16] {
            let ours = fst_candle::var_builder(&paths, dtype, &CPU).unwrap();
            let theirs = candles(&paths, dtype);
            for tensor in tensors() {
                let name = &tensor.0;
                match theirs.get(tensor.2.clone(), name) {
                    Ok(theirs) => assert_same(&ours.get(tensor.2, name).unwrap(), &theirs, name),
                    // What candle cannot convert, this converts or refuses too.
                    Err(_) => {
                        assert!(ours.get(tensor.2, name).is_ok() == (tensor.1 == Dtype::F8E8M0))
                    }
                }
            }
        }
    }
}

#[test]
fn a_folder_and_its_files_are_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let paths = checkpoints(folder.path()).remove(1);
    let parts =
        [folder.path().join("many"), folder.path().join("many/model.safetensors.index.json")];
    for path in parts {
        let vb = fst_candle::var_builder(&path, DType::F32, &CPU).unwrap();
        let theirs = candles(&paths, DType::F32);
        let (ours, theirs) =
            (vb.pp("F32").get((1200, 1000), "large"), theirs.pp("F32").get((1200, 1000), "large"));
        assert_same(&ours.unwrap(), &theirs.unwrap(), "F32.large");
    }
}

/// `count` tensors of 2 MB each.
fn many(path: &Path, count: usize) {
    let tensors: Vec<_> =
        (0..count).map(|i| given(&format!("t{i}"), Dtype::BF16, &[1000, 1000])).collect();
    write_file(path, &tensors);
}

#[test]
fn tensors_come_in_any_order_from_any_thread() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    many(&path, 40);
    let theirs = candle_core::safetensors::load(&path, &CPU).unwrap();
    for budget in [None, Some(0), Some(5 << 20)] {
        for repeats in [Repeats::Share, Repeats::ReadAgain] {
            let mut weights = Weights::open(&path).unwrap().repeats(repeats);
            if let Some(budget) = budget {
                weights = weights.budget(budget);
            }
            let vb = weights.var_builder(DType::BF16, &CPU).unwrap();
            std::thread::scope(|scope| {
                for thread in 0..3 {
                    let (vb, theirs) = (&vb, &theirs);
                    scope.spawn(move || {
                        for step in 0..40 {
                            let name = format!("t{}", (step * 37 + thread * 11) % 40);
                            let tensor = vb.get((1000, 1000), &name).unwrap();
                            assert_same(&tensor, &theirs[&name], &name);
                        }
                    });
                }
            });
        }
    }
}

#[test]
fn repeated_and_tied_tensors_share_memory_unless_they_are_handed_over() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let small = given("small", Dtype::BF16, &[10]);
    write_file(&path, &[given("large", Dtype::BF16, &[1000, 1000]), small]);
    for dtype in [DType::BF16, DType::F32] {
        let vb = fst_candle::var_builder(&path, dtype, &CPU).unwrap();
        for (name, shape) in [("large", vec![1000, 1000]), ("small", vec![10])] {
            let (one, two) = (vb.get(shape.clone(), name).unwrap(), vb.get(shape, name).unwrap());
            assert_eq!(address(&one), address(&two), "{name}");
        }
        let tied = vb.rename_f(|name| name.replace("lm_head", "large"));
        let (one, two) = (tied.get((1000, 1000), "lm_head"), tied.get((1000, 1000), "large"));
        assert_eq!(address(&one.unwrap()), address(&two.unwrap()));
    }
    let weights = Weights::open(&path).unwrap().repeats(Repeats::ReadAgain);
    let vb = weights.var_builder(DType::BF16, &CPU).unwrap();
    for (name, shape) in [("large", vec![1000, 1000]), ("small", vec![10])] {
        let (one, two) = (vb.get(shape.clone(), name).unwrap(), vb.get(shape, name).unwrap());
        assert_ne!(address(&one), address(&two), "{name}");
        assert_same(&one, &two, name);
    }
}

#[test]
fn overlays_and_new_names() {
    let folder = tempfile::tempdir().unwrap();
    let (base, patch) =
        (folder.path().join("base.safetensors"), folder.path().join("patch.safetensors"));
    write_file(&base, &[given("m.a", Dtype::F32, &[4]), given("m.b", Dtype::F32, &[4])]);
    write_file(&patch, &[Given("b".to_owned(), Dtype::F32, vec![2], vec![0; 8])]);
    let vb = Weights::open(&base)
        .unwrap()
        .rename(|tensor| tensor.name().strip_prefix("m.").map(str::to_owned))
        .unwrap()
        .overlay(&patch)
        .unwrap()
        .var_builder(DType::F32, &CPU)
        .unwrap();
    assert!(vb.contains_tensor("a") && vb.contains_tensor("b") && !vb.contains_tensor("m.a"));
    let theirs = candle_core::safetensors::load(&base, &CPU).unwrap();
    assert_same(&vb.get(4, "a").unwrap(), &theirs["m.a"], "a");
    assert_eq!(vb.get(2, "b").unwrap().to_vec1::<f32>().unwrap(), [0.0; 2]);
    let twice = Weights::open(&base).unwrap().rename(|_| Some("same".to_owned()));
    assert!(twice.unwrap_err().to_string().contains("\"same\""));
}

#[test]
fn errors_are_candles_with_our_text() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    many(&path, 3);
    let vb = fst_candle::var_builder(&path, DType::F32, &CPU).unwrap();
    let missing = plain(vb.pp("no").get((1000, 1000), "such").unwrap_err());
    assert!(matches!(&missing, Error::CannotFindTensor { path } if path == "no.such"), "{missing}");
    let shape = plain(vb.get((1000, 999), "t0").unwrap_err());
    let theirs = candles(std::slice::from_ref(&path), DType::F32).get((1000, 999), "t0");
    let theirs = plain(theirs.unwrap_err());
    assert_eq!(shape.to_string(), theirs.to_string());
    assert!(matches!(shape, Error::UnexpectedShape { .. }));
    let absent = fst_candle::var_builder(folder.path().join("no"), DType::F32, &CPU).err().unwrap();
    assert!(absent.to_string().contains("no"), "{absent}");
}

#[test]
fn a_file_that_is_cut_short_is_an_error_for_all_who_wait() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    many(&path, 20);
    for ahead in [true, false] {
        many(&path, 20);
        let weights = Weights::open(&path).unwrap().read_ahead(move |_| ahead);
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(file.metadata().unwrap().len() / 2).unwrap();
        let vb = weights.var_builder(DType::BF16, &CPU).unwrap();
        std::thread::scope(|scope| {
            for name in ["t19", "t0", "t10"] {
                let vb = &vb;
                scope.spawn(move || {
                    let error = vb.get((1000, 1000), name).unwrap_err().to_string();
                    assert!(error.contains("x.safetensors"), "{error}");
                });
            }
        });
    }
}

#[test]
fn a_hook_that_panics_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    many(&path, 3);
    let weights = Weights::open(&path).unwrap().on_progress(|_| panic!("out of paper"));
    let vb = weights.var_builder(DType::BF16, &CPU).unwrap();
    let error = vb.get((1000, 1000), "t1").unwrap_err().to_string();
    assert!(error.contains("out of paper"), "{error}");
}

#[test]
fn what_is_not_wanted_ahead_is_read_when_somebody_asks() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    many(&path, 10);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (last, own) = (Arc::new(AtomicU64::new(0)), seen.clone());
    let done = last.clone();
    let vb = Weights::open(&path)
        .unwrap()
        .repeats(Repeats::ReadAgain)
        .read_ahead(|tensor| tensor.name() != "t3")
        .on_progress(move |progress| {
            assert!(progress.bytes_done <= progress.bytes_total, "{progress:?}");
            assert_eq!((progress.bytes_total, progress.tensors_total), (18_000_000, 9));
            own.lock().unwrap().push(progress.tensors_done);
            done.store(progress.bytes_done, Relaxed);
        })
        .var_builder(DType::BF16, &CPU)
        .unwrap();
    let theirs = candle_core::safetensors::load(&path, &CPU).unwrap();
    for name in ["t0", "t3", "t0", "t9"] {
        assert_same(&vb.get((1000, 1000), name).unwrap(), &theirs[name], name);
    }
    assert_eq!(last.load(Relaxed), 18_000_000);
    assert_eq!(seen.lock().unwrap().last(), Some(&9));
}

#[test]
fn parts_are_what_candle_cuts() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let all = [
        given("small", Dtype::BF16, &[6, 12]),
        given("large", Dtype::BF16, &[1200, 1000]),
        given("f32", Dtype::F32, &[600, 1000]),
    ];
    write_file(&path, &all);
    for dtype in [DType::BF16, DType::F32, DType::F16] {
        // SAFETY: nobody changes the file.
        let theirs = unsafe { ShardedSafeTensors::var_builder(&[&path], dtype, &CPU).unwrap() };
        let lazy = fst_candle::sharded(&path, dtype, &CPU).unwrap();
        let weights = Weights::open(&path).unwrap().read_ahead(|_| true);
        let ahead = weights.sharded(dtype, &CPU).unwrap();
        for Given(name, _, shape, _) in &all {
            for (dim, world_size) in [(0, 1), (0, 2), (1, 2), (0, 3), (1, 4)] {
                for rank in 0..world_size {
                    let hint = Shard { dim, rank, world_size };
                    let what = format!("{name} {hint:?}");
                    let theirs = theirs.get_with_hints(shape.clone(), name, hint).unwrap();
                    for ours in [&lazy, &ahead] {
                        let ours = ours.get_with_hints(shape.clone(), name, hint).unwrap();
                        assert_same(&ours, &theirs, &what);
                    }
                }
            }
        }
        let uneven = Shard { dim: 1, rank: 0, world_size: 7 };
        let ours = lazy.get_with_hints((6, 12), "small", uneven).unwrap_err();
        let theirs = theirs.get_with_hints((6, 12), "small", uneven).unwrap_err();
        assert_eq!(plain(ours).to_string(), plain(theirs).to_string());
        for wrong in [
            Shard { dim: 2, rank: 0, world_size: 2 },
            Shard { dim: 0, rank: 2, world_size: 2 },
            Shard { dim: 0, rank: 0, world_size: 0 },
        ] {
            assert!(lazy.get_with_hints((6, 12), "small", wrong).is_err(), "{wrong:?}");
        }
    }
}
