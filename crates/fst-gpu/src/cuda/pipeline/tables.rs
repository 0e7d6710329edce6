//! Tables of jobs on their way to the device: pinned slots that are written again only after the copy
//! out of them has run.
//!
//! Pageable memory would not do. A driver that reaches it directly (heterogeneous memory management,
//! Grace) may read it when the copy runs, and one that does not may wait for the stream first ("CUDA
//! Driver API", "API synchronization behavior").

use crate::cuda::buffer::pinned::PinnedMemory;
use crate::cuda::device::CudaDevice;
use crate::cuda::stream::{Event, Stream};
use crate::error::Result;
use cudarc::driver::sys;

/// Bytes of a table of jobs on the device, and of a slot.
pub(crate) const TABLE_BYTES: u64 = 64 << 10;

/// Tables that may be on their way at once.
const SLOTS: usize = 2;

/// Bytes of the slots of one stream.
pub(crate) const SLOTS_BYTES: u64 = SLOTS as u64 * TABLE_BYTES;

/// The slots of one stream.
pub(crate) struct Tables {
    memory: PinnedMemory,
    /// Behind the copy out of each slot.
    events: Vec<Event>,
    next: usize,
}

impl Tables {
    pub(crate) fn new(device: &CudaDevice) -> Result<Self> {
        let events = (0..SLOTS).map(|_| Event::new(device)).collect::<Result<_>>()?;
        let memory = PinnedMemory::allocate(device, SLOTS_BYTES as usize)?;
        Ok(Self { memory, events, next: 0 })
    }

    /// Queues the copy of `bytes`, at most [`TABLE_BYTES`], to device address `to`. Waits for an
    /// earlier copy if all slots are on their way.
    ///
    /// # Safety
    ///
    /// `to` has room for a table, is used in the order of the stream and by it alone. The context is
    /// current. The slots are freed, or leaked, only once the stream's work has run.
    pub(crate) unsafe fn send(&mut self, stream: &Stream, to: u64, bytes: &[u8]) -> Result<()> {
        let bytes = &bytes[..bytes.len().min(TABLE_BYTES as usize)];
        let Some(event) = self.events.get(self.next) else { return Ok(()) };
        // One that was never recorded is complete.
        event.synchronize()?;
        // SAFETY: the slot lies in the memory, and nothing reads it any more.
        let slot = unsafe { self.memory.start().add(self.next * TABLE_BYTES as usize) };
        // SAFETY: as above; it has room for the bytes, and the copy is waited for before it is written
        // again or freed.
        let result = unsafe {
            slot.as_ptr().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
            sys::cuMemcpyHtoDAsync_v2(to, slot.as_ptr().cast(), bytes.len(), stream.handle())
        };
        stream.device().check(result, "cuMemcpyHtoDAsync")?;
        let recorded = event.record_current(stream);
        if recorded.is_err() {
            // No mark says when the slot is free.
            stream.synchronize()?;
        }
        self.next = (self.next + 1) % SLOTS;
        recorded
    }

    /// Bytes that are pinned.
    pub(crate) fn bytes(&self) -> u64 {
        SLOTS as u64 * TABLE_BYTES
    }

    /// Gives the slots up without freeing them: a copy engine may still read them.
    pub(crate) fn leak(self) {
        self.memory.leak();
    }
}
