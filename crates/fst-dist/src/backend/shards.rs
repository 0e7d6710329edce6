//! A rank's load of its shards out of files, into memory of its own on the host or on a CUDA device.

use std::sync::Arc;

use fst_gpu::{Filled, HOST_ALIGN};

#[cfg(feature = "cuda")]
use fst_gpu::{CudaDevice, CudaMemory, DEVICE_ALIGN, DeviceArena, Transfers};
use fst_io::{HostBuffer, ReadStats, SharedBuffer};

use super::attend::attending;
#[cfg(feature = "cuda")]
use super::cuda::{CudaRank, Sizes};
#[cfg(feature = "cuda")]
use super::cuda_outputs;
use super::files::{RankFiles, Reads};
use super::host::{self, HostRank};
use super::layout::{Arrived, Cast, Place, arrived, converted};
use super::{Backend, room};
use crate::error::RankError;
use crate::exchange::{ExchangeReport, Region, load_in};
use crate::group::{Group, Occupied};
use crate::memory::Space;
use crate::rank::RankPlan;

/// The most bytes of an arena that holds several shards.
pub(super) const ARENA: u64 = 1 << 30;

/// Where a rank keeps its shards.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum LoadTarget {
    /// In host memory.
    Host,
    /// On a CUDA device.
    #[cfg(feature = "cuda")]
    Cuda {
        /// The device.
        device: CudaDevice,
        /// Whether host memory that is pinned on the way there stays pinned for later loads.
        keep_pinned: bool,
    },
}

impl LoadTarget {
    /// The memory, as groups know it.
    #[must_use]
    pub fn space(&self) -> Space {
        match self {
            Self::Host => Space::Host,
            #[cfg(feature = "cuda")]
            Self::Cuda { device, .. } => Space::Device(device.ordinal() as u32),
        }
    }
}

/// A rank's load, with memory reserved for what it keeps.
///
/// ```no_run
/// # fn load(view: &fst_dist::RankPlan<'_>, group: &dyn fst_dist::Group, files: fst_dist::RankFiles<'_>)
/// # -> Result<(), fst_dist::RankError> {
/// use fst_dist::{LoadTarget, ShardLoad};
///
/// let group = group.occupy()?;
/// let load = ShardLoad::reserve(view, &[], LoadTarget::Host, &group, true)?;
/// let deliver = |output: usize, _shard| println!("{} is there", view.outputs()[output].name);
/// let arrived = load.exchange(&group, files, &|| false, &deliver)?;
/// arrived.convert(&|| group.alive(), &deliver)?;
/// group.end()?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct ShardLoad<'a> {
    view: &'a RankPlan<'a>,
    casts: &'a [Option<Cast>],
    target: LoadTarget,
    arenas: Arenas,
    places: Vec<Place>,
    regions: Vec<Region>,
}

#[derive(Debug)]
enum Arenas {
    Host(Vec<Arc<HostBuffer>>),
    #[cfg(feature = "cuda")]
    Cuda(CudaDevice, Vec<Arc<CudaMemory>>),
}

/// Takes a shard that is complete, with its place in [`RankPlan::outputs`]; from the load's threads.
pub type OnShard<'a> = &'a (dyn Fn(usize, Filled) + Sync);

impl Arenas {
    /// A shard of `len` bytes.
    ///
    /// # Safety
    ///
    /// They are written, and nobody writes to them any more, nor reads them but through the result.
    unsafe fn shard(&self, place: Place, len: u64) -> Filled {
        match self {
            Self::Host(arenas) => {
                let range = place.offset as usize..(place.offset + len) as usize;
                // SAFETY: passed on from the caller. Whoever writes to the rest of the arena makes no slices.
                Filled::Host(unsafe { SharedBuffer::new(arenas[place.arena].clone()).piece(range) })
            }
            #[cfg(feature = "cuda")]
            Self::Cuda(_, arenas) => {
                Filled::Cuda { memory: arenas[place.arena].clone(), offset: place.offset }
            }
        }
    }
}

impl<'a> ShardLoad<'a> {
    /// Reserves the memory for what the rank of `view` keeps, once all ranks of the group know that there
    /// is room for them; of host memory if `check` says so. `casts` say by tensor of the plan which are to
    /// be converted; those that they do not reach are not.
    ///
    /// # Errors
    /// Too little memory, for this rank or all that share it together; a conversion that does not fit its
    /// tensor; another rank's failure.
    pub fn reserve(
        view: &'a RankPlan<'a>,
        casts: &'a [Option<Cast>],
        target: LoadTarget,
        group: &Occupied<'_>,
        check: bool,
    ) -> Result<Self, RankError> {
        for (output, converted) in view.outputs().iter().zip(converted(view, casts)) {
            if let Some(((from, _), _)) = converted
                && from.size() as u64 * 8 != u64::from(output.bits)
            {
                let (output, bits) = (output.name.to_owned(), output.bits);
                return Err(RankError::Cast { output, bits, from });
            }
        }
        let group: &dyn Group = &**group;
        let (arenas, places, starts): (_, _, Vec<u64>) = match &target {
            LoadTarget::Host => {
                room::claim(group, None, host::needed(view, casts), check)?;
                let (lens, places) = host::lay_out_host(view);
                let arenas = host::reserve(&lens)?;
                let starts = arenas.iter().map(|arena| arena.as_ptr().as_ptr() as u64).collect();
                (Arenas::Host(arenas), places, starts)
            }
            #[cfg(feature = "cuda")]
            LoadTarget::Cuda { device, .. } => {
                let (lens, places) = cuda_outputs::lay_out_device(view);
                let layout = (&lens[..], &places[..]);
                let arenas = cuda_outputs::reserve(view, casts, layout, device, group, check)?;
                let starts = arenas.iter().map(DeviceArena::address).collect();
                let arenas = arenas.into_iter().map(CudaMemory::new).collect();
                (Arenas::Cuda(device.clone(), arenas), places, starts)
            }
        };
        let region = |(output, place): (&crate::rank::Output<'_>, &Place)| Region {
            addr: starts[place.arena] + place.offset,
            len: output.bytes,
        };
        let regions = view.outputs().iter().zip(&places).map(region).collect();
        Ok(Self { view, casts, target, arenas, places, regions })
    }

