//! Memory that the buffers of one budget leave to each other: its pages are there already, and need not
//! be zeroed again.

use std::ops::Range;
use std::sync::Arc;

use crate::sys::Anonymous;

/// The mappings of a budget's buffers: those in use, and those left behind.
#[derive(Debug, Default)]
pub(crate) struct Reuse(Vec<Region>);

#[derive(Debug)]
struct Region {
    map: Arc<Anonymous>,
    /// Bytes from the start that a buffer has; 0 if none has it.
    lent: usize,
    /// Bytes from the start that may have memory behind them.
    touched: usize,
    /// Whole pages of what is lent whose bytes nobody reads or writes any more.
    retired: Vec<Range<usize>>,
}

impl Region {
    /// Bytes of memory that nobody uses, at most.
    fn idle(&self) -> u64 {
        let retired: usize = self.retired.iter().map(Range::len).sum();
        (self.touched - self.lent + retired) as u64
    }

    /// Gives what nobody uses back to the system, as far as it takes it.
    fn discard(&mut self) {
        self.retired.push(self.lent..self.touched);
        let unused = std::mem::take(&mut self.retired).into_iter();
        for range in unused.filter(|range| !range.is_empty()) {
            // SAFETY: the buffer ends before the bytes behind what is lent, and vouched for it when it
            // retired the others.
            let _ = unsafe { self.map.discard(range.start, range.len()) };
        }
        self.touched = self.lent;
    }
}

impl Reuse {
    /// A mapping that no buffer has, of `len` bytes (whole pages) or more. Its bytes are what the last one
    /// left there.
    pub(crate) fn take(&mut self, len: usize) -> Option<Arc<Anonymous>> {
        let free = self.0.iter_mut().filter(|region| region.lent == 0 && region.map.len() >= len);
        let region = free.min_by_key(|region| region.map.len())?;
        (region.lent, region.touched) = (len, region.touched.max(len));
        Some(region.map.clone())
    }

    /// Follows a mapping of which a buffer has `len` bytes.
    pub(crate) fn add(&mut self, map: Arc<Anonymous>, len: usize) {
        self.0.push(Region { map, lent: len, touched: len, retired: Vec::new() });
    }

    fn find(&mut self, map: &Arc<Anonymous>) -> Option<&mut Region> {
        self.0.iter_mut().find(|region| Arc::ptr_eq(&region.map, map))
    }

    /// Takes whole pages of a buffer's mapping back; `false` if it is not followed.
    ///
    /// # Safety
    ///
    /// Nobody reads or writes these bytes any more.
    pub(crate) unsafe fn retire(&mut self, map: &Arc<Anonymous>, pages: Range<usize>) -> bool {
        let region = self.find(map);
        let followed = region.is_some();
        region.into_iter().for_each(|region| region.retired.push(pages.clone()));
        followed
    }

    /// The buffer of a mapping is gone.
    pub(crate) fn leave(&mut self, map: &Arc<Anonymous>) {
        if let Some(region) = self.find(map) {
            region.lent = 0;
            region.retired.clear();
        }
    }

    /// Gives memory that nobody uses back to the system until at most `most` bytes of it are left.
    pub(crate) fn trim(&mut self, most: u64) {
        let mut idle: u64 = self.0.iter().map(Region::idle).sum();
        // Long mappings serve more buffers than short ones do.
        self.0.sort_by_key(|region| region.map.len());
        self.0.retain(|region| {
            let goes = idle > most && region.lent == 0;
            idle -= if goes { region.idle() } else { 0 };
            !goes
        });
        for region in &mut self.0 {
            if idle > most {
                idle -= region.idle();
                region.discard();
            }
        }
    }

    /// Gives all that nobody uses back to the system, and follows no mapping any more.
    pub(crate) fn end(&mut self) {
        self.trim(0);
        self.0.clear();
    }
}
