//! The official `safetensors` crate, as its users call it: map the file, deserialize, copy or touch.

use std::fs::File;
use std::hint::black_box;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use memmap2::Mmap;
use safetensors::SafeTensors;
use safetensors::slice::{IndexOp, SliceIterator};
use safetensors::tensor::TensorView;

use super::{Loaded, Op, Visit};

/// Maps a file for reading.
pub(super) fn map(path: &PathBuf) -> Result<Mmap> {
    let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    // SAFETY: the harness owns the files and changes them only between runs.
    unsafe { Mmap::map(&file) }.with_context(|| format!("map {}", path.display()))
}

struct OwnedTensor {
    name: String,
    shape: Vec<usize>,
    data: Vec<u8>,
}

struct Owned(Vec<OwnedTensor>);

impl Loaded for Owned {
    fn bytes(&self) -> u64 {
        self.0.iter().map(|t| t.data.len() as u64).sum()
    }

    fn for_each(&self, visit: &mut Visit<'_>) -> Result<()> {
        for tensor in &self.0 {
            visit(&tensor.name, &tensor.shape, &tensor.data);
        }
        Ok(())
    }
}

/// Every tensor, or its half, copied out of the mapping.
pub(super) fn copy(files: &[PathBuf], op: Op) -> Result<Box<dyn Loaded>> {
    let mut tensors = Vec::new();
    for path in files {
        let map = map(path)?;
        let parsed = SafeTensors::deserialize(&map)?;
        for (name, view) in parsed.iter() {
            let (shape, data) = match op.halved_dim() {
                Some(dim) if view.shape().len() >= 2 => half(&view, dim)?,
                _ => (view.shape().to_vec(), view.data().to_vec()),
            };
            tensors.push(OwnedTensor { name: name.to_owned(), shape, data });
        }
    }
    Ok(Box::new(Owned(tensors)))
}

fn half(view: &TensorView<'_>, dim: usize) -> Result<(Vec<usize>, Vec<u8>)> {
    let end = view.shape()[dim] / 2;
    let slice: SliceIterator<'_> = match dim {
        0 => view.slice(..end),
        _ => view.slice((.., ..end)),
    }
    .map_err(|error| anyhow!("slice of {:?} along {dim}: {error}", view.shape()))?;
    let shape = slice.newshape();
    let mut data = Vec::with_capacity(slice.remaining_byte_len());
    for run in slice {
        data.extend_from_slice(run);
    }
    Ok((shape, data))
}

/// Mapped tensors of several files, every page already touched.
struct Mapped(Vec<Mmap>);

impl Loaded for Mapped {
    fn bytes(&self) -> u64 {
        let parsed = self.0.iter().filter_map(|map| SafeTensors::deserialize(map).ok());
        parsed.map(|p| p.iter().map(|(_, v)| v.data().len() as u64).sum::<u64>()).sum()
    }

    fn for_each(&self, visit: &mut Visit<'_>) -> Result<()> {
        for map in &self.0 {
            for (name, view) in SafeTensors::deserialize(map)?.iter() {
                visit(name, view.shape(), view.data());
            }
        }
        Ok(())
    }
}

/// Maps every file and touches each page of each tensor.
pub(super) fn touch(files: &[PathBuf]) -> Result<Box<dyn Loaded>> {
    let mut maps = Vec::new();
    for path in files {
        let map = map(path)?;
        for (_, view) in SafeTensors::deserialize(&map)?.iter() {
            touch_pages(view.data());
        }
        maps.push(map);
    }
    Ok(Box::new(Mapped(maps)))
}

/// Reads one byte of every page that `data` covers.
pub(super) fn touch_pages(data: &[u8]) {
    let mut sum = 0u8;
    for page in data.chunks(4096) {
        sum = sum.wrapping_add(page[0]);
    }
    if let Some(last) = data.last() {
        sum = sum.wrapping_add(*last);
    }
    black_box(sum);
}

/// Names and shapes of a checkpoint that was only opened.
struct Opened(Vec<Mmap>);

impl Loaded for Opened {
    fn bytes(&self) -> u64 {
        0
    }

    fn for_each(&self, visit: &mut Visit<'_>) -> Result<()> {
        for map in &self.0 {
            for (name, view) in SafeTensors::deserialize(map)?.iter() {
                visit(name, view.shape(), &[]);
            }
        }
        Ok(())
    }
}

/// Maps every file and parses its header.
pub(super) fn open(files: &[PathBuf]) -> Result<Box<dyn Loaded>> {
    let mut maps = Vec::new();
    for path in files {
        let map = map(path)?;
        black_box(SafeTensors::deserialize(&map)?.len());
        maps.push(map);
    }
    Ok(Box::new(Opened(maps)))
}
