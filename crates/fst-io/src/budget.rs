//! A hard limit on memory: who wants some waits until others have given theirs back.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use crate::kept;
use crate::reuse::Reuse;
use crate::sys::Anonymous;

/// Bytes that may be in use at once. Cloning gives another handle on the same budget.
///
/// Host memory that its [buffers](crate::HostBuffer) no longer use stays for the next ones until the budget is
/// [closed](Self::close) or others need the room: both together never exceed the limit.
#[derive(Debug, Clone)]
pub struct Budget(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    limit: u64,
    /// Bytes that the process keeps at most when the budget has no use for them any more.
    keep: u64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    used: u64,
    /// The most that may be in use for something to be read that nobody asked for.
    ahead: u64,
    peak: u64,
    waiting: usize,
    generation: u64,
    closed: bool,
    /// What is in use and what lies idle here is never more than the limit.
    reuse: Reuse,
}

/// A part of a [`Budget`]; dropping it gives the bytes back.
#[derive(Debug)]
pub struct Lease {
    budget: Budget,
    bytes: AtomicU64,
}

impl Lease {
    /// Memory for a buffer of `len` bytes (whole pages) that this lease counts: what another buffer of the
    /// budget left, or the process keeps, if there is such, and how many from its start are backed. `None`: it
    /// takes a new mapping, and [adds](Self::add) it.
    pub(crate) fn reused(&self, len: usize) -> Option<(Arc<Anonymous>, usize)> {
        let mut state = self.budget.state();
        let mut found = state.reuse.take(len);
        if found.is_none()
            && self.keeps()
            && let Some((region, backed)) = kept::take_out(len)
        {
            found = Some((region.map().clone(), backed));
            state.reuse.follow([region]);
        }
        // This lease is counted already, and its memory may not exceed what is left.
        let most = self.budget.limit().saturating_sub(state.used);
        state.reuse.trim(most);
        found
    }

    /// Whether the process keeps the memory in the end.
    pub(crate) fn keeps(&self) -> bool {
        self.budget.0.keep > 0
    }

    /// Keeps the memory of a buffer of `len` bytes for others when it is gone.
    pub(crate) fn add(&self, map: &Arc<Anonymous>, len: usize) {
        let mut state = self.budget.state();
        if !state.closed {
            state.reuse.add(map.clone(), len);
        } else if self.keeps() {
            kept::add(map, len);
        }
    }

    /// Gives the bytes of whole pages back.
    ///
    /// # Safety
    ///
    /// Nobody reads or writes them any more.
    pub(crate) unsafe fn retire(&self, map: &Arc<Anonymous>, pages: Range<usize>) {
        self.budget.change(|state| {
            // SAFETY: passed on from the caller.
            let back = unsafe {
                Anonymous::DISCARDS
                    && (state.reuse.retire(map, pages.clone())
                        || self.keeps() && kept::retire(map, pages.clone(), self.budget.0.keep))
                    || map.discard(pages.start, pages.len()).is_ok()
            };
            let bytes = pages.len() as u64;
            let less = |left: u64| Some(left.saturating_sub(bytes));
            if back {
                let left = self.bytes.fetch_update(Relaxed, Relaxed, less);
                state.used -= left.unwrap_or_else(|left| left).min(bytes);
            }
            back
        });
    }

    /// The buffer that has this memory is gone.
    pub(crate) fn leave(&self, map: &Arc<Anonymous>, filled: bool) {
        self.budget.state().reuse.leave(map, filled || !self.keeps());
        if self.keeps() {
            kept::leave(map, filled, self.budget.0.keep);
        }
    }
}

impl Budget {
    /// A budget of `limit` bytes, all free.
    pub fn new(limit: u64) -> Self {
        Self::keeping(limit, 0)
    }

