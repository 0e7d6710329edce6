//! Host memory for checkpoints: large, aligned, on huge pages.
//!
//! Faulting fresh 4 KiB pages costs more than reading the bytes from a fast device does, so
//! buffers start at 2 MiB boundaries and ask for huge pages (`MADV_HUGEPAGE`).

use std::io;
use std::ops::{Deref, Range};
use std::ptr::NonNull;
use std::slice;
use std::sync::Arc;

use crate::budget::Lease;
use crate::error::Error;
use crate::sys::{self, Anonymous};

/// Size and alignment of a huge page on the machines that matter (x86-64, AArch64 with 4 KiB
/// pages), in bytes.
pub const HUGE_PAGE: usize = 2 << 20;

/// Zero-initialised memory that one owner fills and many then read.
#[derive(Debug)]
pub struct HostBuffer {
    map: Option<Anonymous>,
    len: usize,
    /// Declared behind the mapping, so that the bytes are back in the budget only once the memory
    /// is back with the system.
    lease: Option<Lease>,
}

impl HostBuffer {
    /// Reserves `len` bytes. Pages come when they are first written.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`] when the address space or a limit does not allow it.
    pub fn new(len: usize) -> Result<Self, Error> {
        if len == 0 {
            return Ok(Self { map: None, len, lease: None });
        }
        let fail = |source| Error::Memory { bytes: len as u64, source };
        let page = sys::page_size();
        let padded = len
            .checked_next_multiple_of(page)
            .ok_or_else(|| fail(io::ErrorKind::OutOfMemory.into()))?;
        let huge = padded >= HUGE_PAGE;
        let map = Anonymous::new(padded, if huge { HUGE_PAGE } else { page }).map_err(fail)?;
        if huge {
            // Without huge pages (disabled, or an old kernel) the load is slower and still right.
            let _ = map.advise(0, padded, libc::MADV_HUGEPAGE);
        }
        Ok(Self { map: Some(map), len, lease: None })
    }

    /// Ties a part of a budget to the life of this buffer.
    pub fn with_lease(mut self, lease: Lease) -> Self {
        self.lease = Some(lease);
        self
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the buffer holds no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that may be written from the start: the length up to the next page border.
    pub fn capacity(&self) -> usize {
        self.map.as_ref().map_or(0, Anonymous::len)
    }

    /// Where the buffer starts; dangling when it is empty. Writing through it is for whoever
    /// knows that no slice of these bytes exists.
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.map.as_ref().map_or(NonNull::dangling(), Anonymous::ptr)
    }

    /// The bytes of `range`, or `None` when it lies outside.
    ///
    /// # Safety
    ///
    /// Nobody may write to these bytes while the slice lives: whoever filled them has finished.
    pub unsafe fn slice(&self, range: Range<usize>) -> Option<&[u8]> {
        let start = self.start_of(&range)?;
        // SAFETY: the range lies in the mapping (or is empty, where the dangling pointer is
        // valid), which is initialised (anonymous memory starts as zeros) and lives as long as
        // `self`; the caller vouches that nobody writes.
        Some(unsafe { slice::from_raw_parts(start, range.len()) })
    }

    /// The bytes of `range` for writing, or `None` when it lies outside.
    ///
    /// # Safety
    ///
    /// Nobody else may read or write these bytes while the slice lives.
    #[expect(clippy::mut_from_ref, reason = "that this is exclusive is the caller's promise")]
    pub unsafe fn slice_mut(&self, range: Range<usize>) -> Option<&mut [u8]> {
        let start = self.start_of(&range)?;
        // SAFETY: as in `slice`; the caller vouches for exclusive access.
        Some(unsafe { slice::from_raw_parts_mut(start, range.len()) })
    }

    fn start_of(&self, range: &Range<usize>) -> Option<*mut u8> {
        let inside = range.start <= range.end && range.end <= self.len;
        inside.then(|| self.as_ptr().as_ptr().wrapping_add(range.start))
    }

    /// Backs a part of the buffer with memory now, as first writes would. Best effort: the range
    /// is widened to whole pages, and a refusal leaves the faults to the writers.
    pub fn populate(&self, offset: usize, len: usize) {
        if let Some(map) = &self.map {
            let page = sys::page_size();
            let start = offset / page * page;
            // The mapping ends at a page border.
            let end = offset.saturating_add(len).min(map.len()).next_multiple_of(page);
            if start < end {
                let _ = map.advise(start, end - start, libc::MADV_POPULATE_WRITE);
            }
        }
    }
}

/// A buffer that nobody writes to any more. Clones share it; the last one frees it.
#[derive(Debug, Clone)]
pub struct SharedBuffer(Arc<HostBuffer>);

impl SharedBuffer {
    /// Declares a buffer finished.
    ///
    /// # Safety
    ///
    /// Nobody writes to the buffer from here on, whoever else may hold a reference to it; but for the
    /// only owner of a range of it, if no slice of these bytes is made any more, by [`Deref`] included.
    pub unsafe fn new(buffer: Arc<HostBuffer>) -> Self {
        Self(buffer)
    }

