//! A rank's shards on a CUDA device: arenas to be filled, and converted there.

use fst_gpu::kernel::{Kernel, StridedJob};
use fst_gpu::{CudaDevice, DEVICE_ALIGN, DeviceArena, LoadError, Transfer, Transfers};

use super::cuda::{STAGE_ALIGN, Sizes};
use super::layout::{Arrived, Cast, Place, arrived, lay_out};
use super::room::{self, OnDevice};
use super::shards::ARENA;
use crate::error::RankError;
use crate::group::Group;
use crate::rank::{Output, RankPlan};

/// The lengths of the arenas of a rank's shards, and the places of these.
pub(super) fn lay_out_device(view: &RankPlan<'_>) -> (Vec<u64>, Vec<Place>) {
    let (lens, places) = lay_out(view, ARENA, |_, end| end.next_multiple_of(DEVICE_ALIGN));
    // Kernels read whole words.
    (lens.iter().map(|len| len.next_multiple_of(DEVICE_ALIGN)).collect(), places)
}

/// Memory for each arena, if the device has room for them together with staging, and while arenas are
/// converted, for this rank alone and for all of `group` that share it; and, if `check` says so, host
/// memory for what is pinned on the way there.
pub(super) fn reserve(
    view: &RankPlan<'_>,
    casts: &[Option<Cast>],
    (lens, places): (&[u64], &[Place]),
    device: &CudaDevice,
    group: &dyn Group,
    check: bool,
) -> Result<Vec<DeviceArena>, RankError> {
    let sizes = Sizes::of(view, false);
    let refused = |source| too_large(source, view);
    let needed = peak(view, casts, lens, places, sizes.staging + STAGE_ALIGN);
    DeviceArena::check_fits(device, needed).map_err(refused)?;
    let (uuid, free) = (device.uuid()?, device.memory()?.free);
    let largest = largest(view).map(|(_, output)| (output.name, output.bytes));
    let kept = fst_gpu::kept_bytes() as u64;
    let ordinal = device.ordinal();
    let on_device = OnDevice { uuid, ordinal, needed, free, largest, kept };
    room::claim(group, Some(on_device), sizes.pinned_bytes(), check)?;
    let arenas = lens.iter().map(|&len| DeviceArena::new(device, len).map_err(refused));
    Ok(arenas.collect::<Result<_, _>>()?)
}

/// Converts shards of an arena into another of `len` bytes.
///
/// # Safety
///
/// The arena is written, and nobody uses it meanwhile.
pub(super) unsafe fn convert(
    transfers: &Transfers,
    arena: &DeviceArena,
    shards: &[Arrived],
    len: u64,
    view: &RankPlan<'_>,
) -> Result<DeviceArena, RankError> {
    let new = DeviceArena::new(transfers.device(), len).map_err(|e| too_large(e, view))?;
    let mut batch = Vec::new();
    for shard in shards {
        let Some((cast, to, bytes)) = shard.moved else { continue };
        let ((from, into), (kept, converted)) = (cast, shard.kept(cast));
        let src = arena.range(shard.offset, kept)?;
        let dst = new.range(to, bytes)?;
        let job = StridedJob::dense(src, dst, kept / from.size() as u64);
        batch.push(Transfer::Run { kernel: Kernel::Cast { from, to: into }, job });
        let (destination, len) = (dst + converted, bytes - converted);
        batch.push(Transfer::Zero { destination, len });
    }
    // SAFETY: from written shards, which nobody uses, to places of the new arena that lie apart; both
    // arenas live until it returns.
    unsafe { transfers.run(&batch) }?;
    Ok(new)
}

/// The most bytes that are in use at a time: by arenas and staging, or while an arena is converted.
fn peak(
    view: &RankPlan<'_>,
    casts: &[Option<Cast>],
    lens: &[u64],
    places: &[Place],
    staging: u64,
) -> u64 {
    let mut used: u64 = lens.iter().sum();
    let mut most = used + staging;
    for (index, old) in lens.iter().enumerate() {
        let (shards, new) = arrived(index, view, places, casts, DEVICE_ALIGN);
        used += new;
        most = most.max(used);
        if shards.iter().all(|shard| shard.moved.is_some()) {
            used -= old;
        }
    }
    most
}

/// Says which shard is the largest of those that do not fit.
fn too_large(source: fst_gpu::Error, view: &RankPlan<'_>) -> LoadError {
    match (source, largest(view)) {
        (source @ fst_gpu::Error::OutOfMemory { .. }, Some((largest, _))) => {
            LoadError::TooLarge { source, largest }
        }
        (source, _) => source.into(),
    }
}

/// The largest shard.
fn largest<'v>(view: &'v RankPlan<'_>) -> Option<(usize, &'v Output<'v>)> {
    view.outputs().iter().enumerate().max_by_key(|(_, output)| output.bytes)
}
