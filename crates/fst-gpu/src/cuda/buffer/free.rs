//! Numbers of free blocks, last in first out: the block that came back last is still in the processor's
//! cache when it is filled again. No lock.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// A set of numbers below a bound, each in it at most once.
pub(super) struct FreeList {
    /// In the lower half the number on top, plus one, or 0; in the upper half how often this has changed, so
    /// that nobody takes an old state for the present one.
    top: AtomicU64,
    /// For each number in the set what lies below it, as in `top`.
    below: Box<[AtomicU32]>,
}

impl FreeList {
    pub(super) fn new(bound: usize) -> Self {
        Self { top: AtomicU64::new(0), below: (0..bound).map(|_| AtomicU32::new(0)).collect() }
    }

    /// Adds a number, which is not in the set; those that are not below the bound are forgotten.
    pub(super) fn push(&self, number: u32) {
        let Some(below) = self.below.get(number as usize) else { return };
        self.change(|top| {
            below.store(top, Ordering::Relaxed);
            Some(number + 1)
        });
    }

    /// Takes out the number that was added last.
    pub(super) fn pop(&self) -> Option<u32> {
        let below =
            |top: u32| Some(self.below.get(top.checked_sub(1)? as usize)?.load(Ordering::Relaxed));
        self.change(below)?.checked_sub(1)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.top.load(Ordering::SeqCst) as u32 == 0
    }

    /// Replaces what is on top by what `next` says for it; returns what was, unless `next` says nothing.
    fn change(&self, next: impl Fn(u32) -> Option<u32>) -> Option<u32> {
        // Whoever pops sees what was written before the push, the block's bytes included.
        let changed =
            |state: u64| Some((state >> 32).wrapping_add(1) << 32 | u64::from(next(state as u32)?));
        let before = self.top.fetch_update(Ordering::AcqRel, Ordering::Acquire, changed);
        before.ok().map(|state| state as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::FreeList;

    #[test]
    fn the_last_comes_out_first() {
        let list = FreeList::new(3);
        assert!(list.is_empty() && list.pop().is_none());
        (0..4).for_each(|number| list.push(number));
        assert_eq!([list.pop(), list.pop()], [Some(2), Some(1)]);
        list.push(2);
        assert!(!list.is_empty());
        assert_eq!([list.pop(), list.pop(), list.pop()], [Some(2), Some(0), None]);
    }

    #[test]
    fn threads_never_hold_a_number_twice() {
        let list = FreeList::new(8);
        let held: Vec<_> = (0..8).map(|_| std::sync::atomic::AtomicBool::new(false)).collect();
        (0..8).for_each(|number| list.push(number));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..20_000 {
                        let two = [list.pop(), list.pop()];
                        for number in two.into_iter().flatten() {
                            let slot = &held[number as usize];
                            assert!(!slot.swap(true, std::sync::atomic::Ordering::Relaxed));
                        }
                        for number in two.into_iter().flatten() {
                            held[number as usize]
                                .store(false, std::sync::atomic::Ordering::Relaxed);
                            list.push(number);
                        }
                    }
                });
            }
        });
        let mut all: Vec<_> = std::iter::from_fn(|| list.pop()).collect();
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2, 3, 4, 5, 6, 7]);
    }
}
