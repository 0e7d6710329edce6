//! Carries out one rank's part of a plan: a thread reads, this one exchanges.
//!
//! The reading thread fills blocks with the units of the coming rounds; while no block is free it
//! reads what this rank keeps for itself. The exchanging thread takes the blocks in order, keeps its own
//! part, and trades the rest with the other members of the round, a bounded number of peers at a
//! time. A part that is contiguous at both ends travels without a copy; strided parts are packed by
//! the sender and unpacked by the receiver.

mod landing;
mod reading;
mod trading;

use std::collections::VecDeque;
use std::sync::mpsc;
use std::time::Duration;

use landing::Landing;
use reading::Reading;
use trading::Trading;

use crate::backend::{Backend, HostBackend, Reader};
use crate::error::ExchangeError;
#[cfg(doc)]
use crate::error::GroupError;
use crate::group::{Group, Occupied};
use crate::memory::Space;
use crate::rank::RankPlan;

/// The memory of one output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Its first byte, in the backend's space.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
}

/// What an exchange did on this rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExchangeReport {
    /// Bytes read from storage.
    pub read_bytes: u64,
    /// Bytes sent; a broadcast counts once for each receiver.
    pub sent_bytes: u64,
    /// Bytes received.
    pub received_bytes: u64,
    /// Time in which the reading thread read.
    pub read: Duration,
    /// Time in which the exchanging thread waited for blocks to be read.
    pub wait: Duration,
    /// Time in transfers, waiting for other ranks among it.
    pub exchange: Duration,
    /// Time spent packing and unpacking.
    pub copy: Duration,
}

/// Loads the outputs of `view` into host memory, with the other ranks of `group` doing the same.
///
/// `outputs` are in the order of [`RankPlan::outputs`], of their sizes; padding is zeroed.
///
/// # Errors
/// Ranks whose plans differ, outputs of the wrong size, a failed read on this rank, or a failure of
/// another rank; [`GroupError::Busy`] while another load has the group.
pub fn load_host(
    view: &RankPlan<'_>,
    group: &dyn Group,
    reader: impl Reader,
    outputs: &mut [&mut [u8]],
) -> Result<ExchangeReport, ExchangeError> {
    let region = |output: &mut &mut [u8]| Region {
        addr: output.as_mut_ptr() as u64,
        len: output.len() as u64,
    };
    let regions: Vec<Region> = outputs.iter_mut().map(region).collect();
    // SAFETY: the regions are slices borrowed for the whole call, disjoint as all `&mut` are.
    unsafe { load(view, group, &HostBackend::new(reader), &regions) }
}

/// Loads the outputs of `view` into `outputs`, with the other ranks of `group` doing the same.
///
/// # Errors
/// As for [`load_host`]. After an error the outputs' bytes are not to be used.
///
/// # Safety
/// The regions are in the backend's space, writable, disjoint, and used by nobody else until this
/// returns.
pub unsafe fn load(
    view: &RankPlan<'_>,
    group: &dyn Group,
    backend: &dyn Backend,
    outputs: &[Region],
) -> Result<ExchangeReport, ExchangeError> {
    let group = group.occupy()?;
    // SAFETY: by this function's contract.
    let report = unsafe { load_in(view, &group, backend, outputs, &|_| {}) }?;
    group.end()?;
    Ok(report)
}

/// As [`load`], for who has taken the group already, for a load that does more than exchange. Its
/// [`end`](Occupied::end) says whether it has succeeded on the other ranks.
///
/// `on_landed` is called with the number of each output as soon as all of its bytes are there, and is not
/// written to any more, from one of the exchange's threads.
///
/// # Errors
/// As for [`load`].
///
/// # Safety
/// As for [`load`].
pub unsafe fn load_in(
    view: &RankPlan<'_>,
    group: &Occupied<'_>,
    backend: &dyn Backend,
    outputs: &[Region],
    on_landed: &(dyn Fn(usize) + Sync),
) -> Result<ExchangeReport, ExchangeError> {
    let group: &dyn Group = &**group;
    let result = check(view, group, backend.space(), outputs)
        .and_then(|()| agree(view, group))
        .and_then(|()| run(view, group, backend, outputs, on_landed));
    if let Err(error) = &result
        && !matches!(error, ExchangeError::Group(_))
    {
        group.abort(&error.to_string());
    }
    result
}