    /// Reads this rank's part of the plan, and exchanges. Shards that are not converted are delivered as they
    /// become complete. `cancelled` is asked again and again, and ends the load on all ranks.
    ///
    /// # Errors
    /// Reading or exchanging failed, on this rank or another.
    pub fn exchange(
        self,
        group: &Occupied<'_>,
        files: RankFiles<'_>,
        cancelled: &(dyn Fn() -> bool + Sync),
        deliver: OnShard<'_>,
    ) -> Result<ArrivedShards<'a>, RankError> {
        let watch = files.watch;
        let moved: Vec<bool> =
            converted(self.view, self.casts).map(|cast| cast.is_some()).collect();
        let landed = |output: usize| {
            if !moved[output] {
                let (place, len) = (self.places[output], self.regions[output].len);
                // SAFETY: the exchange is done with these bytes, and the conversion is of others.
                deliver(output, unsafe { self.arenas.shard(place, len) });
            }
        };
        let reads = Reads::new(files, self.view.plan().coalesce_gap());
        let run = |backend: &dyn Backend| {
            attending(&**group, cancelled, &|| watch.bytes(), || {
                // SAFETY: the regions lie apart in arenas of this load's own, in the backend's space, and
                // nothing else reaches them before they have landed.
                unsafe { load_in(self.view, group, backend, &self.regions, &landed) }
            })
        };
        let (exchange, reads) = match &self.target {
            LoadTarget::Host => {
                let rank = HostRank::new(reads)?;
                (run(&rank)?, rank.into_stats())
            }
            #[cfg(feature = "cuda")]
            LoadTarget::Cuda { device, keep_pinned } => {
                let rank = CudaRank::new(device, reads, Sizes::of(self.view, *keep_pinned))?;
                (run(&rank)?, rank.into_stats())
            }
        };
        Ok(ArrivedShards { load: self, exchange, reads })
    }
}

/// Shards as their bytes came.
#[derive(Debug)]
pub struct ArrivedShards<'a> {
    load: ShardLoad<'a>,
    exchange: ExchangeReport,
    reads: Vec<ReadStats>,
}

impl ArrivedShards<'_> {
    /// What the exchange did on this rank.
    #[must_use]
    pub fn exchange(&self) -> &ExchangeReport {
        &self.exchange
    }

    /// What each of its reads did.
    #[must_use]
    pub fn reads(&self) -> &[ReadStats] {
        &self.reads
    }

    /// Converts and delivers the rest, an arena at a time, and gives memory back where nothing else is in it;
    /// `alive` is called again and again. Says how many bytes conversions made.
    ///
    /// # Errors
    /// No memory, or the device fails.
    pub fn convert(self, alive: &dyn Fn(), deliver: OnShard<'_>) -> Result<u64, RankError> {
        let ShardLoad { view, casts, arenas, places, .. } = self.load;
        let layout = |align| move |arena| arrived(arena, view, &places, casts, align);
        match arenas {
            Arenas::Host(arenas) => {
                // SAFETY: this rank's exchange has succeeded and is over, so that nobody writes there.
                let arenas = arenas.into_iter().map(|arena| unsafe { SharedBuffer::new(arena) });
                let convert = |old: &_, shards: &[_], len| host::convert(old, shards, len, alive);
                settle(arenas, layout(HOST_ALIGN), convert, |output, arena, offset, len| {
                    let range = offset as usize..(offset + len) as usize;
                    // SAFETY: the arena is new, and shards lie apart in it.
                    deliver(
                        output,
                        Filled::Host(unsafe { SharedBuffer::clone(arena).piece(range) }),
                    );
                })
            }
            #[cfg(feature = "cuda")]
            Arenas::Cuda(device, arenas) => {
                let transfers = Transfers::new(&device)?;
                let convert = |old: &Arc<CudaMemory>, shards: &[_], len| {
                    alive();
                    // SAFETY: as above, and nobody reads there yet.
                    let new = unsafe {
                        cuda_outputs::convert(&transfers, old.arena(), shards, len, view)
                    };
                    new.map(CudaMemory::new)
                };
                settle(
                    arenas.into_iter(),
                    layout(DEVICE_ALIGN),
                    convert,
                    |output, memory, offset, _| {
                        deliver(output, Filled::Cuda { memory: memory.clone(), offset });
                    },
                )
            }
        }
    }
}

/// Converts what is to be, arena by arena; says how many bytes that made. `deliver` takes an output, and its place
/// in a new arena.
fn settle<M>(
    arenas: impl Iterator<Item = M>,
    layout: impl Fn(usize) -> (Vec<Arrived>, u64),
    convert: impl Fn(&M, &[Arrived], u64) -> Result<M, RankError>,
    deliver: impl Fn(usize, &M, u64, u64),
) -> Result<u64, RankError> {
    let mut made = 0;
    for (index, old) in arenas.enumerate() {
        let (shards, len) = layout(index);
        let moved = || shards.iter().filter_map(|shard| Some((shard.output, shard.moved?)));
        if moved().next().is_none() {
            continue;
        }
        made += len;
        let new = convert(&old, &shards, len)?;
        moved().for_each(|(output, (_, offset, len))| deliver(output, &new, offset, len));
    }
    Ok(made)
}
