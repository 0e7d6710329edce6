//! How the bytes of a load use host memory on the way to a device: what is asked for, and what was done.

/// How bytes that the page cache (or tmpfs) holds get to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum CachedCopy {
    /// By the way that was measured to be faster. The first load with two gibibytes of cached bytes
    /// stages, and tries the other way on the last of them; later ones of the process to the same device
    /// from the same file system keep to the result. Until then, as [`Staged`](Self::Staged).
    #[default]
    Auto,
    /// As [`Auto`](Self::Auto), but this load measures, however little is cached.
    Measured,
    /// The copy engine reads mappings that are registered with the driver, which pins their pages.
    /// What the driver refuses to register is staged, and so are runs of up to 64 KiB, which a driver
    /// may copy itself. A file that is truncated meanwhile is an error as long as the driver leaves
    /// longer copies to the device; files that others may truncate are safest with
    /// [`Staged`](Self::Staged).
    Registered,
    /// Threads copy into pinned memory, which the copy engine reads.
    Staged,
}

/// How a load uses host memory on the way to a device.
#[derive(Debug, Clone, Copy, Default)]
pub struct DeviceOptions {
    /// How what the page cache holds gets there.
    pub cached: CachedCopy,
    /// Pinned memory stays for later loads.
    pub keep_pinned: bool,
}

/// Something that a load to a device makes, before its copies or beside them.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Preparation {
    /// `read.pin` (host memory), `read.streams`, `read.allocate` (device memory) or
    /// `read.kernels`.
    pub name: &'static str,
    /// Seconds from the start of the reads to when it first began.
    pub began: f64,
    /// Seconds that it took, added up over threads.
    pub seconds: f64,
    /// Those of them that had passed when the first block was there to be copied: the rest was hidden by
    /// copies.
    pub ahead: f64,
}

/// How bytes got from host memory to a device.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub struct DeviceCopy {
    /// What was asked for.
    pub asked: CachedCopy,
    /// Why cached bytes took the way that they took.
    pub reason: String,
    /// Bytes of files that the copy engine took straight out of the page cache.
    pub registered_bytes: u64,
    /// Bytes of files that went through staging memory.
    pub staged_bytes: u64,
    /// Measured rate out of registered mappings, in bytes per second.
    pub registered_rate: Option<f64>,
    /// Measured rate through staging memory, in bytes per second.
    pub staged_rate: Option<f64>,
    /// Why the driver refused to register mappings, if it did.
    pub refused: Option<String>,
    /// Bytes of staging memory that were pinned, at most. Mappings that are registered are pinned for as
    /// long as they are, too.
    pub pinned_bytes: u64,
    /// Copy streams.
    pub streams: usize,
    /// Calls of the driver that queued copies.
    pub copy_calls: u64,
    /// Kernels that were launched: slices, conversions, many small tensors.
    pub launches: u64,
    /// Times that a reader waited for a pinned block: copying was slower than reading.
    pub ring_waits: u64,
    /// What was made for the load, in the order in which it began.
    pub preparations: Vec<Preparation>,
    /// Seconds from the start of the reads to when the first block was there to be copied.
    pub first_block: Option<f64>,
}