fn check(
    view: &RankPlan<'_>,
    group: &dyn Group,
    space: Space,
    outputs: &[Region],
) -> Result<(), ExchangeError> {
    let plan = (view.rank(), view.plan().world());
    let found = (group.rank(), group.world_size());
    if plan != found {
        return Err(ExchangeError::World { plan, group: found });
    }
    if !group.reaches(space) {
        return Err(ExchangeError::Unreached { rank: view.rank(), space });
    }
    if outputs.len() != view.outputs().len() {
        let (expected, found) = (view.outputs().len(), outputs.len());
        return Err(ExchangeError::OutputCount { expected, found });
    }
    for (output, region) in view.outputs().iter().zip(outputs) {
        if output.bytes != region.len || output.padding > region.len {
            let (name, expected, found) = (output.name.to_owned(), output.bytes, region.len);
            return Err(ExchangeError::OutputSize { name, expected, found });
        }
    }
    Ok(())
}

/// Refuses to start unless all ranks have the same plan.
fn agree(view: &RankPlan<'_>, group: &dyn Group) -> Result<(), ExchangeError> {
    let digest = view.plan().digest();
    let all = group.gather_messages(digest.as_bytes())?;
    // All ranks compare with rank 0, so all name the same rank.
    match all.iter().position(|other| *other != all[0]) {
        None => Ok(()),
        Some(rank) => Err(ExchangeError::PlanDiffers { rank: rank as u32 }),
    }
}

fn run(
    view: &RankPlan<'_>,
    group: &dyn Group,
    backend: &dyn Backend,
    outputs: &[Region],
    on_landed: &(dyn Fn(usize) + Sync),
) -> Result<ExchangeReport, ExchangeError> {
    let rank = view.rank();
    for (output, region) in view.outputs().iter().zip(outputs) {
        if output.padding > 0 {
            let start = region.addr + region.len - output.padding;
            // SAFETY: the end of a region that is ours.
            let zeroed = unsafe { backend.zero(start, output.padding) };
            zeroed.map_err(|source| ExchangeError::Copy { rank, source })?;
        }
    }
    let landing = Landing::new(view, outputs, on_landed);
    let buffers = view.plan().buffers();
    let read_bytes = buffers.read_bytes();
    let bytes = view.staging_bytes();
    let staging =
        backend.stage(bytes).map_err(|source| ExchangeError::Memory { rank, bytes, source })?;
    let (free, frees) = mpsc::channel();
    let (fill, fills) = mpsc::channel();
    for index in 0..u64::from(buffers.read_blocks) {
        // The receiver lives until the thread ends: sending cannot fail yet.
        let _ = free.send(staging.addr() + index * buffers.block);
    }
    let landing = &landing;
    let (report, own) = (ExchangeReport::default(), VecDeque::new());
    let mut reading = Reading { view, group, backend, outputs, landing, report, own };
    let mut trading = Trading {
        view,
        group,
        backend,
        outputs,
        landing,
        pack: staging.addr() + read_bytes,
        receive: staging.addr() + read_bytes + buffers.pack,
        report: ExchangeReport::default(),
    };
    std::thread::scope(|scope| {
        let builder = std::thread::Builder::new().name("fst-exchange".to_owned());
        let reader = builder.spawn_scoped(scope, move || {
            /// The other ranks must not wait for a thread that is gone.
            struct OnPanic<'a>(&'a dyn Group);
            impl Drop for OnPanic<'_> {
                fn drop(&mut self) {
                    if std::thread::panicking() {
                        self.0.abort("the reading thread panicked");
                    }
                }
            }
            let _guard = OnPanic(group);
            let result = reading.run(&frees, fill);
            if let Err(error) = &result {
                group.abort(&error.to_string());
            }
            result.map(|()| reading.report)
        });
        let reader = reader.map_err(|source| ExchangeError::Thread { rank, source })?;
        let traded = trading.run(&fills, free);
        drop(fills);
        let read = match reader.join() {
            Ok(read) => read,
            Err(_) => return Err(ExchangeError::ReaderPanicked { rank }),
        };
        // A failed read also ends the trading: the read is the cause to tell.
        let read = read?;
        traded?;
        debug_assert!(landing.is_over(), "outputs lack bytes that nobody counted");
        Ok(ExchangeReport { read: read.read, read_bytes: read.read_bytes, ..trading.report })
    })
}
