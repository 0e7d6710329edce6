//! Signs of life: what a deadline counts is silence.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// When each rank of a group last did something, as far as this rank knows.
///
/// A rank is silent while it neither moves bytes nor says that it is [alive](super::Control::alive).
/// One that waits in an operation of the group is silent only while all are: it waits for one that is
/// not, be it through others. So a rank that hangs is noticed by those that wait for it a deadline
/// after its last sign, and one that waits for a slow disk elsewhere is not taken for it.
#[derive(Debug)]
pub struct Signs {
    epoch: Instant,
    ranks: Vec<Sign>,
}

#[derive(Debug, Default)]
struct Sign {
    /// Of the last sign, in nanoseconds from `epoch`.
    at: AtomicU64,
    /// Operations in which the rank waits.
    waits: AtomicU32,
}

impl Signs {
    /// No signs yet, of any of `world` ranks.
    #[must_use]
    pub fn new(world: u32) -> Self {
        Self { epoch: Instant::now(), ranks: (0..world).map(|_| Sign::default()).collect() }
    }

    fn nanos(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.epoch).as_nanos() as u64
    }

    /// A sign of `rank`.
    pub fn alive(&self, rank: u32) {
        if let Some(sign) = self.ranks.get(rank as usize) {
            sign.at.fetch_max(self.nanos(Instant::now()), Relaxed);
        }
    }

    /// A sign of `rank`, which waits in operations of the group until what this returns is dropped.
    #[must_use]
    pub fn wait(&self, rank: u32) -> Waiting<'_> {
        self.alive(rank);
        if let Some(sign) = self.ranks.get(rank as usize) {
            sign.waits.fetch_add(1, Relaxed);
        }
        Waiting { signs: self, rank }
    }

    /// A sign of a rank elsewhere, and whether it waits.
    pub(super) fn heard(&self, rank: u32, waits: bool) {
        self.alive(rank);
        if let Some(sign) = self.ranks.get(rank as usize) {
            sign.waits.store(waits.into(), Relaxed);
        }
    }

    /// What others are told of `rank`, when it differs from what they were told before.
    pub(super) fn of(&self, rank: u32) -> (u64, bool) {
        let sign = self.ranks.get(rank as usize);
        sign.map_or((0, false), |sign| (sign.at.load(Relaxed), sign.waits.load(Relaxed) > 0))
    }

    /// How long the most silent of `peers`, for which this rank has waited from `since` on, may stay so.
    /// With no peers it is the wait itself that is bounded.
    ///
    /// # Errors
    /// One has been silent for all of the deadline: which.
    pub fn patience(
        &self,
        peers: &[u32],
        since: Instant,
        deadline: Duration,
    ) -> Result<Duration, Option<u32>> {
        let (now, since) = (self.nanos(Instant::now()), self.nanos(since));
        let deadline = u64::try_from(deadline.as_nanos()).unwrap_or(u64::MAX);
        self.left(peers, now, since, deadline).map(Duration::from_nanos)
    }

    fn left(&self, peers: &[u32], now: u64, since: u64, most: u64) -> Result<u64, Option<u32>> {
        let newest = self.ranks.iter().map(|sign| sign.at.load(Relaxed)).max().unwrap_or(0);
        let last = |peer: u32| match self.of(peer) {
            (_, true) => newest,
            (own, false) => own,
        };
        let silent = peers.iter().map(|&peer| (now.saturating_sub(last(peer).max(since)), peer));
        // Of equals the first.
        let longest = silent.rev().max_by_key(|&(silence, _)| silence);
        let silence = longest.map_or(now.saturating_sub(since), |(silence, _)| silence);
        match most.saturating_sub(silence) {
            0 => Err(longest.map(|(_, peer)| peer)),
            left => Ok(left),
        }
    }
}

/// A rank that waits in an operation of its group.
#[derive(Debug)]
pub struct Waiting<'a> {
    signs: &'a Signs,
    rank: u32,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.signs.alive(self.rank);
        if let Some(sign) = self.signs.ranks.get(self.rank as usize) {
            sign.waits.fetch_sub(1, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_of_who_is_waited_for_or_of_all() {
        let signs = Signs::new(3);
        let left = |now, peers: &[u32]| signs.left(peers, now, 10, 100);
        assert_eq!(left(50, &[1, 2]), Ok(60));
        assert_eq!(left(110, &[1, 2]), Err(Some(1)));
        assert_eq!((left(109, &[]), left(110, &[])), (Ok(1), Err(None)));
        signs.ranks[1].at.store(90, Relaxed);
        assert_eq!(left(110, &[1]), Ok(80));
        assert_eq!(left(110, &[1, 2]), Err(Some(2)));
        // Rank 2 waits, be it for rank 1.
        let waiting = signs.wait(2);
        signs.ranks[2].at.store(5, Relaxed);
        assert_eq!(left(110, &[1, 2]), Ok(80));
        assert_eq!(left(190, &[2]), Err(Some(2)));
        drop(waiting);
        signs.ranks[2].at.store(5, Relaxed);
        assert_eq!(left(110, &[1, 2]), Err(Some(2)));
    }
}
