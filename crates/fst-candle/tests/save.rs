//! What is written is what candle and this crate read.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use fst::Dtype;
use fst_candle::{Save, load, save};
use support::{assert_same, given, write_file};

/// Tensors of every type of candle's, by way of a file, and some that are views.
fn tensors(folder: &std::path::Path) -> HashMap<String, Tensor> {
    let path = folder.join("given.safetensors");
    let types = Dtype::ALL.iter().filter(|dtype| {
        !matches!(
            dtype,
            Dtype::Bool
                | Dtype::I8
                | Dtype::U16
                | Dtype::U64
                | Dtype::C64
                | Dtype::F8E5M2
                | Dtype::F8E5M2Fnuz
                | Dtype::F8E4M3Fnuz
        )
    });
    let all: Vec<_> = types.map(|dtype| given(&dtype.to_string(), *dtype, &[8, 12])).collect();
    assert_eq!(all.len(), support::DTYPES.len());
    write_file(&path, &all);
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    let whole = Tensor::arange(0f32, 600f32, &Device::Cpu).unwrap().reshape((20, 30)).unwrap();
    tensors.insert("part".to_owned(), whole.narrow(0, 3, 5).unwrap());
    tensors.insert("transposed".to_owned(), whole.t().unwrap());
    tensors.insert("scalar".to_owned(), Tensor::new(3f64, &Device::Cpu).unwrap());
    tensors
}

#[test]
fn one_file() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = tensors(folder.path());
    let path = folder.path().join("out.safetensors");
    save(&tensors, &path).unwrap();
    let theirs = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    let ours = load(&path, &Device::Cpu).unwrap();
    assert_eq!((ours.len(), theirs.len()), (tensors.len(), tensors.len()));
    for (name, tensor) in &tensors {
        assert_same(&theirs[name], tensor, name);
        assert_same(&ours[name], tensor, name);
    }
    // Over itself.
    save(&ours, &path).unwrap();
    assert_eq!(load(&path, &Device::Cpu).unwrap().len(), tensors.len());
}

#[test]
fn a_folder_of_shards() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = tensors(folder.path());
    let out = folder.path().join("out/model");
    Save::new().shard_bytes(1000).metadata("by", "test").write(&tensors, &out).unwrap();
    let checkpoint = fst::Checkpoint::open(&out).unwrap();
    assert!(checkpoint.shards().len() > 3);
    assert_eq!(checkpoint.metadata().get("by"), Some("test"));
    let ours = load(&out, &Device::Cpu).unwrap();
    for (name, tensor) in &tensors {
        assert_same(&ours[name], tensor, name);
    }
    // As one file, it is another folder's: this one has files that would be taken for a part of it.
    let error = save(&tensors, &out).unwrap_err().to_string();
    assert!(error.contains("-of-00006"), "{error}");
    assert_eq!(load(&out, &Device::Cpu).unwrap().len(), tensors.len());
    let single = folder.path().join("single");
    save(&tensors, &single).unwrap();
    assert!(single.join("model.safetensors").is_file());
}

#[test]
fn what_fails_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.safetensors");
    let tensor = Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap();
    // A name that the format keeps for itself.
    let error = save(&HashMap::from([("__metadata__", tensor.clone())]), &path).unwrap_err();
    assert!(error.to_string().contains("__metadata__"), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    let gone = folder.path().join("no/such/folder.safetensors");
    let error = save(&HashMap::from([("x", tensor)]), &gone).unwrap_err().to_string();
    assert!(error.contains("folder.safetensors"), "{error}");
}
