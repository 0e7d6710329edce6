//! How long to wait and how often to try, and what came of it.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::ranges::Ranges;

/// The bounds of patience.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Settings {
    /// How long nothing may arrive before a request is made again; by default 10 s.
    pub read_timeout: Duration,
    /// Bytes that must arrive within each [`rate_window`](Self::rate_window), or a request is made again; by
    /// default 128 KiB.
    pub least_bytes: u64,
    /// See [`least_bytes`](Self::least_bytes); by default 10 s.
    pub rate_window: Duration,
    /// Requests in succession that may fail without a mebibyte of progress between them; by default 8.
    pub attempts: u32,
    /// How long a range may make no such progress, failures and waits included; by default 2 minutes.
    pub patience: Duration,
    /// The wait after a first failure, about; it doubles with each, up to 10 s. By default 100 ms. A server's
    /// `Retry-After` counts if it is longer.
    pub backoff: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            read_timeout: Duration::from_secs(10),
            least_bytes: 128 << 10,
            rate_window: Duration::from_secs(10),
            attempts: 8,
            patience: Duration::from_secs(120),
            backoff: Duration::from_millis(100),
        }
    }
}

/// What requests for an object came to, over all its clones.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Counters {
    /// Requests that were made.
    pub requests: u64,
    /// Those of them that were made again after a failure.
    pub retries: u64,
    /// Answers that asked for patience (429 and 503).
    pub throttled: u64,
    /// Bytes of the object that came.
    pub received: u64,
    /// Those of them that had come before.
    pub again: u64,
    /// For each request that was answered, the time until its first byte came.
    pub first_byte: Vec<Duration>,
}

/// Counters that are counted up by several threads.
#[derive(Debug, Default)]
pub(crate) struct Counted {
    pub(crate) requests: AtomicU64,
    pub(crate) retries: AtomicU64,
    pub(crate) throttled: AtomicU64,
    received: Mutex<(u64, u64, Ranges)>,
    first_byte: Mutex<Vec<Duration>>,
}

impl Counted {
    pub(crate) fn answered(&self, after: Duration) {
        self.first_byte.lock().unwrap_or_else(PoisonError::into_inner).push(after);
    }

    pub(crate) fn received(&self, range: Range<u64>) {
        let mut received = self.received.lock().unwrap_or_else(PoisonError::into_inner);
        received.0 += range.end - range.start;
        received.1 += received.2.add(range);
    }

    pub(crate) fn now(&self) -> Counters {
        let received = self.received.lock().unwrap_or_else(PoisonError::into_inner);
        Counters {
            received: received.0,
            again: received.1,
            requests: self.requests.load(Relaxed),
            retries: self.retries.load(Relaxed),
            throttled: self.throttled.load(Relaxed),
            first_byte: self.first_byte.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }
}
