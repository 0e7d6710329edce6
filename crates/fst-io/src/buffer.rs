//! Host memory for checkpoints: large, aligned, on huge pages.
//!
//! Faulting fresh 4 KiB pages costs more than reading the bytes from a fast device does, so
//! buffers start at 2 MiB boundaries and ask for huge pages (`MADV_HUGEPAGE`), unless those come
//! [slower](crate::touch).

use std::io;
use std::ops::{Deref, Range};
use std::ptr::NonNull;
use std::slice;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::budget::Lease;
use crate::error::Error;
use crate::kept;
use crate::sys::{self, Anonymous};
use crate::touch;

/// Size and alignment of a huge page on the machines that matter (x86-64, AArch64 with 4 KiB
/// pages), in bytes.
pub const HUGE_PAGE: usize = 2 << 20;

/// Initialised memory that one owner fills and many then read.
#[derive(Debug)]
pub struct HostBuffer {
    map: Option<Arc<Anonymous>>,
    len: usize,
    /// For each [region](touch::REGION) of fresh memory, whether the kind of its pages was chosen.
    prepared: Box<[AtomicBool]>,
    /// Whether some of its pages were chosen to be small.
    small_pages: AtomicBool,
    /// Bytes from the start that had memory behind them before.
    backed: usize,
    /// Whether its writers are done with all of it.
    filled: AtomicBool,
    /// Declared behind the mapping, so that the bytes are back in the budget only once the memory
    /// is back with the system.
    owner: Owner,
}

/// Where a buffer's memory comes from first, and who has it afterwards.
#[derive(Debug)]
enum Owner {
    System,
    Budget(Lease),
    /// The process, which keeps as many bytes at most.
    Process(u64),
}

impl Owner {
    /// Memory of `len` bytes (whole pages) that is there, and how many from its start are backed.
    fn reused(&self, len: usize) -> Option<(Arc<Anonymous>, usize)> {
        match self {
            Self::System => None,
            Self::Budget(lease) => lease.reused(len),
            Self::Process(_) => kept::take(len),
        }
    }

    /// A new mapping of `len` bytes or more, at a multiple of `align`.
    fn fresh(&self, len: usize, align: usize) -> io::Result<Arc<Anonymous>> {
        let keeps = match self {
            Self::System => false,
            Self::Budget(lease) => lease.keeps(),
            Self::Process(_) => true,
        };
        // Address space costs nothing, and the next buffer may be a little longer.
        let longer = len.checked_next_power_of_two().filter(|longer| keeps && *longer > len);
        let map = longer.and_then(|longer| Anonymous::new(longer, align).ok());
        let map = Arc::new(map.map_or_else(|| Anonymous::new(len, align), Ok)?);
        match self {
            Self::System => {}
            Self::Budget(lease) => lease.add(&map, len),
            Self::Process(_) => kept::add(&map, len),
        }
        Ok(map)
    }
}

impl HostBuffer {
    /// Reserves `len` zero bytes. Pages come when they are first written.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`] when the address space or a limit does not allow it.
    pub fn new(len: usize) -> Result<Self, Error> {
        Self::with(len, Owner::System)
    }

    /// Reserves `len` bytes that count against a budget as long as they live. They hold anything: memory
    /// that earlier buffers of the budget had is used again.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new).
    pub fn leased(len: usize, lease: Lease) -> Result<Self, Error> {
        Self::with(len, Owner::Budget(lease))
    }

    /// Reserves `len` bytes that stay with the process when the buffer and its [pieces](Piece) are gone, as
    /// long as no more than `most` bytes do ([`kept_bytes`](crate::kept_bytes)). They hold anything: what was
    /// kept before is used first.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new).
    pub fn kept(len: usize, most: u64) -> Result<Self, Error> {
        Self::with(len, if most > 0 { Owner::Process(most) } else { Owner::System })
    }

