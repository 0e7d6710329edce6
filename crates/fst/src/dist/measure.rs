//! Rates for the planner, measured on this machine: of one reader on a checkpoint's files, and of copies
//! between ranks of one process.

use std::sync::Arc;
use std::time::{Duration, Instant};

use fst_dist::group::{Control, Op};
use fst_dist::{Dst, Group, GroupError, LocalGroup, Src, Storage, Topology};
use fst_format::Checkpoint;
use fst_io::Engine;

use super::DistError;
use crate::error::Result;
use crate::loader::Loader;

/// Ranks that copy at the same time: fewer would not meet at the memory, more would only take longer.
const RANKS: std::ops::RangeInclusive<u32> = 2..=8;
/// Bytes of one message: more than caches hold, for all ranks together.
const MESSAGE: usize = 16 << 20;
/// Messages that are timed, after one that is not.
const MESSAGES: u32 = 8;

/// Rates that were measured, and how.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct MeasuredRates {
    /// Bytes per second that one reader got, with all else idle.
    pub storage_bytes_per_s: f64,
    /// Bytes that it read. The rate of a few megabytes says little about the storage.
    pub read_bytes: u64,
    /// Share of the files' bytes that was in the page cache before, from 0 to 1: their rate is that of
    /// the cache. `None` where the system does not tell.
    pub resident: Option<f64>,
    /// The engine that read.
    pub engine: Engine,
    /// Bytes per second that each of several ranks received from another and sent to a third at the
    /// same time, in host memory of one process.
    pub copy_bytes_per_s: f64,
    /// How many ranks these were.
    pub copy_ranks: u32,
}

impl MeasuredRates {
    /// Reads the first tensors of `checkpoint`, about `bytes` of them, into host memory as a rank
    /// would, and has `ranks` ranks of this process (2 to 8) send messages in a ring. Takes as much
    /// memory as it reads.
    ///
    /// ```no_run
    /// use fst::{Checkpoint, Loader, Preset, Topology, dist::MeasuredRates};
    ///
    /// let checkpoint = Checkpoint::open("Llama-2-7b-hf")?;
    /// let rates = MeasuredRates::measure(&checkpoint, 1 << 30, 8)?;
    /// let topology = rates.apply(Topology::one_node(8));
    /// let plan = Loader::new().preset(Preset::llama()).topology(topology).plan(&checkpoint)?;
    /// println!("{:.1} s", plan.predict().seconds());
    /// # Ok::<(), fst::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The files cannot be read.
    pub fn measure(checkpoint: &Checkpoint, bytes: u64, ranks: u32) -> Result<Self> {
        let mut end = 0;
        let part = checkpoint.tensors().iter().take_while(|tensor| {
            let wanted = end < bytes;
            end += tensor.byte_len();
            wanted
        });
        let part: std::collections::HashSet<String> =
            part.map(|tensor| tensor.name().to_owned()).collect();
        let loader = Loader::new().select_with(move |tensor| part.contains(tensor.name()));
        let tensors = loader.load(checkpoint)?;
        let report = tensors.report();
        let seconds = report.stage("read").map_or(report.seconds, |read| read.seconds);
        let total = report.file_bytes.max(1) as f64;
        let copy_ranks = ranks.clamp(*RANKS.start(), *RANKS.end());
        let copied = copies(copy_ranks).map_err(DistError::Group)?;
        Ok(Self {
            storage_bytes_per_s: rate(report.bytes, seconds),
            read_bytes: report.bytes,
            resident: report.resident_bytes.map(|bytes| bytes as f64 / total),
            engine: report.engine.used,
            copy_bytes_per_s: rate(MESSAGE as u64 * u64::from(MESSAGES), copied.as_secs_f64()),
            copy_ranks,
        })
    }

    /// The topology with these rates: what one reader gets is taken for what a storage has for all its
    /// ranks together, and copies of the process for the links within a node. Links between nodes are
    /// not measured and stay as they are.
    #[must_use]
    pub fn apply(&self, topology: Topology) -> Topology {
        let mut links = topology.links();
        links.node_bytes_per_s = self.copy_bytes_per_s;
        let topology = topology.with_links(links);
        match topology.storages().first().copied() {
            // Nothing was there to be read.
            _ if self.read_bytes == 0 => topology,
            None => topology,
            Some(Storage { requests_per_s, .. }) => {
                let storage = Storage::with_rate(self.storage_bytes_per_s);
                topology.with_storage(Storage { requests_per_s, ..storage })
            }
        }
    }
}

/// Bytes per second, a positive number whatever the clock says.
fn rate(bytes: u64, seconds: f64) -> f64 {
    bytes.max(1) as f64 / seconds.max(1e-9)
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
    fn measured_rates_replace_those_of_storage_and_of_links_within_a_node() {
        let mut rates = MeasuredRates {
            storage_bytes_per_s: 3e9,
            read_bytes: 1,
            resident: None,
            engine: Engine::Pread,
            copy_bytes_per_s: 7e9,
            copy_ranks: 2,
        };
        let before = Topology::local_storage(2, 2);
        let after = rates.apply(before.clone());
        for (before, after) in before.storages().iter().zip(after.storages()) {
            assert_eq!((after.bytes_per_s, after.rank_bytes_per_s), (3e9, 3e9));
            assert_eq!(after.requests_per_s, before.requests_per_s);
        }
        assert_eq!(after.links().node_bytes_per_s, 7e9);
        assert_eq!(after.links().net_bytes_per_s, before.links().net_bytes_per_s);
        // Where there was nothing to read, nothing is known of the storage.
        rates.read_bytes = 0;
        assert_eq!(rates.apply(before.clone()).storages(), before.storages());
    }

    #[test]
    fn ranks_that_copy_take_time() {
        for ranks in [2, 3] {
            let took = copies(ranks).unwrap();
            assert!(took > Duration::ZERO && took < Duration::from_secs(60), "{took:?}");
        }
    }
}
