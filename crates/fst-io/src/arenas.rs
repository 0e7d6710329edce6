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

/// Makes the arena of an index, of a length in bytes, which keeps its part of the budget as long as it lives.
type Make<'a, M> =
    Box<dyn Fn(usize, u64, Option<Lease>) -> Result<M, SinkError> + Send + Sync + 'a>;

/// An arena does not fit into the memory budget.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes are needed at once, and the memory budget is {budget} bytes")]
pub struct OverBudget {
    /// Bytes of the arena.
    pub bytes: u64,
    /// The budget's limit in bytes.
    pub budget: u64,
}

/// A row of arenas. They are reserved in order, each when it or a later one is first needed, or before their
/// turn if they are [preferred](Self::prefer), and handed to their taker once everything that was announced for
/// them has been [filled](Self::fill) in.
pub struct Arenas<'a, M: ArenaMemory = HostBuffer> {
    arenas: Vec<Arena<M>>,
    reserved: Mutex<Reserved>,
    budget: Option<&'a Budget>,
    make: Make<'a, M>,
    on_full: OnArena<'a, M>,
}

/// Which arenas have been reserved.
struct Reserved {
    /// How many, from the first.
    first: usize,
    /// Each, be it before its turn.
    each: Vec<bool>,
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
        Self::with(arenas, budget, Self::make(0), on_full)
    }

    /// Has the process keep the memory when nobody has it any more, as [`HostBuffer::kept`] does, where there
    /// is no budget to [say so](Budget::keeping).
    #[must_use]
    pub fn keeping(self, most: u64) -> Self {
        Self { make: Box::new(Self::make(most)), ..self }
    }

    fn make(
        keep: u64,
    ) -> impl Fn(usize, u64, Option<Lease>) -> Result<HostBuffer, SinkError> + Send + Sync + 'a
    {
        move |_, bytes, lease| Ok(HostBuffer::of_arena(bytes, lease, keep)?)
    }
}

impl HostBuffer {
    /// Memory of an arena: [leased](Self::leased) within a budget, else [kept](Self::kept).
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new).
    pub fn of_arena(bytes: u64, lease: Option<Lease>, keep: u64) -> Result<Self, Error> {
        let too_much = |_| Error::Memory { bytes, source: io::ErrorKind::OutOfMemory.into() };
        let len = usize::try_from(bytes).map_err(too_much)?;
        match lease {
            Some(lease) => Self::leased(len, lease),
            None => Self::kept(len, keep),
        }
    }
}

impl<'a, M: ArenaMemory> Arenas<'a, M> {
    /// Arenas of given lengths in bytes, and how much each waits for, in any unit that the owner
    /// counts in. With a budget, the arenas that live at once (here or with whoever took them)
    /// stay within it.
    pub fn with(
        arenas: impl IntoIterator<Item = (u64, u64)>,
        budget: Option<&'a Budget>,
        make: impl Fn(usize, u64, Option<Lease>) -> Result<M, SinkError> + Send + Sync + 'a,
        on_full: OnArena<'a, M>,
    ) -> Self {
        let arena =
            |(len, missing)| Arena { len, missing: AtomicU64::new(missing), buffer: None.into() };
        let arenas: Vec<_> = arenas.into_iter().map(arena).collect();
        let reserved = Reserved { first: 0, each: vec![false; arenas.len()] };
        Self { arenas, reserved: Mutex::new(reserved), budget, make: Box::new(make), on_full }
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
            while reserved.first <= index {
                let next = reserved.first;
                if next >= self.arenas.len() {
                    return Ok(None);
                }
                if !reserved.each[next] && !self.reserve(next, false)? {
                    break;
                }
                reserved.each[next] = true;
                reserved.first += 1;
            }
            if reserved.first > index {
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

    /// Reserves an arena before its turn, if the budget has room; whether it is reserved. An arena takes its memory
    /// as a whole, so that nothing keeps it from being filled then, and it cannot keep others waiting
    /// for ever.
    ///
    /// # Errors
    ///
    /// As for [`get`](Self::get).
    pub fn prefer(&self, index: usize) -> Result<bool, SinkError> {
        let mut reserved = self.reserved.lock().unwrap_or_else(|e| e.into_inner());
        let Some(before) = reserved.each.get(index).copied() else { return Ok(false) };
        reserved.each[index] = before || self.reserve(index, true)?;
        Ok(reserved.each[index])
    }

    /// Makes an arena, wanted or in its turn; `false` when the budget has no room for it now.
    fn reserve(&self, index: usize, wanted: bool) -> Result<bool, SinkError> {
        let Some(arena) = self.arenas.get(index) else { return Ok(false) };
        let bytes = arena.len;
        let lease = match self.budget {
            None => None,
            Some(budget) if bytes > budget.limit() => {
                return Err(OverBudget { bytes, budget: budget.limit() }.into());
            }
            Some(budget) => {
                match if wanted { budget.take(bytes) } else { budget.take_ahead(bytes) } {
                    None => return Ok(false),
                    lease => lease,
                }
            }
        };
        let buffer = (self.make)(index, bytes, lease)?;
        *arena.buffer.lock().unwrap_or_else(|e| e.into_inner()) = Some(Arc::new(buffer));
        Ok(true)
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
