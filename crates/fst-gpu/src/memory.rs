//! Where pieces go that pass through scratch memory: arenas, or memory that the caller has.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::ptr::NonNull;

use fst_io::HostBuffer;
use fst_io::arenas::{ArenaMemory, Arenas};
use fst_io::sink::SinkError;
use fst_io::touch::Untouched;

/// The memory of a plan's arenas.
pub(crate) trait Memory: Send + Sync {
    /// Whether an arena can be written to; with `wait`, waits a short while until it can.
    fn ready(&self, arena: usize, wait: bool) -> Result<bool, SinkError>;

    /// Whether an arena can be written to before its turn.
    fn prefer(&self, arena: usize) -> Result<bool, SinkError> {
        self.ready(arena, false)
    }

    /// Backs bytes `range` of an arena with memory, ahead of the writes to them, unless that is the owner's
    /// affair: then `false`. Best effort: what is not backed costs the writer its faults.
    fn populate(&self, arena: usize, range: Range<usize>) -> Result<bool, SinkError>;

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

    /// Counts source bytes of an arena as used up.
    ///
    /// # Safety
    ///
    /// What they become has been written, once.
    unsafe fn fill(&self, arena: usize, amount: u64) -> Result<(), SinkError>;
}

/// Memory of an arena that may be on the host.
pub(crate) trait OnHost: ArenaMemory {
    /// The memory, if that is where it is.
    fn on_host(&self) -> Option<&HostBuffer>;
}

impl OnHost for HostBuffer {
    fn on_host(&self) -> Option<&HostBuffer> {
        Some(self)
    }
}

impl<M: OnHost> Memory for Arenas<'_, M> {
    fn ready(&self, arena: usize, wait: bool) -> Result<bool, SinkError> {
        Ok(self.get(arena, wait)?.is_some())
    }

    fn prefer(&self, arena: usize) -> Result<bool, SinkError> {
        Arenas::prefer(self, arena)
    }

    fn populate(&self, arena: usize, range: Range<usize>) -> Result<bool, SinkError> {
        if let Some(buffer) = self.get(arena, false)?.as_deref().and_then(M::on_host) {
            buffer.prepare(range.start, range.len());
            buffer.populate(range.start, range.len());
        }
        Ok(true)
    }

    unsafe fn write(
        &self,
        arena: usize,
        range: Range<usize>,
        fill: impl FnOnce(&mut [u8]) -> Result<(), SinkError>,
    ) -> Result<bool, SinkError> {
        let memory = self.get(arena, true)?;
        let Some(buffer) = memory.as_deref().and_then(M::on_host) else { return Ok(false) };
        // SAFETY: passed on from the caller.
        let Some(out) = (unsafe { buffer.slice_mut(range) }) else { return Ok(false) };
        fill(out).map(|()| true)
    }

    unsafe fn fill(&self, arena: usize, amount: u64) -> Result<(), SinkError> {
        // SAFETY: passed on from the caller.
        unsafe { Arenas::fill(self, arena, amount) }
    }
}

/// Memory of a caller's, one range of it for each arena.
pub(crate) struct Borrowed<'d> {
    /// Exclusively this value's for `'d`.
    ranges: Vec<(NonNull<u8>, usize, Option<Untouched>)>,
    memory: PhantomData<&'d mut [MaybeUninit<u8>]>,
    on_filled: OnFilled<'d>,
}

/// Called when source bytes of a piece are used up, with its number and how many; from reader
/// threads.
pub type OnFilled<'a> = &'a (dyn Fn(usize, u64) -> Result<(), SinkError> + Send + Sync);

// SAFETY: it is a set of `&mut [MaybeUninit<u8>]`, which may go to another thread.
unsafe impl Send for Borrowed<'_> {}
// SAFETY: shared references reach the memory through `write` only, whose callers see to it that
// nobody else touches the same bytes.
unsafe impl Sync for Borrowed<'_> {}

impl<'d> Borrowed<'d> {
    pub(crate) fn new(
        ranges: impl IntoIterator<Item = &'d mut [MaybeUninit<u8>]>,
        on_filled: OnFilled<'d>,
    ) -> Self {
        let range = |range: &'d mut [MaybeUninit<u8>]| {
            let untouched = Untouched::new(range);
            let len = range.len();
            (NonNull::from(range).cast(), len, untouched)
        };
        Self { ranges: ranges.into_iter().map(range).collect(), memory: PhantomData, on_filled }
    }
}

impl Memory for Borrowed<'_> {
    fn ready(&self, _arena: usize, _wait: bool) -> Result<bool, SinkError> {
        Ok(true)
    }

    /// Chooses the pages that come; backing them is left to the writer.
    fn populate(&self, arena: usize, range: Range<usize>) -> Result<bool, SinkError> {
        if let Some((start, len, Some(untouched))) = self.ranges.get(arena)
            && range.start < range.end
            && range.end <= *len
        {
            // SAFETY: the range lies in the memory, which is borrowed for `'d`.
            unsafe { untouched.prepare(start.add(range.start), range.len()) };
        }
        Ok(false)
    }

    unsafe fn write(
        &self,
        arena: usize,
        range: Range<usize>,
        fill: impl FnOnce(&mut [u8]) -> Result<(), SinkError>,
    ) -> Result<bool, SinkError> {
        let Some((start, len, _)) = self.ranges.get(arena) else { return Ok(false) };
        if range.start > range.end || range.end > *len {
            return Ok(false);
        }
        // SAFETY: the range lies in one that is borrowed for `'d`; the caller vouches that
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
        let Some((start, len, _)) = self.ranges.get(arena) else { return Ok(false) };
        if at.checked_add(bytes.len()).is_none_or(|end| end > *len) {
            return Ok(false);
        }
        // SAFETY: the range lies in one that is borrowed for `'d`; the caller vouches that
        // nobody else touches it, so that `bytes` is other memory.
        unsafe { start.add(at).copy_from_nonoverlapping(NonNull::from(bytes).cast(), bytes.len()) };
        Ok(true)
    }

    unsafe fn fill(&self, arena: usize, amount: u64) -> Result<(), SinkError> {
        (self.on_filled)(arena, amount)
    }
}
