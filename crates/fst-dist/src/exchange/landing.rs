//! Which outputs have all of their bytes.

use std::sync::atomic::{
    AtomicU64,
    Ordering::{AcqRel, Acquire},
};

use super::Region;
use crate::backend::CopyAt;
use crate::rank::RankPlan;

/// Counts the bytes that arrive in outputs. Each byte of an output is written once, but for its padding.
pub(super) struct Landing<'a> {
    /// Start, end and number of each output that has bytes, by address.
    places: Vec<(u64, u64, usize)>,
    /// For each output, its bytes to come.
    left: Vec<AtomicU64>,
    on_landed: &'a (dyn Fn(usize) + Sync),
}

impl<'a> Landing<'a> {
    /// Outputs without bytes to come have landed.
    pub(super) fn new(
        view: &RankPlan<'_>,
        outputs: &[Region],
        on_landed: &'a (dyn Fn(usize) + Sync),
    ) -> Self {
        let mut places: Vec<_> = (0..)
            .zip(outputs)
            .filter(|(_, region)| region.len > 0)
            .map(|(index, region)| (region.addr, region.addr + region.len, index))
            .collect();
        places.sort_unstable();
        let to_come = |output: &crate::rank::Output<'_>| output.bytes - output.padding;
        let left = view.outputs().iter().map(|output| AtomicU64::new(to_come(output))).collect();
        let empty = view.outputs().iter().map(to_come).enumerate().filter(|(_, bytes)| *bytes == 0);
        empty.for_each(|(index, _)| on_landed(index));
        Self { places, left, on_landed }
    }

    /// So many bytes have arrived at an address, of one output or of several that adjoin. What is not an
    /// output's is left out.
    pub(super) fn add(&self, mut addr: u64, len: u64) {
        let end = addr + len;
        let mut at = self.places.partition_point(|(_, end, _)| *end <= addr);
        while let Some(&(start, stop, index)) = self.places.get(at)
            && start < end
        {
            addr = addr.max(start);
            let bytes = stop.min(end) - addr;
            // Release by each writer, acquire by the last.
            if self.left[index].fetch_sub(bytes, AcqRel) == bytes {
                (self.on_landed)(index);
            }
            (addr, at) = (stop, at + 1);
        }
    }

    /// Copies have been made.
    pub(super) fn copied(&self, copies: &[CopyAt]) {
        for copy in copies {
            if copy.count > 1 && copy.dst_stride == copy.len {
                self.add(copy.dst, copy.len * copy.count);
            } else {
                (0..copy.count).for_each(|n| self.add(copy.dst + n * copy.dst_stride, copy.len));
            }
        }
    }

    /// Whether all outputs have landed.
    pub(super) fn is_over(&self) -> bool {
        self.left.iter().all(|left| left.load(Acquire) == 0)
    }
}
