//! The contenders as data, and how each is started.

#[cfg(feature = "candle")]
mod candle;
mod official;
mod ours;
mod ranks;
mod whole_file;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use fst::Engine;
use serde::{Deserialize, Serialize};

use crate::page_cache::CacheState;

/// What a run loads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Op {
    /// Every tensor.
    Load,
    /// The first half along dimension 0 of every tensor of two or more dimensions, the others whole.
    HalfDim0,
    /// The first half along dimension 1 of every tensor of two or more dimensions, the others whole.
    HalfDim1,
    /// By [`RANKS`] ranks of one process, each of which keeps a part of every matrix that is taller
    /// than wide, and the other tensors whole.
    Ranks,
    /// Headers only: every name, dtype and shape is known, no tensor data is read.
    Open,
}

/// Ranks of [`Op::Ranks`].
pub const RANKS: u64 = 4;

/// Whether ranks split a tensor of this shape, along dimension 0.
#[must_use]
pub fn is_split(shape: &[usize]) -> bool {
    matches!(*shape, [rows, columns] if rows > columns && (rows as u64).is_multiple_of(RANKS))
}

impl Op {
    /// Name as in the program's arguments.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Load => "load",
            Self::HalfDim0 => "half-dim0",
            Self::HalfDim1 => "half-dim1",
            Self::Ranks => "ranks",
            Self::Open => "open",
        }
    }

    /// The dimension that is halved, for the slicing operations.
    #[must_use]
    pub fn halved_dim(self) -> Option<usize> {
        match self {
            Self::HalfDim0 => Some(0),
            Self::HalfDim1 => Some(1),
            Self::Load | Self::Ranks | Self::Open => None,
        }
    }

    /// Tensor bytes that the caller ends up with, for a tensor of this shape and whole size.
    #[must_use]
    pub fn bytes_of(self, shape: &[usize], whole: u64) -> u64 {
        match (self, self.halved_dim()) {
            (Self::Open, _) => 0,
            (Self::Ranks, _) if !is_split(shape) => RANKS * whole,
            (_, Some(dim)) if shape.len() >= 2 => {
                whole / (shape[dim] as u64).max(1) * (shape[dim] / 2) as u64
            }
            _ => whole,
        }
    }
}

/// What kind of program a contender is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Built into the contender program.
    Rust,
    /// `peers/load.py`, with this folder of packages beside torch and numpy.
    Python {
        /// Name of the folder under `site/` of the peers' environment.
        packages: &'static str,
    },
}

/// What a contender leaves the caller with, which decides whom it may be compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gives {
    /// Tensors in memory of their own.
    Owned,
    /// Tensors that view a mapping of the file, every page touched once.
    Mapped,
    /// No tensors: a bound that a loader cannot beat.
    Bound,
}

/// One loader that the harness can run.
#[derive(Debug, Clone, Copy)]
pub struct Contender {
    /// Name in arguments, tables and records.
    pub name: &'static str,
    /// One line on what it does.
    pub what: &'static str,
    /// How it is started.
    pub kind: Kind,
    /// What it gives.
    pub gives: Gives,
    /// What it can load.
    pub ops: &'static [Op],
    /// The page-cache states in which it makes sense.
    pub states: &'static [CacheState],
}

const COLD: &[CacheState] = &[CacheState::Cold];
const WARM: &[CacheState] = &[CacheState::Warm];
const BOTH: &[CacheState] = &[CacheState::Cold, CacheState::Warm];
const WHOLE: &[Op] = &[Op::Load];
const RANKED: &[Op] = &[Op::Ranks];
const SLICES: &[Op] = &[Op::Load, Op::HalfDim0, Op::HalfDim1];

