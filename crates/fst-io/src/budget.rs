//! A hard limit on memory: who wants some waits until others have given theirs back.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// Bytes that may be in use at once. Cloning gives another handle on the same budget.
#[derive(Debug, Clone)]
pub struct Budget(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    limit: u64,
    state: Mutex<State>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    used: u64,
    peak: u64,
    waiting: usize,
    closed: bool,
}

/// A part of a [`Budget`]; dropping it gives the bytes back.
#[derive(Debug)]
pub struct Lease {
    budget: Budget,
    bytes: u64,
}

impl Budget {
    /// A budget of `limit` bytes, all free.
    pub fn new(limit: u64) -> Self {
        let state = Mutex::default();
        Self(Arc::new(Inner { limit, state, freed: Condvar::new() }))
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
        let mut state = self.state();
        if state.closed || !self.has_room(&state, bytes) {
            return None;
        }
        state.used += bytes;
        state.peak = state.peak.max(state.used);
        Some(Lease { budget: self.clone(), bytes })
    }

    /// Waits until `bytes` can be [taken](Self::take), by whoever is first; false when they never
    /// can, since the budget is smaller or was closed.
    pub fn wait_for(&self, bytes: u64) -> bool {
        let mut state = self.state();
        state.waiting += 1;
        while !state.closed && bytes <= self.0.limit && !self.has_room(&state, bytes) {
            state = self.0.freed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
        state.waiting -= 1;
        !state.closed && bytes <= self.0.limit
    }

    fn has_room(&self, state: &State, bytes: u64) -> bool {
        self.0.limit.checked_sub(bytes).is_some_and(|most| state.used <= most)
    }

    /// Refuses all further requests, those that wait included.
    pub fn close(&self) {
        self.state().closed = true;
        self.0.freed.notify_all();
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.budget.state().used -= self.bytes;
        self.budget.0.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;
    use std::time::Duration;

    #[test]
    fn bytes_are_limited_and_come_back() {
        let budget = Budget::new(10);
        let six = budget.take(6).unwrap();
        assert!(budget.take(5).is_none());
        assert!(!budget.wait_for(11), "more than there will ever be");
        let four = budget.take(4).unwrap();
        drop(six);
        assert!(budget.wait_for(6));
        assert_eq!((budget.used(), budget.peak()), (4, 10));
        drop(four);
    }

    #[test]
    fn waiters_are_woken_by_returns_and_by_the_end() {
        let wait_while = |budget: &Budget, act: &dyn Fn()| {
            thread::scope(|scope| {
                let waiter = scope.spawn(|| budget.wait_for(3));
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
        let _all = budget.take(10).unwrap();
        assert!(!wait_while(&budget, &|| budget.close()));
        assert!(budget.take(0).is_none(), "closed for good");
    }
}
