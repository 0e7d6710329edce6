//! fst, through its facade, as its users call it.

use std::path::Path;

use anyhow::Result;
use fst::{Checkpoint, Engine, Loader, Tensors};
use serde_json::{Map, Value, json};

use super::{Loaded, Op, Visit};

struct All(Tensors);

impl Loaded for All {
    fn bytes(&self) -> u64 {
        self.0.iter().map(|tensor| tensor.byte_len() as u64).sum()
    }

    fn for_each(&self, visit: &mut Visit<'_>) -> Result<()> {
        for tensor in &self.0 {
            visit(tensor.name(), tensor.shape(), tensor.bytes()?);
        }
        Ok(())
    }

    fn detail(&self) -> Option<Value> {
        let report = self.0.report();
        let stages: Map<String, Value> = report
            .stages
            .iter()
            .map(|stage| (stage.name.to_owned(), json!(stage.seconds)))
            .collect();
        Some(json!({
            "engine": format!("{:?}", report.engine),
            "seconds": report.seconds,
            "workers": report.workers,
            "block_bytes": report.block_bytes,
            "bytes_read": report.bytes_read,
            "resident_bytes": report.resident_bytes,
            "stages": stages,
        }))
    }
}

/// Every tensor, or its half, into memory of its own.
pub(super) fn load(folder: &Path, op: Op, engine: Engine) -> Result<Box<dyn Loaded>> {
    let checkpoint = Checkpoint::open(folder)?;
    let mut loader = Loader::new().engine(engine);
    if let Some(dim) = op.halved_dim() {
        for tensor in checkpoint.tensors().iter().filter(|tensor| tensor.shape().len() >= 2) {
            loader = loader.slice(tensor.name(), dim, 0..tensor.shape()[dim] / 2);
        }
    }
    Ok(Box::new(All(loader.load(&checkpoint)?)))
}

/// Every tensor in a mapping of its file, every page touched.
pub(super) fn map_and_touch(folder: &Path) -> Result<Box<dyn Loaded>> {
    let checkpoint = Checkpoint::open(folder)?;
    // SAFETY: the benchmark's files are written before it runs, and by nobody else.
    let tensors = unsafe { Loader::new().map(&checkpoint)? };
    for tensor in &tensors {
        super::official::touch_pages(tensor.bytes()?);
    }
    Ok(Box::new(All(tensors)))
}

/// A checkpoint that was only opened.
struct Opened(Checkpoint);

impl Loaded for Opened {
    fn bytes(&self) -> u64 {
        0
    }

    fn for_each(&self, visit: &mut Visit<'_>) -> Result<()> {
        for tensor in self.0.tensors() {
            visit(tensor.name(), tensor.shape(), &[]);
        }
        Ok(())
    }
}

/// Opens the checkpoint: all headers read and checked.
pub(super) fn open(folder: &Path) -> Result<Box<dyn Loaded>> {
    Ok(Box::new(Opened(Checkpoint::open(folder)?)))
}
