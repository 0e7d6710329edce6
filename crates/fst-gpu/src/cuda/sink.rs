//! The pipeline as the receiving end of fst-io's readers: blocks are read straight into pinned
//! memory and leave for the device as they land.

use crate::cuda::pipeline::{CopyOp, Done, Pipeline};
use fst_io::plan::Block;
use fst_io::scratch::Prefer;
use fst_io::sink::{Origin, Sink, SinkError, Target};
use std::fmt;

/// What is to happen with a block that has landed. Offsets count from the block's first byte.
#[derive(Default)]
pub struct Landing {
    /// Copies, slices and casts to the pipeline's first device.
    pub ops: Vec<CopyOp>,
    /// The same to others, by their numbers.
    pub elsewhere: Vec<(usize, Vec<CopyOp>)>,
    /// Called when they are done.
    pub done: Option<Done>,
}

impl Landing {
    /// What goes to a device of the pipeline.
    pub(crate) fn ops_to(&mut self, device: usize) -> &mut Vec<CopyOp> {
        if device == 0 {
            return &mut self.ops;
        }
        let known = self.elsewhere.iter().position(|(number, _)| *number == device);
        let at = known.unwrap_or(self.elsewhere.len());
        if known.is_none() {
            self.elsewhere.push((device, Vec::new()));
        }
        &mut self.elsewhere[at].1
    }
}

impl fmt::Debug for Landing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Landing").field("ops", &self.ops).finish_non_exhaustive()
    }
}

/// Says what is to happen with a block; called from reader threads when it has landed.
pub type Route<'a> = &'a (dyn Fn(&Block) -> Result<Landing, SinkError> + Send + Sync);

/// Asked before a block is read whether what it leads to has room (see
/// [`fst_io::scratch::Admit`]).
pub type Admit<'a> = &'a (dyn Fn(&Block, bool) -> Result<bool, SinkError> + Send + Sync);

/// Takes what it wants of the bytes of a block that has landed, before they are copied to devices.
pub type TakeHost<'a> = &'a (dyn Fn(&Block, &[u8]) -> Result<(), SinkError> + Send + Sync);

/// Lends the blocks of a [`Pipeline`] to readers and submits them when they have landed.
///
/// After the read, [`Pipeline::flush`] waits for the copies.
pub struct PipelineSink<'a> {
    pipeline: &'a Pipeline,
    origin: Origin,
    admit: Option<Admit<'a>>,
    prefer: Option<Prefer<'a>>,
    take: Option<TakeHost<'a>>,
    route: Route<'a>,
}

impl fmt::Debug for PipelineSink<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PipelineSink").field("pipeline", &self.pipeline).finish_non_exhaustive()
    }
}

impl<'a> PipelineSink<'a> {
    /// A sink that asks `route` what to do with each block.
    ///
    /// # Safety
    ///
    /// What [`Pipeline::submit`] asks of destinations holds for all that `route` names.
    pub unsafe fn new(pipeline: &'a Pipeline, route: Route<'a>) -> Self {
        Self { pipeline, origin: Origin::new(), admit: None, prefer: None, take: None, route }
    }

    /// Asks `admit` before a block is read. It makes room for the block's destinations (device
    /// memory within a budget, say) or holds the reader back.
    pub fn with_admission(self, admit: Admit<'a>) -> Self {
        Self { admit: Some(admit), ..self }
    }

    /// Asks `prefer` whether a block that is preferred can have room before its turn.
    pub fn with_preference(self, prefer: Prefer<'a>) -> Self {
        Self { prefer: Some(prefer), ..self }
    }

    /// Gives `take` the bytes of each block, up to the last that was wanted.
    pub fn with_take(self, take: TakeHost<'a>) -> Self {
        Self { take: Some(take), ..self }
    }
}

// SAFETY: a target is a pinned block given up for its number: nobody else has it until the number
// comes back with the target. A target that is dropped loses its block to the ring. The ring's
// memory lives as long as the pipeline, which this value borrows.
unsafe impl Sink for PipelineSink<'_> {
    fn reserve(&self, block: &Block, wait: bool) -> Result<Option<Target>, SinkError> {
        let capacity = self.pipeline.block_bytes();
        if block.len > capacity as u64 {
            return Err(Box::new(crate::Error::BadSetting {
                what: "bytes of a block to be read into pinned memory",
                value: block.len,
                least: 1,
                most: capacity as u64,
            }));
        }
        if let Some(admit) = self.admit
            && !admit(block, wait)?
        {
            return Ok(None);
        }
        let pinned =
            if wait { self.pipeline.acquire_soon()? } else { self.pipeline.try_acquire()? };
        Ok(pinned.map(|pinned| {
            let start = pinned.as_ptr();
            // SAFETY: see the comment on the implementation.
            unsafe {
                let token = u64::from(pinned.into_index());
                Target::new(&self.origin, block, start, capacity, token)
            }
        }))
    }

    fn prefer(&self, block: &Block) -> Result<bool, SinkError> {
        self.prefer.map_or(Ok(true), |prefer| prefer(block))
    }

    fn landed(&self, block: &Block, target: Target) -> Result<(), SinkError> {
        self.origin.check(block, &target)?;
        // SAFETY: the target came from `reserve` and is given back once, by value.
        let pinned = unsafe { self.pipeline.block(target.token() as u32) };
        let Some(pinned) = pinned else { return Ok(()) };
        if let Some(take) = self.take {
            take(block, pinned.as_slice().get(..block.need as usize).unwrap_or_default())?;
        }
        let Landing { ops, elsewhere, done } = (self.route)(block)?;
        let all = std::iter::once((0, &*ops));
        let all = all.chain(elsewhere.iter().map(|(device, ops)| (*device, &**ops)));
        let all: Vec<_> = all.filter(|(_, ops)| !ops.is_empty()).collect();
        // SAFETY: the contract of `new`.
        unsafe { self.pipeline.submit_to(pinned, &all, done)? };
        Ok(())
    }

    fn abandoned(&self, block: &Block, target: Target) {
        if self.origin.made(block, &target) {
            // SAFETY: as in `landed`.
            drop(unsafe { self.pipeline.block(target.token() as u32) });
        }
    }

    fn lost(&self, block: &Block, target: Target) -> Option<Target> {
        if !self.origin.made(block, &target) {
            return target.forget();
        }
        // The block never comes back to the ring, whose memory stays mapped and pinned.
        self.pipeline.ring().shared().set_stuck();
        // Its reader is gone with it: others must not wait for the block.
        self.pipeline.fail(crate::Error::BlockLost);
        None
    }
}
