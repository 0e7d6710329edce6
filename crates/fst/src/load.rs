//! A planned load of items, wherever it goes: pieces go down, and what they become comes back as tensors.

use fst_format::{Checkpoint, Planned};
use fst_gpu::cufile::{GdsMode, GdsStatus};
use fst_gpu::{ArenaOptions, CudaDevice, DeviceArena, DeviceOptions, PieceLoad};
use fst_io::sink::SinkError;
use fst_io::watch::Watch;
use fst_io::{Budget, Engine, ReadOptions, ReadStats, ResolvedEngine};

use crate::device::Device;
use crate::error::{Error, Result};
use crate::files::{locate, locate_load, open_pieces};
use crate::loader::Loader;
use crate::tensor::{Data, Tensor};

/// Tensors on a device that are shorter than this many bytes share no arena with longer ones, so that
/// who keeps the norms of a model does not keep all of it.
const APART: u64 = 1 << 20;

/// Takes a tensor that is complete, with its place in the list of items; from reader threads.
pub(crate) type Deliver<'a> = &'a (dyn Fn(usize, Tensor) -> Result<(), SinkError> + Send + Sync);

/// A load of items that is planned and whose files are open.
#[derive(Debug)]
pub(crate) struct Load {
    items: Vec<Planned>,
    pub(crate) checkpoint: Checkpoint,
    /// The load of the pieces that the items are, in their order.
    pub(crate) pieces: Box<dyn PieceLoad>,
}

impl Load {
    /// Plans the loading of `items` as `loader` says into arenas of about `arena` bytes, for a stream or for
    /// memory that holds all of them at once. Of a stream `in_order`, arenas become complete in the order of
    /// the items.
    pub(crate) fn new(
        loader: &Loader,
        checkpoint: &Checkpoint,
        items: Vec<Planned>,
        goals: &Goals,
        arena: u64,
        stream: Option<bool>,
    ) -> Result<Self> {
        let arenas = ArenaOptions {
            bytes: arena,
            // Pages of host memory go back one by one, arenas of devices as a whole.
            apart: if stream.is_some() { 0 } else { APART },
            in_order: stream == Some(true),
            keep: loader.keep,
        };
        let (files, pieces) = open_pieces(checkpoint, &items)?;
        let pieces = pieces.into_iter().zip(&goals.of).map(|(piece, device)| piece.on(*device));
        let devices: Vec<Option<CudaDevice>> =
            goals.devices.iter().map(|device| device.as_cuda().cloned()).collect();
        let options = loader.device_options;
        let load = fst_gpu::load(files, pieces.collect(), &devices, arenas, options);
        let checkpoint = checkpoint.clone();
        Ok(Self { pieces: load.map_err(|e| locate_load(e, &items))?, items, checkpoint })
    }

    /// Plans the loading of `items` into device memory of the caller's, one arena for each.
    ///
    /// # Safety
    ///
    /// Nobody else uses the memory until the load is over, and what is delivered is gone before it is.
    pub(crate) unsafe fn into_memory(
        checkpoint: &Checkpoint,
        items: Vec<Planned>,
        options: DeviceOptions,
        memory: Vec<DeviceArena>,
    ) -> Result<Self> {
        let (files, pieces) = open_pieces(checkpoint, &items)?;
        // SAFETY: passed on from the caller.
        let load = unsafe { fst_gpu::load_into_devices(files, pieces, memory, options) };
        let checkpoint = checkpoint.clone();
        Ok(Self { pieces: load.map_err(|e| locate_load(e, &items))?, items, checkpoint })
    }

    pub(crate) fn items(&self) -> &[Planned] {
        &self.items
    }

    /// Refuses, before anything is read, what the device has no room for; with `host`, also what the
    /// host has none for.
    pub(crate) fn check_memory(&self, read: &ReadOptions, host: bool) -> Result<()> {
        self.pieces.check_memory(read, host).map_err(|e| locate_load(e, &self.items))
    }

    /// Reads everything; every item is delivered once, unless there is an error.
    pub(crate) fn run(
        &self,
        options: &ReadOptions,
        budget: Option<&Budget>,
        watch: &Watch,
        deliver: Deliver<'_>,
    ) -> Result<Vec<ReadStats>> {
        let landed = |index: usize, filled| {
            let item = &self.items[index];
            deliver(index, Tensor::of(item, Data::of(filled, item.byte_len())))
        };
        let read = self.pieces.run(options, budget, watch, &landed);
        read.map_err(|e| locate_load(e, &self.items))
    }
}

/// Where items go.
pub(crate) struct Goals {
    /// Each device once.
    pub(crate) devices: Vec<Device>,
    /// For each item, which of them.
    pub(crate) of: Vec<u32>,
}

impl Goals {
    /// To the devices of the items' requests, or the loader's.
    pub(crate) fn new(loader: &Loader, items: &[Planned]) -> Result<Self> {
        let mut goals = Self { devices: Vec::new(), of: Vec::with_capacity(items.len()) };
        let mut names: Vec<Option<&str>> = Vec::new();
        let mut numbers = Vec::new();
        for item in items {
            let known = names.iter().position(|name| *name == item.device());
            let known = known.unwrap_or(names.len());
            if known == names.len() {
                let device = loader.device_of(item)?;
                let number = goals.devices.iter().position(|one| *one == device);
                let number = number.unwrap_or(goals.devices.len());
                if number == goals.devices.len() {
                    goals.devices.push(device);
                }
                names.push(item.device());
                numbers.push(number as u32);
            }
            goals.of.push(numbers[known]);
        }
        if goals.devices.is_empty() {
            goals.devices.push(loader.target().clone());
        }
        let several = goals.devices.iter().filter(|device| !device.is_host()).nth(1);
        match several.filter(|_| loader.read.engine == Engine::Gds) {
            Some(device) => Err(Error::Engine {
                engine: Engine::Gds,
                device: device.clone(),
                reason: "the load is to another device as well, and cuFile reads for one"
                    .to_owned(),
            }),
            None => Ok(goals),
        }
    }

    /// The device of an item, by its place.
    pub(crate) fn device(&self, item: usize) -> &Device {
        &self.devices[self.of[item] as usize]
    }
}

impl Loader {
    /// Whether an item goes to host memory.
    pub(crate) fn is_to_host(&self, item: &Planned) -> bool {
        item.device().map_or_else(|| self.target().is_host(), |name| name == "host")
    }

    /// Where an item goes.
    pub(crate) fn device_of(&self, item: &Planned) -> Result<Device> {
        match item.device() {
            Some(name) if *name != *self.target().to_string() => name.parse(),
            _ => Ok(self.target().clone()),
        }
    }
}

/// The engine that runs for `asked` on this machine, for this checkpoint and to this device.
pub(crate) fn resolve_engine(
    asked: Engine,
    checkpoint: &Checkpoint,
    device: &Device,
) -> Result<ResolvedEngine> {
    if checkpoint.shards().iter().any(|shard| shard.file_metadata().is_none()) {
        return ResolvedEngine::resolve_remote(asked).map_err(|e| locate(e, &[]));
    }
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
