//! Where transformed tensors go: arenas, or memory that the caller has.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::ptr::NonNull;

use fst_io::arenas::Arenas;
use fst_io::sink::SinkError;

/// The memory of a plan's arenas.
pub(crate) trait Memory: Send + Sync {
    /// Whether an arena can be written to; with `wait`, waits a short while until it can.
    fn ready(&self, arena: usize, wait: bool) -> Result<bool, SinkError>;

    /// Backs bytes `range` of an arena with memory, ahead of the writes to them. Best effort: what
    /// is not backed costs the writer its faults.
    fn populate(&self, arena: usize, range: Range<usize>) -> Result<(), SinkError>;

    /// Lets `fill` write bytes `range` of an arena, all of them; `false` if there are none such.
    ///
    /// # Safety
    ///
    /// Nobody else reads or writes these bytes meanwhile.
    unsafe fn write(
        &self,
        arena: usize,
        range: Range<usize>,
        fill: impl FnOnce(&mut [u8]) -> Result<(), SinkError>,
    ) -> Result<bool, SinkError>;

    /// Copies `bytes` to position `at` of an arena; `false` if it does not have as many there.
    ///
    /// # Safety
    ///
    /// As for [`write`](Self::write).
    unsafe fn copy(&self, arena: usize, at: usize, bytes: &[u8]) -> Result<bool, SinkError> {
        let fill = |out: &mut [u8]| {
            out.copy_from_slice(bytes);
            Ok(())
        };
        // SAFETY: passed on from the caller.
        unsafe { self.write(arena, at..at + bytes.len(), fill) }
    }

    /// Counts source bytes of an arena as dealt with.
    ///
    /// # Safety
    ///
    /// What they become has been written, once.
    unsafe fn fill(&self, arena: usize, amount: u64) -> Result<(), SinkError>;
}

impl Memory for Arenas<'_> {
    fn ready(&self, arena: usize, wait: bool) -> Result<bool, SinkError> {
        Ok(self.get(arena, wait)?.is_some())
    }

    fn populate(&self, arena: usize, range: Range<usize>) -> Result<(), SinkError> {
        if let Some(buffer) = self.get(arena, false)? {
            buffer.prepare(range.start, range.len());
            buffer.populate(range.start, range.len());
        }
        Ok(())
    }

    unsafe fn write(
        &self,
        arena: usize,
        range: Range<usize>,
        fill: impl FnOnce(&mut [u8]) -> Result<(), SinkError>,
    ) -> Result<bool, SinkError> {
        let Some(buffer) = self.get(arena, true)? else { return Ok(false) };
        // SAFETY: passed on from the caller.
        let Some(out) = (unsafe { buffer.slice_mut(range) }) else { return Ok(false) };
        fill(out).map(|()| true)
    }

    unsafe fn fill(&self, arena: usize, amount: u64) -> Result<(), SinkError> {
        // SAFETY: passed on from the caller.
        unsafe { Arenas::fill(self, arena, amount) }
    }
}

/// Memory of a caller's, one piece of it for each arena.
pub(crate) struct Borrowed<'d> {
    /// Exclusively this value's for `'d`.
    pieces: Vec<(NonNull<u8>, usize)>,
    memory: PhantomData<&'d mut [MaybeUninit<u8>]>,
    on_filled: OnFilled<'d>,
}

/// Told of source bytes of a piece that were dealt with.
pub(crate) type OnFilled<'a> = &'a (dyn Fn(usize, u64) -> Result<(), SinkError> + Send + Sync);

// SAFETY: it is a set of `&mut [MaybeUninit<u8>]`, which may go to another thread.
unsafe impl Send for Borrowed<'_> {}
// SAFETY: shared references reach the memory through `write` only, whose callers see to it that
// nobody else touches the same bytes.
unsafe impl Sync for Borrowed<'_> {}

impl<'d> Borrowed<'d> {
    pub(crate) fn new(
        pieces: impl IntoIterator<Item = &'d mut [MaybeUninit<u8>]>,
        on_filled: OnFilled<'d>,
    ) -> Self {
        let piece = |piece: &'d mut [MaybeUninit<u8>]| {
            let len = piece.len();
            (NonNull::from(piece).cast(), len)
        };
        Self { pieces: pieces.into_iter().map(piece).collect(), memory: PhantomData, on_filled }
    }
}

impl Memory for Borrowed<'_> {
    fn ready(&self, _arena: usize, _wait: bool) -> Result<bool, SinkError> {
        Ok(true)
    }

    /// The caller's memory is as fresh as the caller left it.
    fn populate(&self, _arena: usize, _range: Range<usize>) -> Result<(), SinkError> {
        Ok(())
    }

    unsafe fn write(
        &self,
        arena: usize,
        range: Range<usize>,
        fill: impl FnOnce(&mut [u8]) -> Result<(), SinkError>,
    ) -> Result<bool, SinkError> {
        let Some((start, len)) = self.pieces.get(arena) else { return Ok(false) };
        if range.start > range.end || range.end > *len {
            return Ok(false);
        }
        // SAFETY: the range lies in the piece, which is borrowed for `'d`; the caller vouches that
        // nobody else touches it. Zeros initialise it: these bytes may never have been written,
        // and they are in this core's cache when `fill` overwrites them.
        let out = unsafe {
            let start = start.add(range.start).as_ptr();
            start.write_bytes(0, range.len());
            std::slice::from_raw_parts_mut(start, range.len())
        };
        fill(out).map(|()| true)
    }

    unsafe fn copy(&self, arena: usize, at: usize, bytes: &[u8]) -> Result<bool, SinkError> {
        let Some((start, len)) = self.pieces.get(arena) else { return Ok(false) };
        if at.checked_add(bytes.len()).is_none_or(|end| end > *len) {
            return Ok(false);
        }
        // SAFETY: the range lies in the piece, which is borrowed for `'d`; the caller vouches that
        // nobody else touches it, so that `bytes` is other memory.
        unsafe { start.add(at).copy_from_nonoverlapping(NonNull::from(bytes).cast(), bytes.len()) };
        Ok(true)
    }

    unsafe fn fill(&self, arena: usize, amount: u64) -> Result<(), SinkError> {
        (self.on_filled)(arena, amount)
    }
}
