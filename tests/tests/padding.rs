//! Rows that pad a vocabulary cost no memory until somebody writes to them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::sync::Arc;

use fst::{Checkpoint, Loader, LocalGroup, Shard};
use safetensors::tensor::{Dtype, TensorView};

/// Bytes of this process that are in memory.
fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn padding_rows_are_zeros_without_memory_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    let (rows, row) = (65, 1 << 19);
    let bytes = vec![1; rows * row];
    let view = TensorView::new(Dtype::U8, vec![rows, row], &bytes).unwrap();
    safetensors::serialize_to_file([("embed", view)], None, &path).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let group = Arc::new(LocalGroup::host(1).pop().unwrap());
    let loader = Loader::new().group(group).shard(|_| Shard::vocab_rows(64));
    let before = resident();
    let tensors = loader.load(&checkpoint).unwrap();
    let grown = resident().saturating_sub(before);
    let tensor = tensors.get("embed").unwrap();
    assert_eq!(tensor.shape(), [128, row]);
    assert!(tensor.bytes().unwrap()[..rows * row] == bytes);
    assert!(tensor.bytes().unwrap()[rows * row..].iter().all(|byte| *byte == 0));
    assert!(grown < (rows * row) as u64 + (16 << 20), "{grown} bytes");
}
