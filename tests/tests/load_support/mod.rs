//! Checkpoints for the tests of loads, and what the official crate reads from them.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use fst::{Checkpoint, Engine, Loader, Tensor, Tensors};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype as OfficialDtype, TensorView};

pub(crate) const ENGINES: [Engine; 4] = [Engine::Auto, Engine::Uring, Engine::Pread, Engine::Mmap];

pub(crate) type Spec = (&'static str, OfficialDtype, Vec<usize>);

pub(crate) fn noise(len: usize, seed: u64) -> Vec<u8> {
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

pub(crate) fn bits(dtype: OfficialDtype) -> usize {
    dtype.bitsize()
}

/// Writes a file with the official crate.
pub(crate) fn write(path: &Path, specs: &[Spec]) {
    let data: Vec<(String, Vec<u8>)> = specs
        .iter()
        .enumerate()
        .map(|(i, (name, dtype, shape))| {
            let len = shape.iter().product::<usize>() * bits(*dtype) / 8;
            ((*name).to_owned(), noise(len, i as u64 + 1))
        })
        .collect();
    let views = specs.iter().zip(&data).map(|((_, dtype, shape), (name, data))| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// What the official crate reads.
pub(crate) fn official(paths: &[PathBuf]) -> BTreeMap<String, (String, Vec<usize>, Vec<u8>)> {
    let mut all = BTreeMap::new();
    for path in paths {
        let bytes = fs::read(path).unwrap();
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let dtype = format!("{}", view.dtype());
            all.insert(name, (dtype, view.shape().to_vec(), view.data().to_vec()));
        }
    }
    all
}

pub(crate) fn ours<'a>(
    tensors: impl IntoIterator<Item = &'a Tensor>,
) -> BTreeMap<String, (String, Vec<usize>, Vec<u8>)> {
    let entry = |t: &Tensor| {
        let data = t.bytes().unwrap().to_vec();
        (t.name().to_owned(), (t.dtype().to_string(), t.shape().to_vec(), data))
    };
    tensors.into_iter().map(entry).collect()
}

/// A checkpoint of two shards, with everything that is odd: all kinds of dtypes, scalars, empty
/// tensors, large and small ones.
pub(crate) fn checkpoint(dir: &Path) -> Vec<PathBuf> {
    use OfficialDtype::{BF16, BOOL, F8_E4M3, F16, F32, F64, I64, U8};
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

pub(crate) fn load(loader: &Loader, paths: &[PathBuf]) -> Tensors {
    loader.load(&Checkpoint::open_all(paths).unwrap()).unwrap()
}

/// A file that no writer of today makes and every reader must take: the header's length is odd, so
/// that no tensor is aligned for its elements.
pub(crate) fn misaligned(path: &Path) -> (Vec<u8>, Vec<u8>) {
    let (a, b) = (noise(4 * 600_001, 1), noise(2 * 3001, 2));
    let (a_end, b_end) = (a.len(), a.len() + b.len());
    let mut header = format!(
        r#"{{"a":{{"dtype":"F32","shape":[600001],"data_offsets":[0,{a_end}]}},"b":{{"dtype":"BF16","shape":[3001],"data_offsets":[{a_end},{b_end}]}}}}"#
    );
    while header.len() % 2 == 0 {
        header.push(' ');
    }
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&a);
    file.extend_from_slice(&b);
    fs::write(path, file).unwrap();
    (a, b)
}

/// The obvious way to slice: element by element.
pub(crate) fn slice(
    data: &[u8],
    shape: &[usize],
    size: usize,
    dim: usize,
    range: std::ops::Range<usize>,
) -> Vec<u8> {
    let inner: usize = shape[dim + 1..].iter().product();
    let mut out = Vec::new();
    for (i, element) in data.chunks_exact(size).enumerate() {
        if range.contains(&(i / inner % shape[dim])) {
            out.extend_from_slice(element);
        }
    }
    out
}
