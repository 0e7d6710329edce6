//! Landing in scratch: blocks pass through a few reused pieces of memory, and a closure takes what
//! it wants from each. For bytes that must be moved, cut or converted before they are of use.

use std::fmt;
use std::ptr::NonNull;

use crate::error::Error;
use crate::ledger::Ledger;
use crate::plan::{Block, ReadPlan};
use crate::sink::{Sink, SinkError, Target};
use crate::slots::Slots;

/// Asked before a block is read whether what it leads to has room. `Ok(false)`: not now. With `true`
/// it waits for room, but only for a short while ([`WAIT`](crate::sink::WAIT)), and is asked again.
pub type Admit<'a> = &'a (dyn Fn(&Block, bool) -> Result<bool, SinkError> + Send + Sync);

/// Asked whether a block that is preferred can have room before its turn ([`Sink::prefer`]).
pub type Prefer<'a> = &'a (dyn Fn(&Block) -> Result<bool, SinkError> + Send + Sync);

/// Given a block's bytes, [`Block::need`] of them from [`Block::offset`] on.
pub type Take<'a> = &'a (dyn Fn(&Block, &[u8]) -> Result<(), SinkError> + Send + Sync);

/// The sink of loads that transform what they read.
pub struct Scratch<'a> {
    ledger: Ledger<'a>,
    /// Slots of the plan's block length.
    slots: Slots,
    admit: Admit<'a>,
    prefer: Option<Prefer<'a>>,
    take: Take<'a>,
}

impl fmt::Debug for Scratch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scratch").field("slots", &self.slots).finish_non_exhaustive()
    }
}

impl<'a> Scratch<'a> {
    /// Scratch memory for `slots` blocks of `plan`.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    pub fn new(
        plan: &'a ReadPlan,
        slots: usize,
        admit: Admit<'a>,
        take: Take<'a>,
    ) -> Result<Self, Error> {
        let slots = slots.clamp(1, plan.blocks().len().max(1));
        let slots = Slots::new(slots, plan.limits().block)?;
        Ok(Self { ledger: Ledger::new(plan), slots, admit, prefer: None, take })
    }

    /// Asks `prefer` whether preferred blocks have room before their turn; unless this is called they have.
    pub fn with_preference(self, prefer: Prefer<'a>) -> Self {
        Self { prefer: Some(prefer), ..self }
    }
}

// SAFETY: a target is a slot that holds the block. It is free or inside exactly one target, and released
// only when that very target has come back by value; this value owns the memory of all.
unsafe impl Sink for Scratch<'_> {
    fn reserve(&self, block: &Block, wait: bool) -> Result<Option<Target>, SinkError> {
        self.ledger.free(block)?;
        if !(self.admit)(block, wait)? {
            return Ok(None);
        }
        Ok(self.slots.lend(&self.ledger, block, wait)?)
    }

    fn prefer(&self, block: &Block) -> Result<bool, SinkError> {
        self.prefer.map_or(Ok(true), |prefer| prefer(block))
    }

    fn reused(&self) -> Option<(NonNull<u8>, usize)> {
        let memory = self.slots.memory();
        Some((memory.as_ptr(), memory.len()))
    }

    fn landed(&self, block: &Block, target: Target) -> Result<(), SinkError> {
        self.ledger.landed(block, &target)?;
        let len = self.slots.slot_len();
        let start = target.token() as usize * len;
        let end = start + (block.need as usize).min(len);
        // SAFETY: the target came back, so that nobody writes to its slot until it is released.
        let bytes = unsafe { self.slots.memory().slice(start..end) }.unwrap_or_default();
        let result = (self.take)(block, bytes);
        self.abandoned(block, target);
        result
    }

    fn abandoned(&self, block: &Block, target: Target) {
        // SAFETY: all targets of the ledger are lent by these slots.
        unsafe { self.slots.take_back(&self.ledger, block, target) };
    }

    fn end(&self) {
        self.slots.wake();
    }
}
