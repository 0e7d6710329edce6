//! What this machine offers, and which way a load of a path would take.

use std::fs;
use std::path::{Path, PathBuf};

use fst_format::Checkpoint;
use fst_io::{DirectIo, Engine, ResolvedEngine, SourceFile};

use crate::error::Result;
use crate::host::locate;

/// What was found on this machine.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Doctor {
    /// Kernel release.
    pub kernel: String,
    /// Processor cores that this process may use.
    pub cores: usize,
    /// Memory of the machine in bytes, and how much of it can be had now.
    pub memory: Option<(u64, u64)>,
    /// Transparent huge pages.
    pub huge_pages: HugePages,
    /// Why io_uring cannot be used; `None` if it can.
    pub io_uring_refusal: Option<String>,
    /// The engine that `auto` takes, and why.
    pub auto: ResolvedEngine,
    /// What was found at the path, if one was given.
    pub path: Option<PathReport>,
}

/// Whether fresh memory comes in huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum HugePages {
    /// For all memory.
    Always,
    /// For memory that asks, as fst's does.
    OnRequest,
    /// Switched off: the first touch of destination memory is slow.
    Never,
    /// The kernel does not say.
    Unknown,
}

/// What was found at a path.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct PathReport {
    /// The path as given.
    pub path: PathBuf,
    /// Files of the checkpoint.
    pub files: usize,
    /// Bytes of its files.
    pub bytes: u64,
    /// Bytes of its files in the page cache, if the system tells.
    pub resident_bytes: Option<u64>,
    /// Direct I/O on the first file.
    pub direct_io: DirectIo,
    /// Which way a load would take now, in a sentence.
    pub verdict: String,
}

impl Doctor {
    /// Looks at this machine, and at a checkpoint if there is one.
    ///
    /// # Errors
    ///
    /// When the checkpoint at `path` cannot be opened.
    pub fn examine(path: Option<&Path>) -> Result<Self> {
        let io_uring_refusal = fst_io::engine::uring_refusal();
        let auto = ResolvedEngine::resolve(Engine::Auto).map_err(|e| locate(e, &[]))?;
        let path = path.map(|path| examine_path(path, &auto)).transpose()?;
        Ok(Self {
            kernel: read_line("/proc/sys/kernel/osrelease"),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory: memory(),
            huge_pages: huge_pages(),
            io_uring_refusal,
            auto,
            path,
        })
    }
}

fn examine_path(path: &Path, auto: &ResolvedEngine) -> Result<PathReport> {
    let checkpoint = Checkpoint::open(path)?;
    let files = checkpoint
        .shards()
        .iter()
        .map(|shard| SourceFile::open(shard.path(), Some(shard.file_metadata())))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| locate(e, &[]))?;
    let bytes: u64 = files.iter().map(SourceFile::len).sum();
    let resident_bytes = files.iter().map(|file| file.resident_bytes().ok()).sum::<Option<u64>>();
    let direct_io = files.first().map_or(DirectIo::NotTried, |file| file.direct_io().clone());
    let direct = matches!(direct_io, DirectIo::Available { .. });
    let engine = auto.used;
    let cold = if direct {
        format!("cold ranges are read around the page cache by {engine} (O_DIRECT)")
    } else {
        format!("cold ranges are read through the page cache by {engine}: direct I/O {direct_io}")
    };
    let verdict = match resident_bytes {
        Some(0) => cold,
        Some(resident) if resident + (1 << 20) >= bytes => {
            "everything is in the page cache and will be copied from there".to_owned()
        }
        Some(resident) => {
            let percent = resident as f64 / bytes as f64 * 100.0;
            format!("{percent:.0}% is in the page cache and will be copied from there; {cold}")
        }
        None => cold,
    };
    Ok(PathReport {
        path: path.to_owned(),
        files: files.len(),
        bytes,
        resident_bytes,
        direct_io,
        verdict,
    })
}

fn read_line(path: &str) -> String {
    fs::read_to_string(path).map_or_else(|_| "unknown".to_owned(), |s| s.trim().to_owned())
}

fn memory() -> Option<(u64, u64)> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| {
        let line = info.lines().find(|line| line.starts_with(name))?;
        let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
        Some(kib * 1024)
    };
    Some((field("MemTotal:")?, field("MemAvailable:")?))
}

fn huge_pages() -> HugePages {
    let setting = read_line("/sys/kernel/mm/transparent_hugepage/enabled");
    match setting.split_once('[').and_then(|(_, rest)| rest.split_once(']')) {
        Some(("always", _)) => HugePages::Always,
        Some(("madvise", _)) => HugePages::OnRequest,
        Some(("never", _)) => HugePages::Never,
        _ => HugePages::Unknown,
    }
}