    /// As [`new`](Self::new); once the budget is closed, the process [keeps](crate::kept_bytes) the memory that
    /// its buffers leave, at most `keep` bytes, and what it kept before is used first.
    pub fn keeping(limit: u64, keep: u64) -> Self {
        let state = Mutex::new(State { ahead: limit, ..State::default() });
        Self(Arc::new(Inner { limit, keep, state, changed: Condvar::new() }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The limit in bytes.
    pub fn limit(&self) -> u64 {
        self.0.limit
    }

    /// Bytes in use now.
    pub fn used(&self) -> u64 {
        self.state().used
    }

    /// The most bytes that were in use at once.
    pub fn peak(&self) -> u64 {
        self.state().peak
    }

    /// How many are waiting for bytes.
    pub fn waiting(&self) -> usize {
        self.state().waiting
    }

    /// Takes `bytes`. `None` when there are too few now, or when the budget was
    /// [closed](Self::close).
    pub fn take(&self, bytes: u64) -> Option<Lease> {
        self.take_within(bytes, |_| self.0.limit)
    }

    /// As [`take`](Self::take), for what is read [ahead](Self::set_ahead) of anybody's asking.
    pub fn take_ahead(&self, bytes: u64) -> Option<Lease> {
        self.take_within(bytes, |state| state.ahead)
    }

    /// Leaves what of the budget is beyond `bytes` to those who ask for something. All of it is for everybody
    /// unless this says otherwise.
    pub fn set_ahead(&self, bytes: u64) {
        self.change(|state| std::mem::replace(&mut state.ahead, bytes) != bytes);
    }

    fn take_within(&self, bytes: u64, most: impl FnOnce(&State) -> u64) -> Option<Lease> {
        let mut taken = false;
        self.change(|state| {
            let most = most(state).checked_sub(bytes);
            taken = !state.closed && most.is_some_and(|most| state.used <= most);
            if taken {
                state.used += bytes;
                state.peak = state.peak.max(state.used);
            }
            taken
        });
        taken.then(|| Lease { budget: self.clone(), bytes: bytes.into() })
    }

    /// A number that changes whenever something is taken, comes back, or the budget is closed.
    pub fn generation(&self) -> u64 {
        self.state().generation
    }

    /// Waits until the [generation](Self::generation) is no longer `seen`; false when the budget
    /// is closed. Whoever finds too little looks at the generation first, then asks, then waits.
    pub fn wait_past(&self, seen: u64) -> bool {
        let mut state = self.state();
        state.waiting += 1;
        while !state.closed && state.generation == seen {
            state = self.0.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
        state.waiting -= 1;
        !state.closed
    }

    /// As [`wait_past`](Self::wait_past), but not longer than `timeout`.
    pub fn wait_past_for(&self, seen: u64, timeout: Duration) -> bool {
        let mut state = self.state();
        if !state.closed && state.generation == seen {
            state.waiting += 1;
            let waited = self.0.changed.wait_timeout(state, timeout);
            state = waited.unwrap_or_else(|e| e.into_inner()).0;
            state.waiting -= 1;
        }
        !state.closed
    }

    /// Changes the state, and tells those who wait if `change` says that it did.
    fn change(&self, change: impl FnOnce(&mut State) -> bool) {
        let mut state = self.state();
        if change(&mut state) {
            state.generation += 1;
            drop(state);
            self.0.changed.notify_all();
        }
    }

    /// Wakes those who wait, as if something had changed.
    pub fn wake(&self) {
        self.change(|_| true);
    }

    /// Whether it was [closed](Self::close).
    pub fn is_closed(&self) -> bool {
        self.state().closed
    }

    /// Refuses all further requests, those that wait included, and keeps no memory for them.
    pub fn close(&self) {
        let keep = self.0.keep;
        self.change(|state| {
            state.closed = true;
            match keep {
                0 => state.reuse.trim(0),
                _ => kept::follow(state.reuse.end(), keep),
            }
            state.reuse.end();
            true
        });
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.budget.change(|state| {
            state.used -= *self.bytes.get_mut();
            true
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn bytes_are_limited_and_come_back() {
        let budget = Budget::new(10);
        let six = budget.take(6).unwrap();
        assert!(budget.take(5).is_none());
        assert!(budget.take(11).is_none(), "more than there will ever be");
        let four = budget.take(4).unwrap();
        drop(six);
        assert!(budget.take(7).is_none());
        assert_eq!((budget.used(), budget.peak()), (4, 10));
        drop(four);
    }

    #[test]
    fn waiters_are_woken_by_returns_and_by_the_end() {
        let wait_while = |budget: &Budget, act: &dyn Fn()| {
            thread::scope(|scope| {
                let seen = budget.generation();
                let waiter = scope.spawn(move || budget.wait_past(seen));
                while budget.waiting() == 0 {
                    thread::sleep(Duration::from_millis(1));
                }
                act();
                waiter.join().unwrap()
            })
        };
        let budget = Budget::new(10);
        let all = std::cell::RefCell::new(budget.take(10));
        assert!(wait_while(&budget, &|| drop(all.take())));
        assert!(wait_while(&budget, &|| drop(all.replace(budget.take(10)))), "takers, too");
        assert!(!wait_while(&budget, &|| budget.close()));
        assert!(budget.take(0).is_none(), "closed for good");
    }
}