/// Every contender, ours first.
pub const CONTENDERS: &[Contender] = &[
    Contender {
        name: "fst",
        what: "this workspace: Loader::load, engine auto",
        kind: Kind::Rust,
        gives: Gives::Owned,
        ops: &[Op::Load, Op::HalfDim0, Op::HalfDim1, Op::Open],
        states: BOTH,
    },
    Contender {
        name: "fst-pread",
        what: "this workspace: Loader::load, engine pread",
        kind: Kind::Rust,
        gives: Gives::Owned,
        ops: WHOLE,
        states: BOTH,
    },
    Contender {
        name: "fst-map",
        what: "this workspace: Loader::map, each page touched",
        kind: Kind::Rust,
        gives: Gives::Mapped,
        ops: WHOLE,
        states: BOTH,
    },
    Contender {
        name: "fst-ranks",
        what: "this workspace: four ranks share the reading, Loader::group and shard",
        kind: Kind::Rust,
        gives: Gives::Owned,
        ops: RANKED,
        states: COLD,
    },
    Contender {
        name: "fst-everyone",
        what: "this workspace: four ranks that each load everything and keep their part",
        kind: Kind::Rust,
        gives: Gives::Owned,
        ops: RANKED,
        states: COLD,
    },
    Contender {
        name: "safetensors-copy",
        what: "crate safetensors 0.8.0: mmap, each tensor copied into a Vec",
        kind: Kind::Rust,
        gives: Gives::Owned,
        ops: SLICES,
        states: BOTH,
    },
    Contender {
        name: "safetensors-touch",
        what: "crate safetensors 0.8.0: mmap, each page touched",
        kind: Kind::Rust,
        gives: Gives::Mapped,
        ops: WHOLE,
        states: BOTH,
    },
    Contender {
        name: "safetensors-open",
        what: "crate safetensors 0.8.0: mmap, SafeTensors::deserialize",
        kind: Kind::Rust,
        gives: Gives::Mapped,
        ops: &[Op::Open],
        states: WARM,
    },
    #[cfg(feature = "candle")]
    Contender {
        name: "candle",
        what: "candle-core 0.11.1: safetensors::load to the CPU",
        kind: Kind::Rust,
        gives: Gives::Owned,
        ops: WHOLE,
        states: BOTH,
    },
    Contender {
        name: "fs-read",
        what: "std::fs::read of each file, header parsed",
        kind: Kind::Rust,
        gives: Gives::Owned,
        ops: WHOLE,
        states: BOTH,
    },
    Contender {
        name: "raw-ceiling",
        what: "io_uring, O_DIRECT, 512 KiB x 32 in flight, into pre-faulted huge pages, nothing else",
        kind: Kind::Rust,
        gives: Gives::Bound,
        ops: WHOLE,
        states: COLD,
    },
    Contender {
        name: "memcpy",
        what: "one copying thread per core, from a mapping with its page table filled, into fresh huge pages",
        kind: Kind::Rust,
        gives: Gives::Bound,
        ops: WHOLE,
        states: WARM,
    },
    Contender {
        name: "pread-copy",
        what: "one thread per core, 4 MiB buffered preads, into fresh huge pages",
        kind: Kind::Rust,
        gives: Gives::Bound,
        ops: WHOLE,
        states: BOTH,
    },
    Contender {
        name: "py-safetensors-0.8.0-copy",
        what: "Python safetensors 0.8.0: safe_open, each tensor cloned",
        kind: Kind::Python { packages: "safetensors-0.8.0" },
        gives: Gives::Owned,
        ops: SLICES,
        states: BOTH,
    },
    Contender {
        name: "py-safetensors-0.8.0-touch",
        what: "Python safetensors 0.8.0: safe_open, each page touched",
        kind: Kind::Python { packages: "safetensors-0.8.0" },
        gives: Gives::Mapped,
        ops: WHOLE,
        states: BOTH,
    },
    Contender {
        name: "py-safetensors-0.9.0rc1-copy",
        what: "Python safetensors 0.9.0rc1: safe_open, each tensor cloned",
        kind: Kind::Python { packages: "safetensors-0.9.0rc1" },
        gives: Gives::Owned,
        ops: SLICES,
        states: BOTH,
    },
    Contender {
        name: "fastsafetensors",
        what: "Python fastsafetensors 0.5.0: nogds, CPU, its default threads, get_tensor of every key",
        kind: Kind::Python { packages: "fastsafetensors-0.5.0" },
        gives: Gives::Owned,
        ops: WHOLE,
        states: BOTH,
    },
    Contender {
        name: "runai",
        what: "Python runai-model-streamer 0.17.0: SafetensorsStreamer at its defaults (tensors owned)",
        kind: Kind::Python { packages: "runai-model-streamer-0.17.0" },
        gives: Gives::Owned,
        ops: WHOLE,
        states: BOTH,
    },
];

