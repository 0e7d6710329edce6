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

    /// Takes `bytes`; waits for them if `wait` is true. `None` when there are too few now (not
    /// waiting), when the budget was [closed](Self::close), or when it is smaller than `bytes`.
    pub fn take(&self, bytes: u64, wait: bool) -> Option<Lease> {
        if bytes > self.0.limit {
            return None;
        }
        let mut state = self.state();
        while !state.closed && state.used > self.0.limit - bytes {
            if !wait {
                return None;
            }
            state.waiting += 1;
            state = self.0.freed.wait(state).unwrap_or_else(|e| e.into_inner());
            state.waiting -= 1;
        }
        if state.closed {
            return None;
        }
        state.used += bytes;
        state.peak = state.peak.max(state.used);
        Some(Lease { budget: self.clone(), bytes })
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
        let six = budget.take(6, false).unwrap();
        assert!(budget.take(5, false).is_none());
        assert!(budget.take(11, true).is_none(), "more than there will ever be");
        let four = budget.take(4, false).unwrap();
        drop(six);
        assert_eq!((budget.used(), budget.peak()), (4, 10));
        drop(four);
    }

    #[test]
    fn waiters_are_woken_by_returns_and_by_the_end() {
        let budget = Budget::new(10);
        let all = budget.take(10, false).unwrap();
        thread::scope(|scope| {
            let waiter = scope.spawn(|| budget.take(3, true).is_some());
            while budget.waiting() == 0 {
                thread::sleep(Duration::from_millis(1));
            }
            drop(all);
            assert!(waiter.join().unwrap());
        });
        let _all = budget.take(10, false).unwrap();
        thread::scope(|scope| {
            let waiter = scope.spawn(|| budget.take(3, true).is_none());
            while budget.waiting() == 0 {
                thread::sleep(Duration::from_millis(1));
            }
            budget.close();
            assert!(waiter.join().unwrap());
        });
    }
}
