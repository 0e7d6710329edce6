//! Which bytes of an object there are.

use std::collections::BTreeMap;
use std::ops::Range;

/// Ranges that do not touch each other: ends by starts.
#[derive(Debug, Default)]
pub(crate) struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    /// Adds a range; returns how many of its bytes there were already.
    pub(crate) fn add(&mut self, range: Range<u64>) -> u64 {
        if range.is_empty() {
            return 0;
        }
        let (mut all, mut again) = (range.clone(), 0);
        let touches = |last: &(&u64, &u64)| *last.1 >= range.start;
        while let Some((&start, &end)) = self.0.range(..=range.end).next_back().filter(touches) {
            again += end.min(range.end).saturating_sub(start.max(range.start));
            all = all.start.min(start)..all.end.max(end);
            self.0.remove(&start);
        }
        self.0.insert(all.start, all.end);
        again
    }

    /// Whether all of `len` bytes are there.
    pub(crate) fn are_whole(&self, len: u64) -> bool {
        self.0.get(&0).is_some_and(|end| *end >= len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_counted_as_one_by_one() {
        let (mut ranges, mut slow) = (Ranges::default(), [false; 64]);
        let mut random = 1u64;
        for _ in 0..2000 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (start, len) = ((random >> 33) % 64, (random >> 50) % 9);
            let range = start..(start + len).min(64);
            let there = &mut slow[range.start as usize..range.end as usize];
            let again = there.iter().filter(|there| **there).count() as u64;
            there.fill(true);
            assert_eq!(ranges.add(range), again);
            assert_eq!(ranges.are_whole(64), slow == [true; 64]);
            if ranges.are_whole(64) {
                (ranges, slow) = (Ranges::default(), [false; 64]);
            }
        }
    }
}
