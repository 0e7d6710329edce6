//! A few reused pieces of memory, lent one at a time.

use std::ptr::NonNull;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use crate::buffer::HostBuffer;
use crate::error::Error;
use crate::ledger::{Ledger, NoPlace};
use crate::plan::Block;
use crate::sink::{Target, WAIT};

/// Equal slots in one range of memory. A slot is free, or inside exactly one [`Target`].
#[derive(Debug)]
pub struct Slots {
    memory: Arc<HostBuffer>,
    /// Bytes of a slot.
    len: usize,
    free: Mutex<Vec<u64>>,
    changed: Condvar,
}

impl Slots {
    /// Memory for `count` slots of `len` bytes each.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    pub fn new(count: usize, len: u64) -> Result<Self, Error> {
        let too_much = || Error::Memory {
            bytes: len.saturating_mul(count as u64),
            source: std::io::ErrorKind::OutOfMemory.into(),
        };
        let len = usize::try_from(len).map_err(|_| too_much())?;
        let bytes = len.checked_mul(count).ok_or_else(too_much)?;
        let memory = Arc::new(HostBuffer::new(bytes)?);
        let free = Mutex::new((0..count as u64).collect());
        Ok(Self { memory, len, free, changed: Condvar::new() })
    }

    /// Bytes of a slot.
    pub fn slot_len(&self) -> usize {
        self.len
    }

    /// The memory of all slots.
    pub fn memory(&self) -> &Arc<HostBuffer> {
        &self.memory
    }

    /// Lends a slot for a block, which it must hold. Without a free one the answer is `None`: at once, or,
    /// with `wait`, after a short while ([`WAIT`]) in which none came back, or when woken. A target that
    /// is dropped loses its slot, so that nobody else gets it.
    ///
    /// # Errors
    ///
    /// [`NoPlace`].
    pub fn lend(
        &self,
        ledger: &Ledger<'_>,
        block: &Block,
        wait: bool,
    ) -> Result<Option<Target>, NoPlace> {
        ledger.free(block)?;
        if block.len > self.len as u64 {
            return Err(NoPlace::of(block));
        }
        let Some(slot) = self.take(wait) else { return Ok(None) };
        let Some(ptr) = self.start(slot) else { return Ok(None) };
        // SAFETY: the slot was free, so that nobody uses its memory until it is released; slots are
        // disjoint, and the target keeps the memory of all.
        let target = unsafe { ledger.lend(block, ptr, self.len, slot) };
        if target.is_err() {
            self.release(slot);
        }
        Ok(Some(target?.owned_by(self.memory.clone())))
    }

    /// Takes the slot of a target back, if `ledger` made the target for `block`.
    ///
    /// # Safety
    ///
    /// Those of the ledger's targets that come here were [lent](Self::lend) by these slots.
    pub unsafe fn take_back(&self, ledger: &Ledger<'_>, block: &Block, target: Target) {
        if ledger.check(block, &target).is_ok() {
            self.release(target.token());
        }
    }

    /// First byte of a slot.
    fn start(&self, slot: u64) -> Option<NonNull<u8>> {
        let start = usize::try_from(slot).ok()?.checked_mul(self.len)?;
        let end = start.checked_add(self.len)?;
        let within = end <= self.memory.capacity();
        NonNull::new(self.memory.as_ptr().as_ptr().wrapping_add(start)).filter(|_| within)
    }

    fn take(&self, wait: bool) -> Option<u64> {
        let mut free = self.free();
        if free.is_empty() && wait {
            let waited = self.changed.wait_timeout(free, WAIT);
            free = waited.unwrap_or_else(|e| e.into_inner()).0;
        }
        free.pop()
    }

    fn release(&self, slot: u64) {
        self.free().push(slot);
        self.changed.notify_one();
    }

    /// Wakes those who wait for a slot.
    pub fn wake(&self) {
        drop(self.free());
        self.changed.notify_all();
    }

    fn free(&self) -> MutexGuard<'_, Vec<u64>> {
        self.free.lock().unwrap_or_else(|e| e.into_inner())
    }
}
