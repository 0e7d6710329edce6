//! Streams when something goes wrong or memory is tight: the error arrives, and nothing waits for
//! ever.

#![allow(clippy::unwrap_used, clippy::panic)]

mod load_support;

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use fst::{Checkpoint, Dtype, Error, Loader, SelectError};
use safetensors::tensor::Dtype as OfficialDtype;

use load_support::*;

/// Two tensors of 4 MiB and a bit, next to each other.
fn two(dir: &Path) -> Checkpoint {
    let path = dir.join("two.safetensors");
    let shape = vec![1025, 2048];
    write(&path, &[("a", OfficialDtype::BF16, shape.clone()), ("b", OfficialDtype::BF16, shape)]);
    Checkpoint::open(path).unwrap()
}

#[test]
fn a_file_that_changes_under_a_stream_is_an_error_at_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = two(dir.path());
    // The second tensor has to wait for the first one's memory.
    let mut stream = Loader::new().memory_budget(6 << 20).stream(&checkpoint).unwrap();
    let first = stream.next().unwrap().unwrap();
    let file = fs::File::options().write(true).open(first.info().path()).unwrap();
    file.set_modified(SystemTime::now() + Duration::from_secs(5)).unwrap();
    drop(first);
    let rest: Vec<_> = stream.collect();
    let Some(Err(error)) = rest.last() else { panic!("{rest:?}") };
    assert!(error.to_string().contains("changed"), "{error}");
}

#[test]
fn the_smallest_budget_works_for_blocks_that_lead_to_several_arenas() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = two(dir.path());
    let loader = Loader::new().dtype(Dtype::F32);
    let whole = ours(&loader.load(&checkpoint).unwrap());
    let small = loader.clone().memory_budget(1 << 20).stream(&checkpoint);
    let Err(Error::Budget { needed, .. }) = small else { panic!("{small:?}") };
    let mut names = Vec::new();
    for tensor in loader.memory_budget(needed).stream(&checkpoint).unwrap() {
        let tensor = tensor.unwrap();
        assert!(tensor.bytes().unwrap() == whole[tensor.name()].2);
        names.push(tensor.name().to_owned());
    }
    names.sort();
    assert_eq!(names, ["a", "b"]);
}

#[test]
fn a_stream_tells_its_bytes_at_once_and_reports_at_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = two(dir.path());
    let loader = Loader::new().select("{a,c}").dtype(Dtype::F32);
    let mut stream = loader.stream(&checkpoint).unwrap();
    let bytes = 1025 * 2048 * 4;
    assert_eq!((stream.remaining(), stream.byte_len()), (1, bytes));
    assert_eq!(stream.next().unwrap().unwrap().byte_len() as u64, bytes);
    assert_eq!((stream.remaining(), stream.byte_len()), (0, bytes));
    assert!(stream.next().is_none());
    assert_eq!(stream.report().unwrap().bytes, bytes);
}

#[test]
fn malformed_patterns_are_told_from_those_that_match_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = two(dir.path());
    let refused = |pattern: &str| Loader::new().select(pattern).load(&checkpoint).unwrap_err();
    assert!(
        matches!(refused("c*"), Error::Select(SelectError::NoMatch { pattern }) if pattern == "c*")
    );
    let malformed = refused("{a,b").to_string();
    assert_eq!(malformed, "malformed pattern \"{a,b\": the { at byte 0 is never closed");
}
