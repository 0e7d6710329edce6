//! The rate of copies between ranks of one process, measured, for the planner.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::GroupError;
use crate::group::{Control, Group, LocalGroup, Op};
use crate::memory::{Dst, Src};

/// Ranks that copy at the same time: fewer would not meet at the memory, more would only take longer.
const RANKS: std::ops::RangeInclusive<u32> = 2..=8;
/// Bytes of one message: more than caches hold, for all ranks together.
const MESSAGE: usize = 16 << 20;
/// Messages that are timed, after one that is not.
const MESSAGES: u32 = 8;

/// A rate of copies that was measured.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct CopyRate {
    /// Bytes per second that each of several ranks received from another and sent to a third at the same
    /// time.
    pub bytes_per_s: f64,
    /// How many ranks these were.
    pub ranks: u32,
}

impl CopyRate {
    /// Has `ranks` ranks of this process (2 to 8) send messages of host memory in a ring.
    ///
    /// # Errors
    /// There are no threads for them.
    pub fn measure(ranks: u32) -> Result<Self, GroupError> {
        let ranks = ranks.clamp(*RANKS.start(), *RANKS.end());
        let bytes = (MESSAGE as u64 * u64::from(MESSAGES)) as f64;
        Ok(Self { bytes_per_s: bytes / copies(ranks)?.as_secs_f64().max(1e-9), ranks })
    }
}

/// How long the slowest of `ranks` ranks takes for its messages, when all send to the next.
fn copies(ranks: u32) -> Result<Duration, GroupError> {
    let rank = |group: &dyn Group| {
        let (rank, world) = (group.rank(), group.world_size());
        let (data, mut into) = (vec![rank as u8; MESSAGE], vec![0; MESSAGE]);
        let mut pass = || {
            let send = Op::Send { to: (rank + 1) % world, data: Src::from(&data[..]) };
            let into = Dst::from(&mut into[..]);
            group.exchange(vec![send, Op::Recv { from: (rank + world - 1) % world, into }])
        };
        // The first touches the memory.
        pass()?;
        group.barrier()?;
        let began = Instant::now();
        (0..MESSAGES).try_for_each(|_| pass())?;
        Ok(began.elapsed())
    };
    std::thread::scope(|scope| {
        let groups = LocalGroup::host(ranks).into_iter().map(Arc::new);
        let mut refused = None;
        let threads = groups.map_while(|group| {
            let thread = std::thread::Builder::new().name(format!("fst-rank-{}", group.rank()));
            let own = group.clone();
            match thread.spawn_scoped(scope, move || rank(&*own)) {
                Ok(thread) => Some(thread),
                Err(error) => {
                    // The others wait for this rank.
                    group.abort(&format!("cannot start its thread: {error}"));
                    refused = group.failure();
                    None
                }
            }
        });
        let threads: Vec<_> = threads.collect();
        let ends = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        let ends = ends.collect::<Result<Vec<_>, _>>();
        refused.map_or(ends, Err).map(|ends| ends.into_iter().max().unwrap_or_default())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_that_copy_take_time() {
        for ranks in [2, 3] {
            let took = copies(ranks).unwrap();
            assert!(took > Duration::ZERO && took < Duration::from_secs(60), "{took:?}");
        }
    }
}
