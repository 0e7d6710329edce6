//! A module loaded through fst against the same loaded by burn's own store.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::path::Path;

use burn_core as burn;
use burn_core::module::Module;
use burn_core::tensor::{Device, Shape};
use burn_nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn_store::{
    KeyRemapper, ModuleSnapshot, ModuleStore, PathFilter, PyTorchToBurnAdapter, SafetensorsStore,
    bridge,
};
use fst::format::{Layout, shard_file_name, write_index};
use fst::{Checkpoint, Dtype, Loader};
use fst_burn::{Store, StoreError};

#[derive(Module, Debug)]
struct Model {
    embedding: Embedding,
    layers: Vec<Linear>,
    norm: LayerNorm,
}

fn model() -> Model {
    let device = Device::default();
    Model {
        embedding: EmbeddingConfig::new(100, 32).init(&device),
        layers: (0..3).map(|_| LinearConfig::new(32, 32).init(&device)).collect(),
        norm: LayerNormConfig::new(32).init(&device),
    }
}

/// Names and bytes of a module's tensors.
fn contents(model: &Model) -> Vec<(String, Vec<u8>)> {
    let tensors = model.collect(None, None, false).into_iter();
    tensors.map(|t| (t.name.clone(), t.to_bytes().unwrap().to_vec())).collect()
}

fn saved(path: &Path) -> Model {
    let model = model();
    model.save_into(&mut SafetensorsStore::from_file(path)).unwrap();
    model
}

#[test]
fn a_module_is_the_one_that_was_saved() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let expected = contents(&saved(&path));
    let mut loaded = model();
    assert_ne!(contents(&loaded), expected);
    let mut store = Store::open(&path).unwrap();
    for _ in 0..2 {
        let result = loaded.load_from(&mut store).unwrap();
        assert_eq!(result.applied.len(), expected.len());
        assert!(result.is_success() && result.unused.is_empty(), "{result}");
        assert_eq!(contents(&loaded), expected);
        loaded = model();
    }
}

#[test]
fn tensors_are_listed_and_read_one_by_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    saved(&path);
    let mut burns = SafetensorsStore::from_file(&path);
    let mut ours = Store::open(&path).unwrap();
    assert_eq!(ours.keys().unwrap(), burns.keys().unwrap());
    let ours = ours.get_all_tensors().unwrap().clone();
    for (name, expected) in burns.get_all_tensors().unwrap() {
        let (ours, expected) =
            (bridge::to_data(&ours[name]).unwrap(), bridge::to_data(expected).unwrap());
        assert_eq!(ours, expected, "{name}");
    }
    assert!(Store::open(&path).unwrap().get_tensor("nothing").unwrap().is_none());
}

/// Weights as PyTorch has them: transposed, and by other names; several files.
fn pytorch(folder: &Path) {
    let mut map = std::collections::HashMap::new();
    let tensors = [
        ("model.embedding.weight", vec![100, 32]),
        ("model.layers.0.weight", vec![32, 32]),
        ("model.layers.0.bias", vec![32]),
        ("model.layers.1.weight", vec![32, 32]),
        ("model.layers.1.bias", vec![32]),
        ("model.layers.2.weight", vec![32, 32]),
        ("model.layers.2.bias", vec![32]),
        ("model.norm.weight", vec![32]),
        ("model.norm.bias", vec![32]),
    ];
    for (index, part) in tensors.chunks(5).enumerate() {
        let file = shard_file_name(index, 2);
        let mut layout = Layout::new();
        for (name, shape) in part {
            layout.tensor(*name, Dtype::F32, shape).unwrap();
            map.insert((*name).to_owned(), file.clone());
        }
        let mut writer =
            layout.write_to(std::fs::File::create(folder.join(&file)).unwrap()).unwrap();
        for (name, shape) in part {
            let count = shape.iter().product::<usize>();
            let value = |i: usize| (i as f32 + name.len() as f32).sin();
            let bytes: Vec<u8> = (0..count).flat_map(|i| value(i).to_le_bytes()).collect();
            writer.write_tensor(&bytes).unwrap();
        }
        writer.finish().unwrap();
    }
    write_index(folder, map, 0).unwrap();
}

fn without_prefix() -> KeyRemapper {
    KeyRemapper::new().add_pattern("^model\\.", "").unwrap()
}

#[test]
fn adapters_names_and_filters_are_as_in_burns_own_store() {
    let folder = tempfile::tempdir().unwrap();
    pytorch(folder.path());
    let filters = [PathFilter::new(), PathFilter::new().with_regex(r"^layers\.[01]\.")];
    for filter in filters {
        let (mut ours, before) = (model(), model());
        let mut theirs = ours.clone();
        let mut store = Store::open(folder.path())
            .unwrap()
            .remap(without_prefix())
            .with_from_adapter(PyTorchToBurnAdapter)
            .filter(filter.clone());
        let result = ours.load_from(&mut store).unwrap();
        // burn's store knows no checkpoints of several files.
        let mut applied = 0;
        for file in [0, 1] {
            let file = folder.path().join(shard_file_name(file, 2));
            let mut store = SafetensorsStore::from_file(file)
                .remap(without_prefix())
                .with_from_adapter(PyTorchToBurnAdapter)
                .filter(filter.clone())
                .allow_partial(true);
            applied += theirs.load_from(&mut store).unwrap().applied.len();
        }
        assert_eq!(result.applied.len(), applied);
        assert_eq!(contents(&ours), contents(&theirs));
        assert_ne!(contents(&ours), contents(&before));
    }
}

#[test]
fn elements_are_converted_while_they_are_read() {
    let folder = tempfile::tempdir().unwrap();
    pytorch(folder.path());
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let mut store = Store::with(checkpoint, Loader::new().dtype(Dtype::F64));
    let tensor = store.get_tensor("model.norm.bias").unwrap().unwrap().clone();
    assert_eq!(tensor.shape, Shape::from([32]));
    let values = bridge::to_data(&tensor).unwrap();
    let expected: Vec<f64> = (0..32).map(|i| (i as f32 + 15.0).sin().into()).collect();
    assert_eq!(values.as_slice::<f64>().unwrap(), expected);
}

#[test]
fn what_cannot_be_is_an_error_by_name() {
    let folder = tempfile::tempdir().unwrap();
    pytorch(folder.path());
    let open = || Store::open(folder.path()).unwrap();
    let mut module = model();
    let error = module.load_from(&mut open()).unwrap_err();
    assert!(matches!(&error, StoreError::Missing { names } if names.len() == 9), "{error}");
    let result = module.load_from(&mut open().allow_partial(true)).unwrap();
    assert_eq!((result.applied.len(), result.unused.len()), (0, 9));
    let error = module.save_into(&mut open()).unwrap_err();
    assert!(matches!(error, StoreError::ReadOnly), "{error}");
    let same = KeyRemapper::new().add_pattern(".*(weight|bias)$", "x").unwrap();
    let error = module.load_from(&mut open().remap(same)).unwrap_err();
    assert!(matches!(&error, StoreError::Name { name } if name == "x"), "{error}");
    assert!(matches!(Store::open("/no/such/model"), Err(StoreError::Load(_))));

    // Cut short after it was opened.
    let mut store = open().remap(without_prefix()).with_from_adapter(PyTorchToBurnAdapter);
    let file = folder.path().join(shard_file_name(0, 2));
    let file = std::fs::File::options().write(true).open(file).unwrap();
    file.set_len(file.metadata().unwrap().len() - 10).unwrap();
    let error = module.load_from(&mut store).unwrap_err();
    assert!(matches!(error, StoreError::Load(_)), "{error}");
}