    /// A buffer of `len` bytes that `fill` writes.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`], or what `fill` returns.
    pub fn filled<E: From<Error>>(
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<Self, E> {
        let buffer = HostBuffer::new(len)?;
        // SAFETY: nobody else has the buffer yet.
        fill(unsafe { buffer.slice_mut(0..len) }.unwrap_or_default())?;
        // SAFETY: the only writer is done.
        Ok(unsafe { Self::new(Arc::new(buffer)) })
    }

    /// A buffer without bytes.
    pub fn empty() -> Self {
        Self(Arc::new(HostBuffer { map: None, len: 0, lease: None }))
    }

    /// The bytes of `range`, or `None` when it lies outside. No slice is made of the other bytes, which
    /// may have other owners.
    pub fn bytes(&self, range: Range<usize>) -> Option<&[u8]> {
        // SAFETY: nobody writes any more, by the contract of `new`.
        unsafe { self.0.slice(range) }
    }

    /// Where `range` starts, or `None` when it lies outside.
    pub fn address(&self, range: &Range<usize>) -> Option<NonNull<u8>> {
        NonNull::new(self.0.start_of(range)?)
    }

    /// Length in bytes of what is reserved for this buffer.
    pub fn capacity(&self) -> usize {
        self.0.capacity()
    }
}

impl Deref for SharedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: nobody writes any more, by the contract of `new`.
        unsafe { self.0.slice(0..self.0.len) }.unwrap_or_default()
    }
}

/// Bytes of a [`SharedBuffer`] that go back to the system as soon as nobody holds them, whoever holds
/// others: the pages wholly inside, and their part of the budget. Clones share them.
#[derive(Debug, Clone)]
pub struct Piece(Arc<Held>);

#[derive(Debug)]
struct Held {
    buffer: SharedBuffer,
    range: Range<usize>,
}

impl SharedBuffer {
    /// Bytes `range` of the buffer, as far as it has them.
    ///
    /// # Safety
    ///
    /// From here on the bytes are read through this piece and its clones only: once those are gone, the
    /// bytes are too.
    pub unsafe fn piece(self, range: Range<usize>) -> Piece {
        let end = range.end.min(self.0.len);
        Piece(Arc::new(Held { range: range.start.min(end)..end, buffer: self }))
    }
}

impl Piece {
    /// Where it starts; `None` when the buffer is empty.
    pub fn address(&self) -> Option<NonNull<u8>> {
        self.0.buffer.address(&self.0.range)
    }
}

impl Deref for Piece {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: nobody writes to a shared buffer, and the pages are there as long as this piece.
        unsafe { self.0.buffer.0.slice(self.0.range.clone()) }.unwrap_or_default()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let buffer = &self.buffer.0;
        // The last holder's pages go with the whole buffer.
        let Some(map) = buffer.map.as_ref().filter(|_| Arc::strong_count(buffer) > 1) else {
            return;
        };
        let page = sys::page_size();
        let (start, end) = (self.range.start.next_multiple_of(page), self.range.end / page * page);
        if start >= end {
            return;
        }
        // SAFETY: these bytes were read through this piece only, by the contract of `piece`.
        let discarded = unsafe { map.discard(start, end - start) };
        if let (Ok(()), Some(lease)) = (discarded, &buffer.lease) {
            lease.give_back((end - start) as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Budget;

    #[test]
    fn a_dropped_piece_gives_its_pages_back_whoever_holds_others() {
        let (page, len) = (sys::page_size(), 4 * HUGE_PAGE);
        let budget = Budget::new(len as u64);
        let buffer = HostBuffer::new(len).unwrap().with_lease(budget.take(len as u64).unwrap());
        // SAFETY: nobody else has the buffer yet.
        unsafe { buffer.slice_mut(0..len) }.unwrap().fill(7);
        // SAFETY: the only writer is done.
        let shared = unsafe { SharedBuffer::new(Arc::new(buffer)) };
        // SAFETY: the pieces are apart, and nothing is read but through them until they are gone.
        let (small, large) =
            unsafe { (shared.clone().piece(0..100), shared.clone().piece(100..len)) };
        let twin = large.clone();
        drop(large);
        assert!(budget.used() == len as u64 && twin.iter().all(|byte| *byte == 7));
        drop(twin);
        assert_eq!(budget.used(), page as u64);
        assert!(small.iter().all(|byte| *byte == 7));
        // Pages that went back are zeros when they come again.
        assert!(shared[page..].iter().all(|byte| *byte == 0));
        drop((shared, small));
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn buffers_are_aligned_zeroed_and_bounded() {
        for len in [1, 4096, 5000, HUGE_PAGE, 3 * HUGE_PAGE + 1] {
            let buffer = HostBuffer::new(len).unwrap();
            let align = if buffer.capacity() >= HUGE_PAGE { HUGE_PAGE } else { 4096 };
            assert_eq!(buffer.as_ptr().as_ptr() as usize % align, 0);
            assert!(buffer.capacity() >= len);
            buffer.populate(len / 2, len);
            buffer.populate(len / 2, usize::MAX);
            buffer.populate(usize::MAX, usize::MAX);
            // SAFETY: nobody writes to this buffer.
            unsafe {
                assert!(buffer.slice(0..len).unwrap().iter().all(|b| *b == 0));
                assert!(buffer.slice(0..len + 1).is_none());
            }
        }
    }

    #[test]
    fn an_empty_buffer_has_an_empty_slice() {
        let buffer = HostBuffer::new(0).unwrap();
        // SAFETY: nobody writes to this buffer.
        assert_eq!(unsafe { buffer.slice(0..0) }, Some(&[][..]));
    }

    #[test]
    fn too_much_is_an_error() {
        assert!(matches!(HostBuffer::new(usize::MAX), Err(Error::Memory { .. })));
        assert!(matches!(HostBuffer::new(1 << 60), Err(Error::Memory { .. })));
    }
}
