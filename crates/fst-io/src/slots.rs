//! A few reused pieces of memory, lent one at a time.

use std::ptr::NonNull;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use crate::buffer::HostBuffer;
use crate::error::Error;
use crate::sink::WAIT;

/// Equal slots in one range of memory. A slot is free, or it belongs to whoever took it and has not
/// [released](Self::release) it.
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

    /// First byte of a slot.
    pub fn start(&self, slot: u64) -> Option<NonNull<u8>> {
        let start = usize::try_from(slot).ok()?.checked_mul(self.len)?;
        let end = start.checked_add(self.len)?;
        let within = end <= self.memory.capacity();
        NonNull::new(self.memory.as_ptr().as_ptr().wrapping_add(start)).filter(|_| within)
    }

    /// A free slot. Without one the answer is `None`: at once, or, with `wait`, after a short while
    /// ([`WAIT`]) in which none came back, or when woken.
    pub fn take(&self, wait: bool) -> Option<u64> {
        let mut free = self.free();
        if free.is_empty() && wait {
            let waited = self.changed.wait_timeout(free, WAIT);
            free = waited.unwrap_or_else(|e| e.into_inner()).0;
        }
        free.pop()
    }

    /// Gives a slot back.
    ///
    /// # Safety
    ///
    /// It came from [`take`](Self::take), is given back once, and nobody uses it any more.
    pub unsafe fn release(&self, slot: u64) {
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
