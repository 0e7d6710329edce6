//! Every tensor, whole and in parts, against mistral.rs's own way.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "../../fst-candle/tests/support/mod.rs"]
mod support;

use std::path::PathBuf;
use std::sync::Arc;

use candle_core::{DType, Device, Error};
use fst::Dtype;
use fst_candle::{Repeats, Weights};
use mistralrs_quant::{Shard, ShardedSafeTensors, ShardedVarBuilder};
use regex::Regex;
use support::{Given, assert_same, given, plain, write_shards};

const CPU: Device = Device::Cpu;

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
        Dtype::F8E8M0,
    ] {
        all.push(given(&format!("{dtype}.scalar"), dtype, &[]));
        all.push(given(&format!("{dtype}.vector"), dtype, &[24]));
        all.push(given(&format!("{dtype}.cube"), dtype, &[4, 12, 8]));
        all.push(given(&format!("{dtype}.large"), dtype, &[1200, 1000]));
    }
    all
}

fn files(folder: &tempfile::TempDir) -> Vec<PathBuf> {
    let mut shards = vec![Vec::new(); 3];
    tensors().into_iter().enumerate().for_each(|(index, tensor)| shards[index % 3].push(tensor));
    write_shards(folder.path(), &shards)
}

fn theirs(
    paths: &[PathBuf],
    dtype: DType,
    dummy: Option<Arc<Vec<Regex>>>,
    is_there: fst_mistralrs::Predicate,
) -> ShardedVarBuilder {
    // SAFETY: nobody writes to the files.
    #[allow(unsafe_code)]
    unsafe { ShardedSafeTensors::sharded(paths, dtype, &CPU, dummy, is_there) }.unwrap()
}

fn all() -> fst_mistralrs::Predicate {
    Arc::new(|_| true)
}

#[test]
fn whole_tensors_are_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let paths = files(&folder);
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        let ours = fst_mistralrs::sharded(&paths, dtype, &CPU, None, all()).unwrap();
        let theirs = theirs(&paths, dtype, None, all());
        for Given(name, _, shape, _) in tensors() {
            let what = format!("{name} as {dtype:?}");
            let expected = theirs.get(shape.clone(), &name).unwrap();
            assert_same(&ours.get(shape.clone(), &name).unwrap(), &expected, &what);
            // Once more, as tied weights are.
            assert_same(&ours.get(shape, &name).unwrap(), &expected, &what);
            assert_same(&ours.get_unchecked_dtype(&name, dtype).unwrap(), &expected, &what);
        }
    }
}

#[test]
fn parts_are_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let paths = files(&folder);
    let ours = fst_mistralrs::sharded(&paths, DType::BF16, &CPU, None, all()).unwrap();
    let theirs = theirs(&paths, DType::BF16, None, all());
    let mut compared = 0;
    // Of packed elements the bytes are compared that stand behind a part, which may be those of the whole.
    let plain = tensors().into_iter().filter(|given| given.1 != Dtype::F8E8M0);
    for Given(name, found, shape, _) in plain {
        // In parts, mistral.rs converts everything to the type asked for: its layers ask for the one that is there.
        let asked = match found {
            Dtype::BF16 | Dtype::F16 | Dtype::F32 => DType::BF16,
            found => fst_candle::native_dtype(found).unwrap(),
        };
        for dim in 0..shape.len() {
            let offset = Shard::Offset { dim, offset: 3, len: 1 };
            let ranks = [(0, 2), (1, 2), (3, 4)];
            let simple = ranks.map(|(rank, world_size)| Shard::Simple { dim, rank, world_size });
            for shard in simple.into_iter().chain([offset]) {
                let get = |vb: &ShardedVarBuilder| {
                    vb.get_with_hints_dtype(shape.clone(), &name, shard, asked)
                };
                // Of some types it has no way to parts.
                let Ok(expected) = get(&theirs) else { continue };
                assert_same(&get(&ours).unwrap(), &expected, &format!("{name} {shard:?}"));
                compared += 1;
            }
        }
    }
    assert!(compared > 150, "{compared}");
}

#[test]
fn what_is_passed_over_is_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let paths = files(&folder);
    let dummy = Some(Arc::new(vec![Regex::new("^F32").unwrap(), Regex::new(r"\.cube$").unwrap()]));
    let is_there: fst_mistralrs::Predicate = Arc::new(|name| !name.starts_with("I64"));
    let ours =
        fst_mistralrs::sharded(&paths, DType::F32, &CPU, dummy.clone(), is_there.clone()).unwrap();
    let theirs = theirs(&paths, DType::F32, dummy, is_there);
    let mut absent = 0;
    for Given(name, _, shape, _) in tensors() {
        assert_eq!(ours.contains_tensor(&name), theirs.contains_tensor(&name), "{name}");
        match (ours.get(shape.clone(), &name), theirs.get(shape, &name)) {
            (Ok(ours), Ok(theirs)) => assert_same(&ours, &theirs, &name),
            (Err(ours), Err(theirs)) => {
                let (ours, theirs) = (plain(ours), plain(theirs));
                assert!(matches!(ours, Error::CannotFindTensor { .. }), "{ours}");
                assert_eq!(ours.to_string(), theirs.to_string());
                absent += 1;
            }
            (ours, theirs) => panic!("{name}: {ours:?}, not {theirs:?}"),
        }
    }
    assert_eq!(absent, 4 + 4 + 10);
    let (ours, theirs) = (ours.get(3, "U8.vector"), theirs.get(3, "U8.vector"));
    assert_eq!(plain(ours.unwrap_err()).to_string(), plain(theirs.unwrap_err()).to_string());
}

/// Devices differ from layer to layer, and a budget holds less than the whole.
#[test]
fn options_of_weights_and_devices_of_layers_count() {
    let folder = tempfile::tempdir().unwrap();
    let paths = files(&folder);
    let weights = Weights::open(&paths).unwrap().repeats(Repeats::ReadAgain).budget(4 << 20);
    let ours = fst_mistralrs::wrap(weights, DType::F32, &CPU, None, all()).unwrap();
    let theirs = theirs(&paths, DType::F32, None, all());
    for Given(name, _, shape, _) in tensors().into_iter().rev() {
        let get =
            |vb: &ShardedVarBuilder| vb.clone().set_device(CPU).get(shape.clone(), &name).unwrap();
        assert_same(&get(&ours), &get(&theirs), &name);
    }
}

#[test]
fn a_missing_file_is_an_error_that_names_it() {
    let error = fst_mistralrs::sharded(&["/no/such.safetensors"], DType::F32, &CPU, None, all());
    let text = error.err().unwrap().to_string();
    assert!(text.contains("/no/such.safetensors"), "{text}");
}