    fn with(len: usize, owner: Owner) -> Result<Self, Error> {
        let mut buffer = Self {
            map: None,
            len,
            prepared: Box::default(),
            small_pages: false.into(),
            backed: 0,
            filled: false.into(),
            owner,
        };
        if len == 0 {
            return Ok(buffer);
        }
        let fail = |source| Error::Memory { bytes: len as u64, source };
        let page = sys::page_size();
        let padded = len
            .checked_next_multiple_of(page)
            .ok_or_else(|| fail(io::ErrorKind::OutOfMemory.into()))?;
        if let Some((map, backed)) = buffer.owner.reused(padded) {
            (buffer.map, buffer.backed) = (Some(map), backed);
            return Ok(buffer);
        }
        let huge = padded >= HUGE_PAGE;
        let align = if huge { HUGE_PAGE } else { page };
        let map = buffer.owner.fresh(padded, align).map_err(fail)?;
        if huge {
            // Without huge pages (disabled, or an old kernel) the load is slower and still right.
            let _ = map.advise(0, map.len(), sys::MADV_HUGEPAGE);
            let regions = len.div_ceil(touch::REGION);
            buffer.prepared = (0..regions).map(|_| AtomicBool::new(false)).collect();
        }
        buffer.map = Some(map);
        Ok(buffer)
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
        // No more was asked for, and the mapping may be longer.
        self.len.next_multiple_of(sys::page_size())
    }

