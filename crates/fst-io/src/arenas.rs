//! Arenas that come lazily, within a memory budget, and are handed over when they are full.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::AcqRel};
use std::sync::{Arc, Mutex};

use crate::budget::Budget;
use crate::buffer::{HostBuffer, SharedBuffer};
use crate::error::Error;
use crate::sink::SinkError;

/// Told when an arena is full, with its index; from the thread that filled it last.
pub type OnArena<'a> = &'a (dyn Fn(usize, SharedBuffer) -> Result<(), SinkError> + Send + Sync);

/// An arena does not fit into the memory budget.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes are needed at once, and the memory budget is {budget} bytes")]
pub struct OverBudget {
    /// Bytes of the arena.
    pub bytes: u64,
    /// The budget's limit in bytes.
    pub budget: u64,
}

/// A row of arenas. They are reserved in order, each when it or a later one is first needed, and handed to its taker once
/// everything that was announced for it has been [filled](Self::fill) in.
pub struct Arenas<'a> {
    arenas: Vec<Arena>,
    /// How many arenas, from the first, have been reserved.
    reserved: Mutex<usize>,
    budget: Option<&'a Budget>,
    on_full: OnArena<'a>,
}

#[derive(Debug)]
struct Arena {
    len: u64,
    /// What is still to come, in the owner's unit.
    missing: AtomicU64,
    buffer: Mutex<Option<Arc<HostBuffer>>>,
}

impl fmt::Debug for Arenas<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arenas").field("arenas", &self.arenas).finish_non_exhaustive()
    }
}

impl<'a> Arenas<'a> {
    /// Arenas of given lengths in bytes, and how much each waits for, in any unit that the owner
    /// counts in. With a budget, the arenas that live at once (here or with whoever took them)
    /// stay within it.
    pub fn new(
        arenas: impl IntoIterator<Item = (u64, u64)>,
        budget: Option<&'a Budget>,
        on_full: OnArena<'a>,
    ) -> Self {
        let arena =
            |(len, missing)| Arena { len, missing: AtomicU64::new(missing), buffer: None.into() };
        Self {
            arenas: arenas.into_iter().map(arena).collect(),
            reserved: Mutex::new(0),
            budget,
            on_full,
        }
    }

    /// The arena, reserved now if it was not yet. `Ok(None)` when the budget has no room now, or
    /// (with `wait`) was closed.
    ///
    /// # Errors
    ///
    /// [`OverBudget`], or [`Error::Memory`].
    pub fn get(&self, index: usize, wait: bool) -> Result<Option<Arc<HostBuffer>>, SinkError> {
        if let Some(buffer) = self.existing(index) {
            return Ok(Some(buffer));
        }
        loop {
            let seen = self.budget.map(Budget::generation);
            let mut reserved = self.reserved.lock().unwrap_or_else(|e| e.into_inner());
            // In order, whatever the order of the requests: were a later arena to take the last of
            // the budget, whoever waits for the tensors in order would wait for ever.
            while *reserved <= index {
                let Some(arena) = self.arenas.get(*reserved) else { return Ok(None) };
                let Some(buffer) = self.reserve(arena.len)? else { break };
                *arena.buffer.lock().unwrap_or_else(|e| e.into_inner()) = Some(Arc::new(buffer));
                *reserved += 1;
            }
            if *reserved > index {
                return Ok(self.existing(index));
            }
            // Nobody waits for the budget with the lock held: others need it to find arenas that
            // are there, and filling those is what frees memory. What another takes meanwhile may
            // be the very arena asked for, so any change is a reason to look again.
            drop(reserved);
            let again = match (self.budget, seen) {
                (Some(budget), Some(seen)) if wait => budget.wait_past(seen),
                _ => false,
            };
            if !again {
                return Ok(None);
            }
        }
    }

    fn existing(&self, index: usize) -> Option<Arc<HostBuffer>> {
        self.arenas.get(index)?.buffer.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Memory for an arena, or `None` when the budget has no room for it now.
    fn reserve(&self, bytes: u64) -> Result<Option<HostBuffer>, SinkError> {
        let lease = match self.budget {
            None => None,
            Some(budget) if bytes > budget.limit() => {
                return Err(OverBudget { bytes, budget: budget.limit() }.into());
            }
            Some(budget) => match budget.take(bytes) {
                None => return Ok(None),
                lease => lease,
            },
        };
        let too_much = |_| Error::Memory { bytes, source: io::ErrorKind::OutOfMemory.into() };
        let buffer = HostBuffer::new(usize::try_from(bytes).map_err(too_much)?)?;
        Ok(Some(match lease {
            Some(lease) => buffer.with_lease(lease),
            None => buffer,
        }))
    }

    /// Counts `amount` as filled in; the last of it hands the arena over. The caller's writes
    /// happen before the taker's reads.
    ///
    /// # Errors
    ///
    /// The taker's.
    ///
    /// # Safety
    ///
    /// What is counted has been written, once, and is not written again: with the last of it, all
    /// writing to the arena is over.
    pub unsafe fn fill(&self, index: usize, amount: u64) -> Result<(), SinkError> {
        let Some(arena) = self.arenas.get(index) else { return Ok(()) };
        // Release by each filler, acquire by the last.
        if arena.missing.fetch_sub(amount, AcqRel) > amount {
            return Ok(());
        }
        let buffer = arena.buffer.lock().unwrap_or_else(|e| e.into_inner()).take();
        let Some(buffer) = buffer else { return Ok(()) };
        // SAFETY: all that was announced has been counted, each by a caller that is done with it.
        (self.on_full)(index, unsafe { SharedBuffer::new(buffer) })
    }
}
