//! Checkpoints for the tests of loads, and what the official crate reads from them.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use fst::{Checkpoint, Engine, Loader, Tensor, Tensors};
use safetensors::SafeTensors;

pub(crate) const ENGINES: [Engine; 4] = if cfg!(any(not(target_os = "linux"), fst_portable)) {
    [Engine::Auto, Engine::Pread, Engine::Auto, Engine::Pread]
} else {
    [Engine::Auto, Engine::Uring, Engine::Pread, Engine::Mmap]
};

#[allow(unused_imports, reason = "each test binary uses its part")]
pub(crate) use fst_tests::{
    misaligned_checkpoint as misaligned, noise, odd_checkpoint as checkpoint, write,
};

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

pub(crate) fn load(loader: &Loader, paths: &[PathBuf]) -> Tensors {
    loader.load(&Checkpoint::open_all(paths).unwrap()).unwrap()
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
