//! Arenas that come lazily, within a memory budget, and are handed over when they are full.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::AcqRel};
use std::sync::{Arc, Mutex, TryLockError};

use crate::budget::Budget;
use crate::buffer::HostBuffer;
use crate::error::Error;
use crate::sink::SinkError;

/// Told when an arena is full, with its index; from the thread that filled it last.
pub type OnArena<'a> = &'a (dyn Fn(usize, Arc<HostBuffer>) -> Result<(), SinkError> + Send + Sync);

/// An arena does not fit into the memory budget.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes are needed at once, and the memory budget is {budget} bytes")]
pub struct OverBudget {
    /// Bytes of the arena.
    pub bytes: u64,
    /// The budget's limit in bytes.
    pub budget: u64,
}

/// A row of arenas. Each is reserved when it is first needed, and handed to its taker once
/// everything that was announced for it has been [filled](Self::fill) in.
pub struct Arenas<'a> {
    arenas: Vec<Arena>,
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
        Self { arenas: arenas.into_iter().map(arena).collect(), budget, on_full }
    }

    /// The arena, reserved now if it was not yet. `Ok(None)` when the budget has no room now, or
    /// (with `wait`) was closed.
    ///
    /// # Errors
    ///
    /// [`OverBudget`], or [`Error::Memory`].
    pub fn get(&self, index: usize, wait: bool) -> Result<Option<Arc<HostBuffer>>, SinkError> {
        let Some(Arena { len: bytes, buffer, .. }) = self.arenas.get(index) else {
            return Ok(None);
        };
        // Whoever holds this lock may be waiting for the budget. A reader with blocks in flight
        // must not wait for that: landing them may be what frees memory.
        let mut buffer = match (buffer.try_lock(), wait) {
            (Ok(buffer), _) => buffer,
            (Err(TryLockError::WouldBlock), false) => return Ok(None),
            (Err(TryLockError::WouldBlock), true) => {
                buffer.lock().unwrap_or_else(|e| e.into_inner())
            }
            (Err(TryLockError::Poisoned(poisoned)), _) => poisoned.into_inner(),
        };
        if let Some(buffer) = &*buffer {
            return Ok(Some(buffer.clone()));
        }
        let lease = match self.budget {
            None => None,
            Some(budget) if *bytes > budget.limit() => {
                return Err(OverBudget { bytes: *bytes, budget: budget.limit() }.into());
            }
            Some(budget) => match budget.take(*bytes, wait) {
                None => return Ok(None),
                lease => lease,
            },
        };
        let len = usize::try_from(*bytes).map_err(|_| Error::Memory {
            bytes: *bytes,
            source: io::ErrorKind::OutOfMemory.into(),
        })?;
        let mut fresh = HostBuffer::new(len)?;
        if let Some(lease) = lease {
            fresh = fresh.with_lease(lease);
        }
        Ok(Some(buffer.insert(Arc::new(fresh)).clone()))
    }

    /// Counts `amount` as filled in; the last of it hands the arena over. The caller's writes
    /// happen before the taker's reads.
    ///
    /// # Errors
    ///
    /// The taker's.
    pub fn fill(&self, index: usize, amount: u64) -> Result<(), SinkError> {
        let Some(arena) = self.arenas.get(index) else { return Ok(()) };
        // Release by each filler, acquire by the last.
        if arena.missing.fetch_sub(amount, AcqRel) > amount {
            return Ok(());
        }
        let buffer = arena.buffer.lock().unwrap_or_else(|e| e.into_inner()).take();
        buffer.map_or(Ok(()), |buffer| (self.on_full)(index, buffer))
    }
}
