//! Landing in scratch: blocks pass through a few reused pieces of memory, and a closure takes what
//! it wants from each. For bytes that must be moved, cut or converted before they are of use.

use std::fmt;
use std::ptr::NonNull;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use crate::buffer::HostBuffer;
use crate::error::Error;
use crate::plan::{Block, ReadPlan};
use crate::sink::{Sink, SinkError, Target};

/// Asked before a block is read whether what it leads to has room. `Ok(false)`: not now, or, when
/// told to wait, never.
pub type Admit<'a> = &'a (dyn Fn(&Block, bool) -> Result<bool, SinkError> + Send + Sync);

/// Given a block's bytes, [`Block::need`] of them from [`Block::offset`] on.
pub type Take<'a> = &'a (dyn Fn(&Block, &[u8]) -> Result<(), SinkError> + Send + Sync);

/// The sink of loads that transform what they read.
pub struct Scratch<'a> {
    memory: Arc<HostBuffer>,
    /// Bytes of a slot: the plan's block length.
    slot: usize,
    free: Mutex<Free>,
    freed: Condvar,
    admit: Admit<'a>,
    take: Take<'a>,
}

#[derive(Debug)]
struct Free {
    slots: Vec<u64>,
    /// A slot is lost, and its reader gone: the others end, too, rather than wait for it.
    closed: bool,
}

impl fmt::Debug for Scratch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scratch").field("memory", &self.memory).finish_non_exhaustive()
    }
}

impl<'a> Scratch<'a> {
    /// Scratch memory for `slots` blocks of `plan`.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    pub fn new(
        plan: &ReadPlan,
        slots: usize,
        admit: Admit<'a>,
        take: Take<'a>,
    ) -> Result<Self, Error> {
        let slots = slots.clamp(1, plan.blocks().len().max(1));
        let too_much = || Error::Memory {
            bytes: plan.limits().block.saturating_mul(slots as u64),
            source: std::io::ErrorKind::OutOfMemory.into(),
        };
        let slot = usize::try_from(plan.limits().block).map_err(|_| too_much())?;
        let memory = Arc::new(HostBuffer::new(slot.checked_mul(slots).ok_or_else(too_much)?)?);
        let free = Free { slots: (0..slots as u64).collect(), closed: false };
        let free = Mutex::new(free);
        Ok(Self { memory, slot, free, freed: Condvar::new(), admit, take })
    }

    fn release(&self, slot: u64) {
        self.free().slots.push(slot);
        self.freed.notify_one();
    }

    fn free(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(|e| e.into_inner())
    }
}

// SAFETY: a slot's number is in `free` or inside exactly one target: it is popped to make the
// target, and pushed back only when the target has come back by value. Slots are disjoint ranges
// of `memory`, which this value owns and readers borrow. A target that is dropped loses its slot,
// so that nobody else gets it.
unsafe impl Sink for Scratch<'_> {
    fn reserve(&self, block: &Block, wait: bool) -> Result<Option<Target>, SinkError> {
        if block.len > self.slot as u64 {
            return Err(format!("a block of {} bytes for slots of {}", block.len, self.slot).into());
        }
        if !(self.admit)(block, wait)? {
            return Ok(None);
        }
        let mut free = self.free();
        let slot = loop {
            if free.closed {
                return Ok(None);
            }
            match free.slots.pop() {
                Some(slot) => break slot,
                None if !wait => return Ok(None),
                // Slots come back whenever a block has landed or failed, on any thread, unless one
                // is lost.
                None => free = self.freed.wait(free).unwrap_or_else(|e| e.into_inner()),
            }
        };
        drop(free);
        // SAFETY: `slot` is below the number of slots that `memory` was made for.
        let ptr = unsafe { self.memory.as_ptr().add(slot as usize * self.slot) };
        // SAFETY: see the comment on the implementation.
        Ok(Some(unsafe { Target::new(ptr, self.slot, slot) }))
    }

    fn reused(&self) -> Option<(NonNull<u8>, usize)> {
        Some((self.memory.as_ptr(), self.memory.len()))
    }

    fn landed(&self, block: &Block, target: Target) -> Result<(), SinkError> {
        let start = target.token() as usize * self.slot;
        let len = (block.need as usize).min(self.slot);
        // SAFETY: the target came back, so that nobody writes to its slot until `release`.
        let bytes = unsafe { self.memory.slice(start..start + len) }.unwrap_or_default();
        let result = (self.take)(block, bytes);
        self.release(target.token());
        result
    }

    fn abandoned(&self, _block: &Block, target: Target) {
        self.release(target.token());
    }

    fn lost(&self, _block: &Block, _target: Target) -> Option<Target> {
        std::mem::forget(self.memory.clone());
        self.free().closed = true;
        self.freed.notify_all();
        None
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;
    use crate::Extent;
    use crate::plan::Limits;

    #[test]
    fn a_reader_that_waits_ends_when_a_slot_is_lost() {
        let limits = Limits { block: 64 << 10, ..Limits::default() };
        let plan = ReadPlan::new(vec![Extent::new(0, 0..256 << 10)], limits).unwrap();
        let scratch = Scratch::new(&plan, 2, &|_, _| Ok(true), &|_, _| Ok(())).unwrap();
        let block = &plan.blocks()[0];
        let [first, second] = [0, 1].map(|_| scratch.reserve(block, true).unwrap().unwrap());
        let (told, ended) = channel();
        std::thread::scope(|scope| {
            let scratch = &scratch;
            scope.spawn(move || {
                told.send(scratch.reserve(block, true).map(|target| target.is_none())).unwrap();
            });
            assert!(ended.recv_timeout(Duration::from_millis(50)).is_err(), "nothing is free");
            assert!(scratch.lost(block, first).is_none());
            let closed = ended.recv_timeout(Duration::from_secs(60));
            // Whatever came of it, the thread ends.
            scratch.abandoned(block, second);
            assert!(closed.expect("the reader still waits").unwrap());
        });
        assert!(scratch.reserve(block, false).unwrap().is_none(), "others end, too");
    }
}
