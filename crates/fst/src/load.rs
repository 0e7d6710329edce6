//! A planned load, wherever it goes.

use fst_format::Checkpoint;
use fst_gpu::cufile::{GdsMode, GdsStatus};
use fst_io::{Budget, Engine, ReadOptions, ReadStats, ResolvedEngine, SourceFile};

use crate::available;
use crate::cached::{DeviceCopy, DeviceOptions};
use crate::cuda::CudaLoad;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::host::{Deliver, HostLoad, SCRATCH, Watch, locate};
use crate::options::Item;

/// Tensors on a device that are shorter than this many bytes share no arena with longer ones, so that
/// who keeps the norms of a model does not keep all of it.
const APART: u64 = 1 << 20;

/// A load that is planned and whose files are open.
#[derive(Debug)]
pub(crate) enum Load {
    Host(Box<HostLoad>),
    Cuda(Box<CudaLoad>),
}

impl Load {
    /// Plans the loading of `items` into arenas of about `arena` bytes, for a stream or for memory that
    /// holds all of them at once. Of a stream `in_order`, arenas become complete in the order of the
    /// items.
    pub(crate) fn new(
        device: &Device,
        checkpoint: &Checkpoint,
        items: Vec<Item>,
        arena: u64,
        stream: Option<bool>,
    ) -> Result<Self> {
        let in_order = stream == Some(true);
        // Pages of host memory go back one by one, arenas of devices as a whole.
        let apart = if stream.is_some() { 0 } else { APART };
        Ok(match device.as_cuda() {
            None => Self::Host(Box::new(HostLoad::new(checkpoint, items, arena, in_order)?)),
            Some(device) => {
                Self::Cuda(Box::new(CudaLoad::new(checkpoint, items, device, arena, apart)?))
            }
        })
    }

    /// Says how host memory is used on the way to a device.
    pub(crate) fn with_options(self, options: DeviceOptions) -> Self {
        match self {
            Self::Cuda(load) => Self::Cuda(Box::new(load.with_options(options))),
            host => host,
        }
    }

    /// How bytes got to a device, once the load is done.
    pub(crate) fn device_copy(&self) -> Option<DeviceCopy> {
        match self {
            Self::Host(_) => None,
            Self::Cuda(load) => load.copy(),
        }
    }

    pub(crate) fn items(&self) -> &[Item] {
        match self {
            Self::Host(load) => load.items(),
            Self::Cuda(load) => load.items(),
        }
    }

    /// Bytes that will be read.
    pub(crate) fn bytes_read(&self) -> u64 {
        match self {
            Self::Host(load) => load.bytes_read(),
            Self::Cuda(load) => load.bytes_read(),
        }
    }

    /// Bytes of arenas that must be in memory at once.
    pub(crate) fn least_memory(&self, in_order: bool) -> u64 {
        match self {
            Self::Host(load) => load.least_memory(),
            Self::Cuda(load) => load.least_memory(in_order),
        }
    }

    /// Bytes of the tensors' memory that a stream uses beside the arenas.
    pub(crate) fn scratch(&self, read: &ReadOptions) -> u64 {
        match self {
            Self::Host(load) if load.uses_scratch() => SCRATCH,
            Self::Host(_) => 0,
            Self::Cuda(load) => load.scratch(read, true),
        }
    }

    /// Keeps what is used beside the arenas small, for a stream within `budget` bytes.
    pub(crate) fn within(self, budget: u64, in_order: bool) -> Self {
        match self {
            Self::Cuda(load) => Self::Cuda(Box::new(load.within(budget, in_order))),
            host => host,
        }
    }

    /// The files that are read.
    pub(crate) fn files(&self) -> &[SourceFile] {
        match self {
            Self::Host(load) => load.files(),
            Self::Cuda(load) => load.files(),
        }
    }

    /// Refuses, before anything is read, what the device has no room for; with `host`, also what the
    /// host has none for.
    pub(crate) fn check_memory(&self, read: &ReadOptions, host: bool) -> Result<()> {
        match self {
            Self::Host(load) => available::check(host, load.memory()),
            Self::Cuda(load) => load.check_memory(read),
        }
    }

    /// Reads everything; every item is delivered once, unless there is an error.
    pub(crate) fn run(
        &self,
        options: &ReadOptions,
        budget: Option<&Budget>,
        watch: &Watch,
        deliver: Deliver<'_>,
    ) -> Result<Vec<ReadStats>> {
        match self {
            Self::Host(load) => load.run(options, budget, watch, deliver),
            Self::Cuda(load) => load.run(options, budget, watch, deliver),
        }
    }
}

/// The engine that runs for `asked` on this machine, to this device.
pub(crate) fn resolve_engine(asked: Engine, device: &Device) -> Result<ResolvedEngine> {
    if asked != Engine::Gds || device.is_host() {
        return ResolvedEngine::resolve(asked).map_err(|e| locate(e, &[]));
    }
    let refuse = |reason| Error::Engine { engine: asked, device: device.clone(), reason };
    match GdsStatus::probe().mode {
        GdsMode::Direct => Ok(ResolvedEngine {
            asked,
            used: asked,
            reason: "asked for; cuFile moves bytes directly where the file system allows".into(),
        }),
        GdsMode::Compatibility => Ok(ResolvedEngine {
            asked,
            used: asked,
            reason: "asked for; cuFile runs in compatibility mode, through host memory".into(),
        }),
        GdsMode::Unavailable(why) => Err(refuse(why.to_string())),
        _ => Err(refuse("cuFile reports a mode that is not known".to_owned())),
    }
}
