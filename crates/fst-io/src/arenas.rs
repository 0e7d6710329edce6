//! Arenas that come lazily, within a memory budget, and are handed over when they are full.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::AcqRel};
use std::sync::{Arc, Mutex};

use crate::budget::{Budget, Lease};
use crate::buffer::{HostBuffer, SharedBuffer};
use crate::error::Error;
use crate::sink::{SinkError, WAIT};

/// What arenas are made of: host memory here, device memory elsewhere.
pub trait ArenaMemory: Sized + Send + Sync {
    /// What an arena becomes when it is full.
    type Full;

    /// Declares an arena full.
    ///
    /// # Safety
    ///
    /// Nobody writes to its bytes from here on, whoever else may hold a reference to it.
    unsafe fn full(this: Arc<Self>) -> Self::Full;
}

impl ArenaMemory for HostBuffer {
    type Full = SharedBuffer;

    unsafe fn full(this: Arc<Self>) -> SharedBuffer {
        // SAFETY: passed on from the caller.
        unsafe { SharedBuffer::new(this) }
    }
}

/// Told when an arena is full, with its index; from the thread that filled it last.
pub type OnArena<'a, M = HostBuffer> =
    &'a (dyn Fn(usize, <M as ArenaMemory>::Full) -> Result<(), SinkError> + Send + Sync);

/// Makes an arena of a length in bytes, which keeps its part of the budget as long as it lives.
type Make<'a, M> = Box<dyn Fn(u64, Option<Lease>) -> Result<M, SinkError> + Send + Sync + 'a>;

/// An arena does not fit into the memory budget.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes are needed at once, and the memory budget is {budget} bytes")]
pub struct OverBudget {
    /// Bytes of the arena.
    pub bytes: u64,
    /// The budget's limit in bytes.
    pub budget: u64,
}

/// A row of arenas. They are reserved in order, each when it or a later one is first needed, and
/// handed to their taker once everything that was announced for them has been
/// [filled](Self::fill) in.
pub struct Arenas<'a, M: ArenaMemory = HostBuffer> {
    arenas: Vec<Arena<M>>,
    /// How many arenas, from the first, have been reserved.
    reserved: Mutex<usize>,
    budget: Option<&'a Budget>,
    make: Make<'a, M>,
    on_full: OnArena<'a, M>,
}

struct Arena<M> {
    len: u64,
    /// What is still to come, in the owner's unit.
    missing: AtomicU64,
    buffer: Mutex<Option<Arc<M>>>,
}

impl<M: ArenaMemory> fmt::Debug for Arenas<'_, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lens: Vec<u64> = self.arenas.iter().map(|arena| arena.len).collect();
        f.debug_struct("Arenas").field("lens", &lens).finish_non_exhaustive()
    }
}

impl<'a> Arenas<'a> {
    /// Arenas in host memory, as [`with`](Self::with).
    pub fn new(
        arenas: impl IntoIterator<Item = (u64, u64)>,
        budget: Option<&'a Budget>,
        on_full: OnArena<'a>,
    ) -> Self {
        let make = |bytes, lease| {
            let too_much = |_| Error::Memory { bytes, source: io::ErrorKind::OutOfMemory.into() };
            let len = usize::try_from(bytes).map_err(too_much)?;
            Ok(match lease {
                Some(lease) => HostBuffer::leased(len, lease)?,
                None => HostBuffer::new(len)?,
            })
        };
        Self::with(arenas, budget, make, on_full)
    }
}

impl<'a, M: ArenaMemory> Arenas<'a, M> {
    /// Arenas of given lengths in bytes, and how much each waits for, in any unit that the owner
    /// counts in. With a budget, the arenas that live at once (here or with whoever took them)
    /// stay within it.
    pub fn with(
        arenas: impl IntoIterator<Item = (u64, u64)>,
        budget: Option<&'a Budget>,
        make: impl Fn(u64, Option<Lease>) -> Result<M, SinkError> + Send + Sync + 'a,
        on_full: OnArena<'a, M>,
    ) -> Self {
        let arena =
            |(len, missing)| Arena { len, missing: AtomicU64::new(missing), buffer: None.into() };
        Self {
            arenas: arenas.into_iter().map(arena).collect(),
            reserved: Mutex::new(0),
            budget,
            make: Box::new(make),
            on_full,
        }
    }

    /// The arena, reserved now if it was not yet. `Ok(None)` when the budget has no room now, or,
    /// with `wait`, had none within a short while ([`WAIT`]).
    ///
    /// # Errors
    ///
    /// [`OverBudget`], or why there is no memory; [`Error::Cancelled`] when there is no room and the
    /// budget was closed.
    pub fn get(&self, index: usize, wait: bool) -> Result<Option<Arc<M>>, SinkError> {
        if let Some(buffer) = self.existing(index) {
            return Ok(Some(buffer));
        }
        let mut waited = false;
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
            let (Some(budget), Some(seen)) = (self.budget, seen) else { return Ok(None) };
            if budget.is_closed() {
                return Err(Error::Cancelled.into());
            }
            if !wait || waited {
                return Ok(None);
            }
            waited = true;
            budget.wait_past_for(seen, WAIT);
        }
    }

    /// Wakes those who wait in [`get`](Self::get).
    pub fn wake(&self) {
        if let Some(budget) = self.budget {
            budget.wake();
        }
    }

    fn existing(&self, index: usize) -> Option<Arc<M>> {
        self.arenas.get(index)?.buffer.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Memory for an arena, or `None` when the budget has no room for it now.
    fn reserve(&self, bytes: u64) -> Result<Option<M>, SinkError> {
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
        (self.make)(bytes, lease).map(Some)
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
        (self.on_full)(index, unsafe { M::full(buffer) })
    }
}
