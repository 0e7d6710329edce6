//! What tests across the crates of the workspace share: checkpoints to load. The tests themselves
//! are in the folder `tests` of this package.

#![allow(clippy::unwrap_used)]

pub mod server;

use std::fs;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::tensor::{Dtype, TensorView};

/// A tensor to write: its name, type of elements and shape.
pub type Spec = (&'static str, Dtype, Vec<usize>);

/// Bytes without a pattern, the same for the same seed.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

/// Writes a file of noise with the official crate.
pub fn write(path: &Path, specs: &[Spec]) {
    let data: Vec<Vec<u8>> = specs
        .iter()
        .zip(1..)
        .map(|((_, dtype, shape), seed)| {
            noise(shape.iter().product::<usize>() * dtype.bitsize() / 8, seed)
        })
        .collect();
    let views = specs.iter().zip(&data).map(|((name, dtype, shape), data)| {
        ((*name).to_owned(), TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// A checkpoint of two shards with everything that is odd: many types of elements, scalars, empty
/// tensors, large and small ones.
pub fn odd_checkpoint(dir: &Path) -> Vec<PathBuf> {
    use Dtype::{BF16, BOOL, F8_E4M3, F16, F32, F64, I64, U8};
    let a = dir.join("a.safetensors");
    let b = dir.join("b.safetensors");
    write(
        &a,
        &[
            ("big", BF16, vec![1500, 1001]),
            ("scalar", F32, vec![]),
            ("empty", F32, vec![0, 7]),
            ("bytes", U8, vec![33]),
            ("wide", F64, vec![3, 5, 7]),
            ("flags", BOOL, vec![5]),
        ],
    );
    write(
        &b,
        &[
            ("huge", BF16, vec![2048, 2051]),
            ("half", F16, vec![77]),
            ("ids", I64, vec![9]),
            ("eight", F8_E4M3, vec![129, 3]),
        ],
    );
    vec![a, b]
}

/// The [odd checkpoint](odd_checkpoint) with a third shard, a crowd of tiny tensors.
pub fn crowded_checkpoint(dir: &Path) -> Vec<PathBuf> {
    let mut paths = odd_checkpoint(dir);
    let tiny = ["t0", "t1", "t2", "t3", "t4", "t5", "t6", "t7", "t8", "t9"];
    let specs: Vec<Spec> =
        tiny.into_iter().zip(1..).map(|(name, n)| (name, Dtype::F16, vec![n])).collect();
    paths.push(dir.join("c.safetensors"));
    write(&paths[2], &specs);
    paths
}

/// Keeps files in the page cache as long as the mappings live, as far as this process may lock
/// memory.
#[must_use]
pub fn hold_in_cache(paths: &[PathBuf]) -> Vec<Mmap> {
    let hold = |path: &PathBuf| {
        let file = fs::File::open(path).unwrap();
        // SAFETY: nobody looks at the bytes.
        let map = unsafe { Mmap::map(&file) }.unwrap();
        let _ = map.lock();
        map
    };
    paths.iter().map(hold).collect()
}

/// A file that no writer of today makes and every reader must take: the header's length is odd, so
/// that no tensor is aligned for its elements. Holds `a`, F32, and `b`, BF16; returns their bytes.
pub fn misaligned_checkpoint(path: &Path) -> (Vec<u8>, Vec<u8>) {
    let (a, b) = (noise(4 * 600_001, 1), noise(2 * 3001, 2));
    let (a_end, b_end) = (a.len(), a.len() + b.len());
    let mut header = format!(
        r#"{{"a":{{"dtype":"F32","shape":[600001],"data_offsets":[0,{a_end}]}},"b":{{"dtype":"BF16","shape":[3001],"data_offsets":[{a_end},{b_end}]}}}}"#
    );
    while header.len().is_multiple_of(2) {
        header.push(' ');
    }
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&a);
    file.extend_from_slice(&b);
    fs::write(path, file).unwrap();
    (a, b)
}