/// Finds a contender by name.
#[must_use]
pub fn by_name(name: &str) -> Option<&'static Contender> {
    CONTENDERS.iter().find(|c| c.name == name)
}

/// Whether this is the loader that the benchmarks are about.
#[must_use]
pub fn is_ours(contender: &Contender) -> bool {
    contender.name == OURS || contender.name.starts_with("fst-")
}

/// The contender that all others are compared with.
pub const OURS: &str = "fst";

/// Takes name, shape and bytes of one tensor.
pub type Visit<'a> = dyn FnMut(&str, &[usize], &[u8]) + 'a;

/// What a load left behind; kept until the digest is taken.
pub trait Loaded {
    /// Bytes of tensor data held.
    fn bytes(&self) -> u64;

    /// Calls `visit` with name, shape and bytes of every tensor.
    ///
    /// # Errors
    /// Tensors whose bytes cannot be had.
    fn for_each(&self, visit: &mut Visit<'_>) -> Result<()>;

    /// What the loader reports about itself.
    fn detail(&self) -> Option<serde_json::Value> {
        None
    }
}

/// The measured part of a run.
pub type Job = Box<dyn FnOnce() -> Result<Box<dyn Loaded>>>;

/// Does what must not be measured and returns what must.
///
/// # Errors
/// A name that is unknown or not in Rust, or an operation that the contender does not know.
pub fn prepare(name: &str, op: Op, folder: &Path, files: &[PathBuf]) -> Result<Job> {
    let contender = by_name(name).with_context(|| format!("no contender named {name}"))?;
    if !contender.ops.contains(&op) {
        bail!("{name} does not do {}", op.name());
    }
    let (folder, files) = (folder.to_path_buf(), files.to_vec());
    Ok(match name {
        "fst" if op == Op::Open => Box::new(move || ours::open(&folder)),
        "fst" => Box::new(move || ours::load(&folder, op, Engine::Auto)),
        "fst-pread" => Box::new(move || ours::load(&folder, op, Engine::Pread)),
        "fst-map" => Box::new(move || ours::map_and_touch(&folder)),
        "fst-ranks" => Box::new(move || ranks::shared(&folder)),
        "fst-everyone" => Box::new(move || ranks::everyone(&folder)),
        "safetensors-copy" => Box::new(move || official::copy(&files, op)),
        "safetensors-touch" => Box::new(move || official::touch(&files)),
        "safetensors-open" => Box::new(move || official::open(&files)),
        #[cfg(feature = "candle")]
        "candle" => Box::new(move || candle::load(&files)),
        "fs-read" => Box::new(move || whole_file::fs_read(&files)),
        "raw-ceiling" => whole_file::raw_ceiling(files)?,
        "memcpy" => whole_file::memcpy(files)?,
        "pread-copy" => Box::new(move || whole_file::pread_copy(&files)),
        _ => bail!("{name} is not built into this program"),
    })
}

/// The `.safetensors` files of a folder, in order of name.
///
/// # Errors
/// A folder that cannot be listed, or one without such files.
pub fn safetensors_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            files.push(path);
        }
    }
    if files.is_empty() {
        bail!("{}: no .safetensors file", folder.display());
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        for (i, c) in CONTENDERS.iter().enumerate() {
            assert!(CONTENDERS[..i].iter().all(|d| d.name != c.name), "{}", c.name);
        }
    }

    #[test]
    fn halves_count_whole_rows_and_columns() {
        assert_eq!(Op::HalfDim0.bytes_of(&[5, 4], 40), 16);
        assert_eq!(Op::HalfDim1.bytes_of(&[5, 4], 40), 20);
        assert_eq!(Op::HalfDim1.bytes_of(&[4], 8), 8);
        assert_eq!(Op::Load.bytes_of(&[5, 4], 40), 40);
        assert_eq!(Op::Open.bytes_of(&[5, 4], 40), 0);
    }
}