    /// Where the buffer starts; dangling when it is empty. Writing through it is for whoever
    /// knows that no slice of these bytes exists.
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.map.as_ref().map_or(NonNull::dangling(), |map| map.ptr())
    }

    /// The bytes of `range`, or `None` when it lies outside.
    ///
    /// # Safety
    ///
    /// Nobody may write to these bytes while the slice lives: whoever filled them has finished.
    pub unsafe fn slice(&self, range: Range<usize>) -> Option<&[u8]> {
        let start = self.start_of(&range)?;
        // SAFETY: the range lies in the mapping (or is empty, where the dangling pointer is
        // valid), which is initialised (anonymous memory starts as zeros, whoever wrote to it since)
        // and lives as long as `self`; the caller vouches that nobody writes.
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

    /// Chooses the kind of pages that a part of the buffer gets, before the first write to it: it touches some
    /// of them. Once for each part.
    pub fn prepare(&self, offset: usize, len: usize) {
        let Some(map) = self.map.as_ref().filter(|_| !self.prepared.is_empty() && len > 0) else {
            return;
        };
        let last = offset.saturating_add(len - 1) / touch::REGION;
        for region in offset / touch::REGION..=last.min(self.prepared.len().saturating_sub(1)) {
            if !self.prepared[region].load(Relaxed) && !self.prepared[region].swap(true, Relaxed) {
                let start = region * touch::REGION;
                let end = (start + touch::REGION).min(map.len());
                if touch::choose(map, start..end) {
                    self.small_pages.store(true, Relaxed);
                }
            }
        }
    }

    /// Whether a part of the buffer had memory behind it from the start.
    pub fn is_backed(&self, offset: usize, len: usize) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.backed)
    }

    /// Backs a part of the buffer with memory now, as first writes would. Best effort: the range
    /// is widened to whole pages, and a refusal leaves the faults to the writers.
    pub fn populate(&self, offset: usize, len: usize) {
        if let Some(map) = &self.map {
            let page = sys::page_size();
            let end = offset.saturating_add(len).min(self.len).next_multiple_of(page);
            let start = offset.max(self.backed) / page * page;
            if start < end {
                let _ = map.advise(start, end - start, sys::MADV_POPULATE_WRITE);
            }
        }
    }
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        let Some(map) = &self.map else { return };
        let filled = self.filled.load(Relaxed);
        match &self.owner {
            Owner::System => {}
            Owner::Budget(lease) => lease.leave(map, filled),
            Owner::Process(most) => kept::leave(map, filled, *most),
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
        buffer.filled.store(true, Relaxed);
        if let Some(map) = buffer.map.as_ref().filter(|_| buffer.small_pages.load(Relaxed)) {
            // Its memory is there: the system may join small pages in its own time.
            let _ = map.advise(0, map.len(), sys::MADV_HUGEPAGE);
        }
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
        Self(Arc::new(HostBuffer {
            map: None,
            len: 0,
            prepared: Box::default(),
            small_pages: false.into(),
            backed: 0,
            filled: true.into(),
            owner: Owner::System,
        }))
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

/// Bytes of a [`SharedBuffer`] that go back to the system, or to the budget or the kept memory that they are of,
/// as soon as nobody holds them, whoever holds others: the pages wholly inside. Clones share them.
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
    /// Whether this is the only one of its bytes.
    pub fn is_owned(&mut self) -> bool {
        Arc::get_mut(&mut self.0).is_some()
    }

    /// Its bytes for writing, if this is the only one of them.
    pub fn get_mut(&mut self) -> Option<&mut [u8]> {
        let held = Arc::get_mut(&mut self.0)?;
        // SAFETY: these bytes are read through this piece only, which nobody shares.
        unsafe { held.buffer.0.slice_mut(held.range.clone()) }
    }

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
        unsafe {
            let kept = match &buffer.owner {
                Owner::System => false,
                Owner::Budget(lease) => {
                    lease.retire(map, start..end);
                    true
                }
                Owner::Process(most) => kept::retire(map, start..end, *most),
            };
            if !kept {
                // What the system does not take goes with the buffer.
                let _ = map.discard(start, end - start);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Budget;

    /// A buffer full of sevens.
    fn sevens(len: usize, budget: Option<&Budget>) -> SharedBuffer {
        let buffer = match budget {
            Some(budget) => HostBuffer::leased(len, budget.take(len as u64).unwrap()).unwrap(),
            None => HostBuffer::new(len).unwrap(),
        };
        // SAFETY: nobody else has the buffer yet.
        unsafe { buffer.slice_mut(0..len) }.unwrap().fill(7);
        // SAFETY: the only writer is done.
        unsafe { SharedBuffer::new(Arc::new(buffer)) }
    }

    #[test]
    fn a_dropped_piece_gives_its_pages_back_whoever_holds_others() {
        let (page, len) = (sys::page_size(), 4 * HUGE_PAGE);
        for budget in [None, Some(Budget::new(len as u64))] {
            let shared = sevens(len, budget.as_ref());
            let used = || budget.as_ref().map_or(0, Budget::used);
            let full = used();
            // SAFETY: the pieces are apart, and nothing is read but through them until they are gone.
            let (small, large) =
                unsafe { (shared.clone().piece(0..100), shared.clone().piece(100..len)) };
            let twin = large.clone();
            drop(large);
            assert!(used() == full && twin.iter().all(|byte| *byte == 7));
            drop(twin);
            // The system has them, or at the latest when the budget has no use for them any more.
            if let Some(budget) = &budget {
                assert_eq!(used(), page as u64);
                assert!(shared[page..].iter().all(|byte| *byte == 7));
                budget.close();
            }
            assert!(small.iter().all(|byte| *byte == 7));
            assert!(shared[page..].iter().all(|byte| *byte == 0));
            drop((shared, small));
            assert_eq!(used(), 0);
        }
    }

    /// Whether memory stands behind each page.
    fn resident(buffer: &HostBuffer) -> Vec<bool> {
        let mut pages = vec![0u8; buffer.capacity() / sys::page_size()];
        let start = buffer.as_ptr().as_ptr().cast();
        // SAFETY: the range is mapped, and there is a byte for each of its pages.
        let status = unsafe { libc::mincore(start, buffer.capacity(), pages.as_mut_ptr()) };
        assert_eq!(status, 0);
        pages.iter().map(|page| page & 1 == 1).collect()
    }

    #[test]
    fn a_budget_uses_memory_again_and_never_more_than_its_limit() {
        let (page, budget) = (sys::page_size(), Budget::new(16 * sys::page_size() as u64));
        let take = |pages: usize| {
            HostBuffer::leased(pages * page, budget.take((pages * page) as u64).unwrap()).unwrap()
        };
        drop(sevens(8 * page, Some(&budget)));
        // Shorter, the same memory.
        let short = take(6);
        assert!(resident(&short) == [true; 6]);
        assert_eq!(short.capacity(), 6 * page);
        // SAFETY: nobody writes to this buffer.
        assert!(unsafe { short.slice(0..6 * page) }.unwrap().iter().all(|byte| *byte == 7));
        // All but two pages are in use: those behind the short buffer may stay.
        let rest = take(8);
        assert!(resident(&rest) == [false; 8]);
        drop(short);
        assert!(resident(&take(8)) == [true; 8]);
        // There is no room for the eight pages left behind beside what is in use now.
        let most = take(7);
        assert!(resident(&most) == [true; 7]);
        drop((most, rest));
        assert!(resident(&take(16)) == [false; 16]);
        let shared = sevens(8 * page, Some(&budget));
        // SAFETY: the pieces are apart, and nothing is read but through them.
        let (held, dropped) =
            unsafe { (shared.clone().piece(0..page), shared.piece(page..8 * page)) };
        let pages = |held: &Piece| resident(&held.0.buffer.0).iter().filter(|page| **page).count();
        drop(dropped);
        assert_eq!(pages(&held), 8, "there is room for all");
        let most = take(15);
        assert_eq!(pages(&held), 1, "there is none");
        budget.close();
        drop((most, held));
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
