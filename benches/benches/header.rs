//! Headers and slices, ours beside the official crate: parsing in memory, opening files whose
//! pages are cached, and the arithmetic of slices.
//!
//! Names and shapes are those of a mixture of experts (Qwen3-30B-A3B has 18,867 tensors); 100,000
//! tensors are the same model with more experts. Files are a header and a hole.

#![allow(clippy::unwrap_used, missing_docs)]

use std::fs::File;
use std::hint::black_box;
use std::io::Write;
use std::path::{Path, PathBuf};

use divan::Bencher;
use fst_format::{Checkpoint, Dtype, Header, Layout, shard_file_name};
use safetensors::SafeTensors;

const COUNTS: [usize; 2] = [18_867, 100_000];

fn main() {
    divan::main();
}

/// The declarations of `tensors` tensors of which this shard takes its part.
fn layout(tensors: usize, shard: usize, of: usize) -> Layout {
    let mut layout = Layout::new();
    layout.align_data(8);
    let experts = tensors.div_ceil(48 * 3);
    for i in (0..tensors)
        .skip(shard * tensors / of)
        .take((shard + 1) * tensors / of - shard * tensors / of)
    {
        let (layer, expert, part) = (i / 3 / experts, i / 3 % experts, i % 3);
        let (part, shape) = match part {
            0 => ("down_proj", [2048, 768]),
            1 => ("gate_proj", [768, 2048]),
            _ => ("up_proj", [768, 2048]),
        };
        let name = format!("model.layers.{layer}.mlp.experts.{expert}.{part}.weight");
        layout.tensor(name, Dtype::BF16, &shape).unwrap();
    }
    layout
}

/// The JSON of a header, and the length of its data.
fn header(tensors: usize) -> (Vec<u8>, u64) {
    let layout = layout(tensors, 0, 1);
    (layout.header_bytes().unwrap().split_off(8), layout.data_len())
}

/// A folder of shards with holes for data.
fn files(tensors: usize, shards: usize) -> (tempfile::TempDir, Vec<PathBuf>) {
    let folder = tempfile::tempdir().unwrap();
    let paths = (0..shards).map(|shard| {
        let path = folder.path().join(shard_file_name(shard, shards));
        let layout = layout(tensors, shard, shards);
        let bytes = layout.header_bytes().unwrap();
        let mut file = File::create(&path).unwrap();
        file.write_all(&bytes).unwrap();
        file.set_len(bytes.len() as u64 + layout.data_len()).unwrap();
        path
    });
    let paths = paths.collect();
    (folder, paths)
}

/// Parsing a header that is in memory.
mod parse {
    use super::*;

    #[divan::bench(args = COUNTS)]
    fn fst(bencher: Bencher<'_, '_>, tensors: usize) {
        let (json, data_len) = header(tensors);
        bencher.bench_local(|| Header::parse(black_box(&json), data_len).unwrap());
    }

    /// The official crate's structure that validates itself, from the same text.
    #[divan::bench(args = COUNTS)]
    fn official(bencher: Bencher<'_, '_>, tensors: usize) {
        // `read_metadata` wants the data's length behind it: a map of the file gives it.
        let (_folder, paths) = files(tensors, 1);
        let map = map(&paths[0]);
        bencher.bench_local(|| SafeTensors::read_metadata(black_box(&map)).unwrap());
    }
}

#[expect(unsafe_code, reason = "the official crate's documented way to open a file")]
fn map(path: &Path) -> memmap2::Mmap {
    let file = File::open(path).unwrap();
    // SAFETY: the file is this process's own temporary one, which nothing changes.
    unsafe { memmap2::Mmap::map(&file).unwrap() }
}

/// From paths to a table of tensors that can be asked by name.
mod open {
    use super::*;

    #[divan::bench(args = [(18_867, 1), (18_867, 16), (100_000, 1), (100_000, 16)])]
    fn fst(bencher: Bencher<'_, '_>, (tensors, shards): (usize, usize)) {
        let (_folder, paths) = files(tensors, shards);
        bencher.bench_local(|| Checkpoint::open_all(black_box(&paths)).unwrap());
    }

    #[divan::bench(args = [(18_867, 1), (18_867, 16), (100_000, 1), (100_000, 16)])]
    fn official(bencher: Bencher<'_, '_>, (tensors, shards): (usize, usize)) {
        let (_folder, paths) = files(tensors, shards);
        bencher.bench_local(|| {
            let open = |path: &PathBuf| {
                let map = map(path);
                let (_, metadata) = SafeTensors::read_metadata(&map).unwrap();
                (map, metadata)
            };
            black_box(&paths).iter().map(open).collect::<Vec<_>>()
        });
    }
}

/// Half of every matrix as byte runs: made for all tensors, and walked.
mod slice {
    use super::*;

    fn checkpoint() -> Checkpoint {
        let (_folder, paths) = files(18_867, 1);
        Checkpoint::open_all(&paths).unwrap()
    }

    #[divan::bench(args = [0, 1])]
    fn plan(bencher: Bencher<'_, '_>, dim: usize) {
        let checkpoint = checkpoint();
        bencher.bench_local(|| {
            let slices = checkpoint.tensors().iter().map(|tensor| {
                let half = tensor.shape()[dim] / 2;
                tensor.slice(dim, 0..half).unwrap().runs()[0].count
            });
            slices.sum::<u64>()
        });
    }

    #[divan::bench(args = [0, 1])]
    fn walk(bencher: Bencher<'_, '_>, dim: usize) {
        let checkpoint = checkpoint();
        bencher.bench_local(|| {
            let ends = checkpoint.tensors().iter().map(|tensor| {
                let half = tensor.shape()[dim] / 2;
                let slice = tensor.slice(dim, 0..half).unwrap();
                slice.ranges().map(|run| black_box(run).end).max().unwrap_or(0)
            });
            ends.max()
        });
    }
}
