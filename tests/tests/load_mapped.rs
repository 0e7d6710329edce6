//! Tensors backed by a mapping, held to the official `safetensors` crate byte for byte.

#![allow(clippy::unwrap_used, clippy::panic)]

mod load_support;

use std::fs;
use std::path::PathBuf;

use fst::{Checkpoint, Dtype, Engine, Error, Loader, Tensors};
use half::bf16;

use load_support::*;

fn map(loader: &Loader, paths: &[PathBuf]) -> Tensors {
    let checkpoint = Checkpoint::open_all(paths).unwrap();
    // SAFETY: the files are the test's own; one that changes them looks at no byte afterwards.
    unsafe { loader.map(&checkpoint) }.unwrap()
}

/// The tensors that are not mapped, by name.
fn loaded(tensors: &Tensors) -> Vec<&str> {
    tensors.iter().filter(|t| !t.is_mapped()).map(|t| t.name()).collect()
}

#[test]
fn mapped_tensors_are_what_the_official_crate_reads() {
    let dir = tempfile::tempdir().unwrap();
    let paths = checkpoint(dir.path());
    let _held = fst_tests::hold_in_cache(&paths);
    let want = official(&paths);
    for read_ahead in [false, true] {
        let mut tensors = map(&Loader::new().read_ahead(read_ahead), &paths);
        assert_eq!(loaded(&tensors), ["empty"]);
        assert!(ours(&tensors) == want);
        tensors.populate().unwrap();
        assert!(ours(&tensors) == want);
        let report = tensors.report();
        let bytes = want.values().map(|(_, _, data)| data.len() as u64).sum::<u64>();
        assert_eq!((report.tensors, report.bytes, report.bytes_asked), (10, bytes, bytes));
        assert_eq!(report.bytes_read, 0);
        assert_eq!(report.engine.used, Engine::Mmap);
        assert_eq!(report.stage("map").unwrap().bytes, bytes);
        assert_eq!(report.stage("populate").unwrap().bytes, bytes);
        // Only Linux says what the page cache holds.
        let is_known = cfg!(all(target_os = "linux", not(fst_portable)));
        assert!(report.resident_bytes.map_or(!is_known, |resident| resident >= bytes));
        let view = tensors.get("big").unwrap().as_slice::<bf16>().unwrap();
        assert_eq!(view.len(), 1500 * 1001);
    }
}

#[test]
fn a_tensor_keeps_its_mapping_alive() {
    let dir = tempfile::tempdir().unwrap();
    let paths = checkpoint(dir.path());
    let want = official(&paths);
    let kept = map(&Loader::new(), &paths).get("huge").unwrap().clone();
    // Removing a name leaves the file to those who have it open.
    drop(dir);
    let thread = std::thread::spawn(move || kept.bytes().unwrap().to_vec());
    assert!(thread.join().unwrap() == want["huge"].2);
}

#[test]
fn slices_of_one_run_are_mapped_and_others_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let paths = checkpoint(dir.path());
    let want = official(&paths);
    let loader = Loader::new()
        .slice("big", 0, 700..1300)
        .slice("huge", 1, 3..500)
        .slice("eight", 0, 5..5)
        .dtype(Dtype::F64);
    let tensors = map(&loader, &paths);
    // All floats are converted, but for the ones that are F64 already.
    assert!(!tensors.get("big").unwrap().is_mapped());
    let plain = Loader::new().slice("big", 0, 700..1300).slice("huge", 1, 3..500);
    let tensors = map(&plain.slice("eight", 0, 5..5), &paths);
    assert_eq!(loaded(&tensors), ["empty", "huge", "eight"]);
    let big = tensors.get("big").unwrap();
    assert_eq!(big.shape(), [600, 1001]);
    assert!(big.bytes().unwrap() == slice(&want["big"].2, &[1500, 1001], 2, 0, 700..1300));
    let huge = tensors.get("huge").unwrap();
    assert!(huge.bytes().unwrap() == slice(&want["huge"].2, &[2048, 2051], 2, 1, 3..500));
    assert_eq!(tensors.get("eight").unwrap().shape(), [0, 3]);
    let report = tensors.report();
    assert!(report.stage("read").unwrap().bytes > 0 && report.bytes_asked < report.bytes_read * 4);
}

#[test]
fn conversions_and_misaligned_tensors_are_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("odd.safetensors");
    let (a, b) = misaligned(&path);
    let tensors = map(&Loader::new(), std::slice::from_ref(&path));
    assert_eq!(loaded(&tensors), ["a", "b"]);
    assert!(tensors.get("a").unwrap().bytes().unwrap() == a);
    assert!(tensors.get("b").unwrap().bytes().unwrap() == b);
    assert_eq!(tensors.get("a").unwrap().as_slice::<f32>().unwrap().len(), 600_001);
    let paths = checkpoint(dir.path());
    let want = official(&paths);
    let tensors = map(&Loader::new().dtype(Dtype::F32).select("b*"), &paths);
    assert_eq!(loaded(&tensors), ["big"]);
    assert!(tensors.get("bytes").unwrap().bytes().unwrap() == want["bytes"].2);
}

#[test]
fn files_that_change_are_errors_where_that_can_be_seen() {
    let dir = tempfile::tempdir().unwrap();
    let paths = checkpoint(dir.path());
    let checkpoint = Checkpoint::open_all(&paths).unwrap();
    let mut tensors = map(&Loader::new().read_ahead(false), &paths);
    let file = fs::File::options().write(true).open(&paths[1]).unwrap();
    file.set_len(100_000).unwrap();
    let error = tensors.populate().unwrap_err();
    assert!(matches!(&error, Error::Io { tensor: Some(t), .. } if t == "huge"), "{error}");
    assert!(error.to_string().contains("b.safetensors"), "{error}");
    // SAFETY: it is refused.
    let error = unsafe { Loader::new().map(&checkpoint) }.unwrap_err().to_string();
    assert!(error.contains("b.safetensors") && error.contains("changed"), "{error}");
}
