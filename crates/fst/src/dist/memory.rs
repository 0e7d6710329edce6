//! A rank's memory, wherever it is: on the host or on a CUDA device.

use fst_dist::{Backend, Group, RankPlan, Region, Space};
use fst_io::ReadStats;

use super::cuda::{CudaRank, STAGE_ALIGN, Sizes, Sources};
use super::cuda_outputs::CudaOutputs;
use super::outputs::HostOutputs;
use super::reader::{FileReader, HostRank};
use super::room;
use crate::device::Device;
use crate::error::Result;
use crate::options::Item;
use crate::tensor::Tensor;

/// The memory of a device, as groups know it.
pub(super) fn space(device: &Device) -> Space {
    device.as_cuda().map_or(Space::Host, |cuda| Space::Device(cuda.ordinal() as u32))
}

/// A rank's shards, to be filled by the exchange.
#[derive(Debug)]
pub(super) enum Outputs {
    Host(HostOutputs),
    Cuda(CudaOutputs),
}

impl Outputs {
    /// Reserves the memory for what the rank keeps of `items`, once all ranks of the group know that
    /// there is room for them.
    pub(super) fn new(
        device: &Device,
        view: &RankPlan<'_>,
        items: &[Item],
        group: &dyn Group,
        check_host: bool,
    ) -> Result<Self> {
        let Some(device) = device.as_cuda() else {
            room::claim_host(group, check_host, room::needed(view, items))?;
            return Ok(Self::Host(HostOutputs::new(view, items)?));
        };
        let staging = view.staging_bytes() + STAGE_ALIGN;
        Ok(Self::Cuda(CudaOutputs::new(view, items, device, staging, group)?))
    }

    /// The memory of each output, apart from each other.
    pub(super) fn regions(&self) -> &[Region] {
        match self {
            Self::Host(outputs) => outputs.regions(),
            Self::Cuda(outputs) => outputs.regions(),
        }
    }

    /// The tensors, converted where that is asked for, and the bytes that conversions made. `alive` is
    /// called again and again meanwhile.
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
        // SAFETY: passed on from the caller.
        unsafe {
            match self {
                Self::Host(outputs) => outputs.finish(view, items, alive),
                Self::Cuda(outputs) => outputs.finish(view, items, alive),
            }
        }
    }
}

/// What the exchange moves bytes with.
#[expect(clippy::large_enum_variant, reason = "one value lives for a load")]
pub(super) enum RankMemory<'a> {
    Host(HostRank<'a>),
    Cuda(CudaRank<'a>),
}

impl<'a> RankMemory<'a> {
    /// The memory of the rank of `view`, one of `neighbours` on its machine. With `keep_pinned`, what is
    /// pinned on the way to a device stays for later loads.
    pub(super) fn new(
        device: &Device,
        view: &RankPlan<'_>,
        sources: Sources<'a>,
        neighbours: u64,
        keep_pinned: bool,
    ) -> Result<Self> {
        let Some(device) = device.as_cuda() else {
            let Sources { files, number, options, gap, watch } = sources;
            let reader = FileReader::new(files, number, options, gap, watch)?;
            return Ok(Self::Host(HostRank::new(reader)));
        };
        let load = view.plan().loads().get(view.rank() as usize).copied().unwrap_or_default();
        // The exchange reads a block at a time, or more for the rank itself.
        let read = load.read().min(view.plan().buffers().direct);
        let sizes = Sizes { staging: view.staging_bytes(), read, neighbours, keep_pinned };
        Ok(Self::Cuda(CudaRank::new(device, sources, sizes)?))
    }

    pub(super) fn backend(&self) -> &dyn Backend {
        match self {
            Self::Host(rank) => rank,
            Self::Cuda(rank) => rank,
        }
    }

    /// What the reads did.
    pub(super) fn into_stats(self) -> Vec<ReadStats> {
        match self {
            Self::Host(rank) => rank.into_stats(),
            Self::Cuda(rank) => rank.into_stats(),
        }
    }
}
