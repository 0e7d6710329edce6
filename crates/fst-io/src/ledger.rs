//! Which blocks of a plan are free, out with a reader, or landed.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

use crate::plan::{Block, ReadPlan};
use crate::sink::{Origin, Target};

const FREE: u8 = 0;
const OUT: u8 = 1;
const LANDED: u8 = 2;

/// A block is not one of the plan's, or its turn is over; or a target is not that block's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("block {index} at offset {offset} of file {file} has no place, or had it already")]
pub struct NoPlace {
    /// Index of the block.
    pub index: u32,
    /// Index of its file.
    pub file: u32,
    /// Its first byte in the file.
    pub offset: u64,
}

impl NoPlace {
    /// The error about `block`.
    pub fn of(block: &Block) -> Self {
        let Block { index, file, offset, .. } = *block;
        Self { index, file, offset }
    }
}

/// The blocks of one plan, each of which gets memory once, and lands once.
#[derive(Debug)]
pub struct Ledger<'a> {
    plan: &'a ReadPlan,
    origin: Origin,
    /// Per block of the plan: [`FREE`], then [`OUT`], then perhaps [`LANDED`].
    state: Vec<AtomicU8>,
}

impl<'a> Ledger<'a> {
    /// A ledger with all blocks of `plan` free.
    pub fn new(plan: &'a ReadPlan) -> Self {
        let state = plan.blocks().iter().map(|_| AtomicU8::new(FREE)).collect();
        Self { plan, origin: Origin::new(), state }
    }

    /// The plan.
    pub fn plan(&self) -> &'a ReadPlan {
        self.plan
    }

    /// Checks that `block` is the plan's own and had no memory yet.
    ///
    /// # Errors
    ///
    /// [`NoPlace`].
    pub fn free(&self, block: &Block) -> Result<(), NoPlace> {
        let own = self.plan.blocks().get(block.index as usize) == Some(block);
        let state = self.state.get(block.index as usize).filter(|_| own);
        let free = state.is_some_and(|state| state.load(Relaxed) == FREE);
        if free { Ok(()) } else { Err(NoPlace::of(block)) }
    }

    /// Makes the target of a block that is [free](Self::free), which it is not any more.
    ///
    /// # Errors
    ///
    /// [`NoPlace`].
    ///
    /// # Safety
    ///
    /// If this succeeds, the memory is the target's as [`Target::new`] demands.
    pub unsafe fn lend(
        &self,
        block: &Block,
        ptr: NonNull<u8>,
        capacity: usize,
        token: u64,
    ) -> Result<Target, NoPlace> {
        self.free(block)?;
        self.step(block, FREE, OUT)?;
        // SAFETY: passed on from the caller.
        Ok(unsafe { Target::new(&self.origin, block, ptr, capacity, token) })
    }

    /// Checks that `target` is the one that was made for `block` here.
    ///
    /// # Errors
    ///
    /// [`NoPlace`].
    pub fn check(&self, block: &Block, target: &Target) -> Result<(), NoPlace> {
        if self.origin.made(block, target) { Ok(()) } else { Err(NoPlace::of(block)) }
    }

    /// Notes that `block` has landed in `target`, which was made for it. Succeeds once for a block.
    ///
    /// # Errors
    ///
    /// [`NoPlace`].
    pub fn landed(&self, block: &Block, target: &Target) -> Result<(), NoPlace> {
        self.check(block, target)?;
        if self.plan.blocks().get(block.index as usize) != Some(block) {
            return Err(NoPlace::of(block));
        }
        self.step(block, OUT, LANDED)
    }

    fn step(&self, block: &Block, from: u8, to: u8) -> Result<(), NoPlace> {
        let state = self.state.get(block.index as usize);
        match state.map(|state| state.compare_exchange(from, to, Relaxed, Relaxed)) {
            Some(Ok(_)) => Ok(()),
            _ => Err(NoPlace::of(block)),
        }
    }
}
