//! What this machine offers, and which way a load of a path would take.

use std::fs;
use std::path::{Path, PathBuf};

#[cfg(feature = "dist")]
use fst_dist::{GroupError, group::Nccl};
use fst_format::Checkpoint;
use fst_gpu::CudaDevice;
use fst_gpu::cufile::GdsStatus;
use fst_io::mount::FileSystem;
use fst_io::{DirectIo, Engine, ResolvedEngine};

use crate::device::Device;
use crate::error::Result;
use crate::files::{locate, open_shard};
use crate::loader::Loader;
use fst_io::available::AvailableMemory;

/// What was found on this machine.
#[derive(Debug)]
#[non_exhaustive]
pub struct Doctor {
    /// Kernel release.
    pub kernel: String,
    /// Processor cores that this process may use.
    pub cores: usize,
    /// Memory of the machine in bytes, and how much of it can be had now.
    pub memory: Option<(u64, u64)>,
    /// Memory that a load can fill now, and the limit that leaves no more.
    pub available: Option<AvailableMemory>,
    /// Transparent huge pages.
    pub huge_pages: HugePages,
    /// Why io_uring cannot be used; `None` if it can.
    pub io_uring_refusal: Option<String>,
    /// The engine that `auto` takes, and why.
    pub auto: ResolvedEngine,
    /// The CUDA devices, or why there is no driver to ask.
    pub cuda: Result<Vec<CudaReport>, fst_gpu::Error>,
    /// GPUDirect Storage.
    pub gds: GdsStatus,
    /// The NCCL library found, or what was looked for.
    #[cfg(feature = "dist")]
    pub nccl: Result<String, GroupError>,
    /// What was found at the path, if one was given.
    pub path: Option<PathReport>,
}

/// A CUDA device.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CudaReport {
    /// Its number.
    pub ordinal: usize,
    /// The product's name.
    pub name: String,
    /// Memory in bytes, and how much of it is free; `None` where the device cannot be opened.
    pub memory: Option<(u64, u64)>,
    /// The CUDA version that the driver offers.
    pub driver: Option<String>,
}

/// A rate that was tried out.
#[derive(Debug)]
#[non_exhaustive]
pub struct Measurement {
    /// The engine.
    pub engine: Engine,
    /// Where to.
    pub device: Device,
    /// Bytes per second in units of 1e9, or why it did not work.
    pub gb_per_s: Result<f64>,
    /// Share of the bytes that was in the page cache, from 0 to 1.
    pub resident: f64,
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
    /// The file system that the first file lies on, if the system tells.
    pub file_system: Option<FileSystem>,
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
        #[cfg(feature = "dist")]
        let nccl = Nccl::open().map(|nccl| nccl.name().to_owned());
        Ok(Self {
            kernel: read_line("/proc/sys/kernel/osrelease"),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory: memory(),
            available: AvailableMemory::now(),
            huge_pages: huge_pages(),
            io_uring_refusal,
            auto,
            cuda: CudaDevice::count().map(|count| (0..count).map(cuda_report).collect()),
            gds: GdsStatus::probe(),
            #[cfg(feature = "dist")]
            nccl,
            path,
        })
    }

    /// Tries the engines on the first tensors of a checkpoint, about `bytes` of them: to the host,
    /// and by cuFile to the first CUDA device if there is one. What the page cache holds decides
    /// much; direct reads leave it as it is.
    ///
    /// # Errors
    ///
    /// When the checkpoint at `path` cannot be opened.
    pub fn measure(path: &Path, bytes: u64) -> Result<Vec<Measurement>> {
        let checkpoint = Checkpoint::open(path)?;
        let part = first_of(&checkpoint, bytes);
        let mut ways = vec![
            (Engine::Uring, Device::host()),
            (Engine::Pread, Device::host()),
            (Engine::Mmap, Device::host()),
        ];
        if let Ok(device) = Device::cuda(0) {
            ways.extend([(Engine::Auto, device.clone()), (Engine::Gds, device)]);
        }
        let measure = |(engine, device): (Engine, Device)| {
            let loader = Loader::new().engine(engine).device(device.clone());
            let loaded = loader.request(&part).load(&checkpoint);
            let resident = loaded.as_ref().map_or(0.0, |tensors| {
                let report = tensors.report();
                let total: u64 = checkpoint.shards().iter().map(|shard| shard.len()).sum();
                report.resident_bytes.unwrap_or(0) as f64 / total.max(1) as f64
            });
            let gb_per_s = loaded.map(|tensors| {
                let report = tensors.report();
                let seconds = report.stage("read").map_or(report.seconds, |read| read.seconds);
                report.bytes as f64 / seconds.max(f64::MIN_POSITIVE) / 1e9
            });
            Measurement { engine, device, gb_per_s, resident }
        };
        Ok(ways.into_iter().map(measure).collect())
    }
}

/// The names of the first tensors of a checkpoint, of so many bytes together or a few more.
pub(crate) fn first_of(checkpoint: &Checkpoint, bytes: u64) -> Vec<String> {
    let mut end = 0;
    let wanted = checkpoint.tensors().iter().take_while(|tensor| {
        let wanted = end < bytes;
        end += tensor.byte_len();
        wanted
    });
    wanted.map(|tensor| tensor.name().to_owned()).collect()
}

fn cuda_report(ordinal: usize) -> CudaReport {
    let unknown = CudaReport { ordinal, name: "unknown".to_owned(), memory: None, driver: None };
    CudaDevice::open(ordinal).map_or(unknown, |device| CudaReport {
        ordinal,
        name: device.name().to_owned(),
        memory: device.memory().ok().map(|memory| (memory.total, memory.free)),
        driver: device.driver_version().ok().map(|version| version.to_string()),
    })
}

fn examine_path(path: &Path, auto: &ResolvedEngine) -> Result<PathReport> {
    let checkpoint = Checkpoint::open(path)?;
    let (mut bytes, mut resident_bytes, mut direct_io) = (0, Some(0), None);
    // One at a time: there may be more than a process can have open.
    for shard in 0..checkpoint.shards().len() {
        let file = open_shard(&checkpoint, &[], shard)?;
        bytes += file.len();
        resident_bytes = resident_bytes.zip(file.resident_bytes().ok()).map(|(sum, of)| sum + of);
        direct_io.get_or_insert_with(|| file.direct_io().clone());
    }
    let direct_io = direct_io.unwrap_or(DirectIo::NotTried);
    let direct = matches!(direct_io, DirectIo::Available { .. });
    let engine = auto.used;
    let cold = if direct {
        format!("cold ranges are read around the page cache by {engine} (O_DIRECT)")
    } else {
        format!("cold ranges are read through the page cache by {engine}: direct I/O {direct_io}")
    };
    let remote = checkpoint.shards().iter().any(|shard| shard.file_metadata().is_none());
    let verdict = match resident_bytes {
        _ if remote => "ranges are asked for where the files are stored, by object".to_owned(),
        Some(resident) if resident < bytes / 100 => cold,
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
        files: checkpoint.shards().len(),
        bytes,
        resident_bytes,
        file_system: checkpoint.shards().first().and_then(|s| FileSystem::of(s.path()).ok()),
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
