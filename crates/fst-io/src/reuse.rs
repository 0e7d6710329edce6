//! Memory that buffers leave to each other: its pages are there already, and need not be zeroed again.

use std::cmp::Reverse;
use std::ops::Range;
use std::sync::Arc;

use crate::sys::{self, Anonymous};

/// The mappings of buffers that share memory: those in use, and those left behind.
#[derive(Debug, Default)]
pub(crate) struct Reuse(Vec<Region>);

#[derive(Debug)]
pub(crate) struct Region {
    map: Arc<Anonymous>,
    /// Bytes from the start that a buffer has; 0 if none has it.
    lent: usize,
    /// Bytes from the start that may have memory behind them.
    touched: usize,
    /// Whole pages of what is lent whose bytes nobody reads or writes any more.
    retired: Vec<Range<usize>>,
    /// Bytes of what was lent that went back to the system meanwhile.
    gone: usize,
}

impl Region {
    pub(crate) fn map(&self) -> &Arc<Anonymous> {
        &self.map
    }

    /// Bytes of memory that nobody uses, at most.
    fn idle(&self) -> u64 {
        let retired: usize = self.retired.iter().map(Range::len).sum();
        let gone = if self.lent == 0 { self.gone } else { 0 };
        (self.touched - self.lent + retired).saturating_sub(gone) as u64
    }

    /// Gives up to about `most` bytes that nobody uses back to the system, as far as it takes them.
    fn discard(&mut self, most: u64) {
        let page = sys::page_size();
        let most = usize::try_from(most).unwrap_or(usize::MAX);
        let end = self.touched;
        let behind = (end - self.lent).min(most.checked_next_multiple_of(page).unwrap_or(end));
        self.touched -= behind;
        let mut ranges = Vec::new();
        let mut left = most.saturating_sub(behind);
        while left > 0
            && let Some(range) = self.retired.pop()
        {
            left = left.saturating_sub(range.len());
            self.gone += range.len();
            ranges.push(range);
        }
        ranges.push(end - behind..end);
        for range in ranges.into_iter().filter(|range| !range.is_empty()) {
            // SAFETY: the buffer ends before the bytes behind what is lent, and vouched for it when it
            // retired the others.
            let _ = unsafe { self.map.discard(range.start, range.len()) };
        }
    }
}

impl Reuse {
    pub(crate) const fn new() -> Self {
        Self(Vec::new())
    }

    /// Bytes of memory that nobody uses, at most.
    pub(crate) fn idle(&self) -> u64 {
        self.0.iter().map(Region::idle).sum()
    }

    /// A mapping that no buffer has, of `len` bytes (whole pages) or more, and how many from its start have
    /// memory behind them. Its bytes are what the last one left there.
    pub(crate) fn take(&mut self, len: usize) -> Option<(Arc<Anonymous>, usize)> {
        let free = self.0.iter_mut().filter(|region| region.lent == 0 && region.map.len() >= len);
        let region = free.min_by_key(|region| (region.map.len(), Reverse(region.touched)))?;
        let backed = if region.gone == 0 { region.touched.min(len) } else { 0 };
        (region.lent, region.touched, region.gone) = (len, region.touched.max(len), 0);
        Some((region.map.clone(), backed))
    }

    /// As [`take`](Self::take), for others to follow.
    pub(crate) fn take_out(&mut self, len: usize) -> Option<(Region, usize)> {
        let (map, backed) = self.take(len)?;
        let at = self.0.iter().position(|region| Arc::ptr_eq(&region.map, &map))?;
        Some((self.0.swap_remove(at), backed))
    }

    /// Follows a mapping of which a buffer has `len` bytes.
    pub(crate) fn add(&mut self, map: Arc<Anonymous>, len: usize) {
        self.0.push(Region { map, lent: len, touched: len, retired: Vec::new(), gone: 0 });
    }

    /// Follows these mappings, too.
    pub(crate) fn follow(&mut self, regions: impl IntoIterator<Item = Region>) {
        self.0.extend(regions);
    }

    fn find(&mut self, map: &Arc<Anonymous>) -> Option<usize> {
        self.0.iter().position(|region| Arc::ptr_eq(&region.map, map))
    }

    /// Takes whole pages of a buffer's mapping back; `false` if it is not followed.
    ///
    /// # Safety
    ///
    /// Nobody reads or writes these bytes any more.
    pub(crate) unsafe fn retire(&mut self, map: &Arc<Anonymous>, pages: Range<usize>) -> bool {
        let region = self.find(map).map(|at| &mut self.0[at]);
        let followed = region.is_some();
        region.into_iter().for_each(|region| region.retired.push(pages.clone()));
        followed
    }

    /// The buffer of a mapping is gone. One that was not filled may have touched anything of it, and the
    /// mapping is not followed any more.
    pub(crate) fn leave(&mut self, map: &Arc<Anonymous>, filled: bool) {
        if let Some(at) = self.find(map) {
            if filled {
                (self.0[at].lent, self.0[at].retired) = (0, Vec::new());
            } else {
                self.0.swap_remove(at);
            }
        }
    }

    /// Gives memory that nobody uses back to the system until at most `most` bytes of it are left.
    pub(crate) fn trim(&mut self, most: u64) {
        let mut over = self.idle().saturating_sub(most);
        if over == 0 {
            return;
        }
        // Long mappings serve more buffers than short ones do.
        self.0.sort_by_key(|region| region.map.len());
        self.0.retain(|region| {
            let goes = region.lent == 0 && region.idle() <= over;
            over -= if goes { region.idle() } else { 0 };
            !goes
        });
        // Nobody has the first, whose memory is of use as a whole.
        self.0.sort_by_key(|region| (region.lent > 0, region.map.len()));
        for region in &mut self.0 {
            if over > 0 {
                let before = region.idle();
                region.discard(over);
                over = over.saturating_sub(before - region.idle().min(before));
            }
        }
    }

    /// Follows no mapping any more: those it did.
    pub(crate) fn end(&mut self) -> Vec<Region> {
        std::mem::take(&mut self.0)
    }
}
