//! A rank's shards on a CUDA device: arenas to be filled, and the tensors at the end, converted there.

use std::sync::Arc;

use fst_dist::{Group, Output, RankPlan, Region};
use fst_gpu::kernel::{Kernel, StridedJob};
use fst_gpu::{CudaDevice, DEVICE_ALIGN, DeviceArena, Transfer, Transfers};

use super::layout::{Place, arrived, check_dtypes, lay_out};
use super::room;
use crate::cuda::CudaMemory;
use crate::error::{DeviceError, Error, Result};
use crate::loader::ARENA;
use crate::options::Item;
use crate::tensor::{Data, Tensor};

/// A rank's shards on a device, to be filled by the exchange.
#[derive(Debug)]
pub(super) struct CudaOutputs {
    device: CudaDevice,
    arenas: Vec<DeviceArena>,
    places: Vec<Place>,
    regions: Vec<Region>,
}

impl CudaOutputs {
    /// Reserves the memory for what the rank keeps of `items`. Refuses, before anything is reserved,
    /// what the device has no room for together with `staging` bytes, or while arenas are converted,
    /// by this rank alone or by all of `group` that share it.
    pub(super) fn new(
        view: &RankPlan<'_>,
        items: &[Item],
        device: &CudaDevice,
        staging: u64,
        group: &dyn Group,
    ) -> Result<Self> {
        check_dtypes(view, items)?;
        let (lens, places) = lay_out(view, ARENA, |_, end| end.next_multiple_of(DEVICE_ALIGN));
        // Kernels read whole words.
        let lens: Vec<u64> = lens.iter().map(|len| len.next_multiple_of(DEVICE_ALIGN)).collect();
        let told = |source| too_large(source, view);
        let most = peak(view, items, &lens, &places, staging);
        DeviceArena::check_fits(device, most).map_err(told)?;
        room::claim(group, device, most, largest(view))?;
        let arenas: Vec<DeviceArena> = lens
            .iter()
            .map(|&len| DeviceArena::new(device, len).map_err(told))
            .collect::<Result<_>>()?;
        let region = |(output, place): (&Output<'_>, &Place)| Region {
            addr: arenas[place.arena].address() + place.offset,
            len: output.bytes,
        };
        let regions = view.outputs().iter().zip(&places).map(region).collect();
        Ok(Self { device: device.clone(), arenas, places, regions })
    }

    /// The memory of each output, apart from each other.
    pub(super) fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The tensors, converted where that is asked for, and the bytes that conversions made. Arenas are
    /// converted one after the other, and given back where nothing else is in them.
    ///
    /// # Safety
    ///
    /// The regions are written, and nobody uses them any more.
    pub(super) unsafe fn finish(
        self,
        view: &RankPlan<'_>,
        items: &[Item],
        alive: &dyn Fn(),
    ) -> Result<(Vec<Tensor>, u64)> {
        let mut tensors = Vec::with_capacity(self.places.len());
        let mut made = 0;
        let transfers = Transfers::new(&self.device).map_err(DeviceError::Cuda)?;
        for (index, arena) in self.arenas.into_iter().enumerate() {
            alive();
            let (shards, len) = arrived(index, view, &self.places, items, DEVICE_ALIGN);
            let new = DeviceArena::new(&self.device, len).map_err(|e| too_large(e, view))?;
            let mut batch = Vec::new();
            for shard in &shards {
                let (Some((to, bytes)), Some((from, into))) = (shard.moved, shard.cast()) else {
                    continue;
                };
                let (kept, converted) = shard.kept();
                let range = |arena: &DeviceArena, offset, len| {
                    arena.range(offset, len).map_err(DeviceError::Cuda)
                };
                let src = range(&arena, shard.offset, kept)?;
                let dst = range(&new, to, bytes)?;
                let job = StridedJob::dense(src, dst, kept / from.size() as u64);
                batch.push(Transfer::Run { kernel: Kernel::Cast { from, to: into }, job });
                let (destination, len) = (dst + converted, bytes - converted);
                batch.push(Transfer::Zero { destination, len });
            }
            // SAFETY: from written shards, which nobody uses, to places of the new arena that lie apart;
            // both arenas live until it returns.
            unsafe { transfers.run(&batch) }.map_err(DeviceError::Cuda)?;
            made += len;
            let (old, new) = (CudaMemory::new(arena), CudaMemory::new(new));
            for shard in &shards {
                let (memory, offset, len) = match shard.moved {
                    Some((offset, len)) => (&new, offset, len),
                    None => (&old, shard.offset, shard.output.bytes),
                };
                let memory = Arc::clone(memory);
                tensors.push(shard.tensor(Data::Cuda {
                    memory,
                    offset,
                    len,
                    owners: Arc::default(),
                }));
            }
        }
        Ok((tensors, made))
    }
}

/// The most bytes that are in use at a time: by arenas and staging, or while an arena is converted.
fn peak(view: &RankPlan<'_>, items: &[Item], lens: &[u64], places: &[Place], staging: u64) -> u64 {
    let mut used: u64 = lens.iter().sum();
    let mut most = used + staging;
    for (index, old) in lens.iter().enumerate() {
        let (shards, new) = arrived(index, view, places, items, DEVICE_ALIGN);
        used += new;
        most = most.max(used);
        if shards.iter().all(|shard| shard.moved.is_some()) {
            used -= old;
        }
    }
    most
}

/// Says which shard is the largest of those that do not fit.
fn too_large(source: fst_gpu::Error, view: &RankPlan<'_>) -> Error {
    match (source, largest(view)) {
        (source @ fst_gpu::Error::OutOfMemory { .. }, Some((largest, bytes))) => {
            let largest = largest.to_owned();
            DeviceError::TooLarge { source, largest, bytes }.into()
        }
        (source, _) => DeviceError::Cuda(source).into(),
    }
}

/// Name and bytes of the largest shard.
fn largest<'v>(view: &'v RankPlan<'_>) -> Option<(&'v str, u64)> {
    let largest = view.outputs().iter().max_by_key(|output| output.bytes)?;
    Some((largest.name, largest.bytes))
}
