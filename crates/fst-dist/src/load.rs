//! What a plan costs: bytes that each rank moves, and predicted seconds against simpler ways.

use crate::partition::Choice;
use crate::plan::Plan;
use crate::schedule::Piece;

/// Bytes that one rank moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RankLoad {
    /// Bytes kept in the end, padding left out.
    pub kept: u64,
    /// Bytes read for itself, the coalescing gaps among them (a gap at which a block ends is spared).
    pub read_direct: u64,
    /// Bytes read for all (itself included).
    pub read_once: u64,
    /// Requests of the direct reads.
    pub requests: u64,
    /// Bytes sent to other ranks; a broadcast counts once for each receiver.
    pub sent: u64,
    /// Bytes received from other ranks.
    pub received: u64,
}

impl RankLoad {
    /// Bytes read from storage.
    #[must_use]
    pub fn read(&self) -> u64 {
        self.read_direct + self.read_once
    }
}

/// Predicted seconds of a load, by what could bound it, at the topology's rates.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Prediction {
    /// The storage that takes longest to deliver what is read from it.
    pub storage_s: f64,
    /// The rank that takes longest to read its part.
    pub read_s: f64,
    /// The rank whose link takes longest to send or receive.
    pub link_s: f64,
}

impl Prediction {
    /// The bound: reading and exchange run at the same time.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.storage_s.max(self.read_s).max(self.link_s)
    }

    /// What the bound is: "storage", "reading" or "link".
    #[must_use]
    pub fn bound(&self) -> &'static str {
        let most = self.seconds();
        if most == self.storage_s {
            "storage"
        } else if most == self.read_s {
            "reading"
        } else {
            "link"
        }
    }
}

impl Plan {
    pub(crate) fn count_loads(&self) -> Vec<RankLoad> {
        let world = self.world() as usize;
        // Differences over ranks, summed up at the end.
        let mut steps = vec![RankLoad::default(); world + 1];
        for class in &self.classes {
            let mut start = 0;
            for span in &class.profile {
                for (rank, sign) in [(start, 1u64), (span.end, u64::MAX)] {
                    let load = &mut steps[rank as usize];
                    let add = |sum: &mut u64, value: u64| {
                        *sum = sum.wrapping_add(sign.wrapping_mul(value * class.tensors));
                    };
                    add(&mut load.kept, span.kept);
                    match class.choice {
                        Choice::Direct => {
                            add(&mut load.read_direct, span.read);
                            add(&mut load.requests, span.requests);
                        }
                        Choice::Nothing => {}
                        _ => add(&mut load.received, span.kept),
                    }
                }
                start = span.end;
            }
        }
        let mut loads: Vec<RankLoad> = Vec::with_capacity(world);
        for step in &steps[..world] {
            let last = loads.last().copied().unwrap_or_default();
            loads.push(RankLoad {
                kept: last.kept.wrapping_add(step.kept),
                read_direct: last.read_direct.wrapping_add(step.read_direct),
                requests: last.requests.wrapping_add(step.requests),
                received: last.received.wrapping_add(step.received),
                ..last
            });
        }
        // What a rank reads itself it need not receive, but sends to the others.
        for line in &self.lines {
            for (rank, load) in (0u32..).zip(&mut loads) {
                let segment = line.segment(rank);
                load.read_once += segment.end - segment.start;
                for piece in line.pieces(segment) {
                    let (own, all) = self.kept_of(&piece, rank);
                    load.received -= own;
                    load.sent += all - own;
                }
            }
        }
        loads
    }

    /// Bytes of a piece that `rank` keeps, and that all ranks keep together.
    fn kept_of(&self, piece: &Piece, rank: u32) -> (u64, u64) {
        let class = self.class(piece.tensor);
        let len = piece.range.end - piece.range.start;
        if class.resolved.is_replicated() {
            return (len, len * u64::from(self.world()));
        }
        if len == class.bytes {
            return (class.kept_by(rank), class.kept);
        }
        let kept = |rank: u32| self.geometry(piece.tensor, rank).kept_in(&piece.range);
        (kept(rank), (0..self.world()).map(kept).sum())
    }

    /// Predicted seconds at the topology's rates.
    #[must_use]
    pub fn predict(&self) -> Prediction {
        self.predict_loads(&self.loads)
    }

    /// Predicted seconds if every rank read just its own part, in whole requests, with no exchange.
    #[must_use]
    pub fn predict_each_reads_own(&self) -> Prediction {
        let mut loads = vec![RankLoad::default(); self.world() as usize];
        for class in &self.classes {
            let mut start = 0;
            for span in &class.profile {
                for load in &mut loads[start as usize..span.end as usize] {
                    load.read_direct += span.read * class.tensors;
                    load.requests += span.requests * class.tensors;
                }
                start = span.end;
            }
        }
        self.predict_loads(&loads)
    }

    /// Predicted seconds if every rank read the whole checkpoint.
    #[must_use]
    pub fn predict_everyone_reads_all(&self) -> Prediction {
        let read_direct = self.checkpoint_bytes();
        let load = RankLoad { read_direct, ..RankLoad::default() };
        self.predict_loads(&vec![load; self.world() as usize])
    }

    /// Predicted seconds if each byte were read once, reading spread evenly, and broadcast to all.
    #[must_use]
    pub fn predict_broadcast_everything(&self) -> Prediction {
        let world = u64::from(self.world());
        let all = self.checkpoint_bytes();
        let readers = self.topology.places().iter().filter(|place| place.storage.is_some()).count();
        let part = all / (readers as u64).max(1);
        let load = |place: &crate::topology::Place| {
            let read_once = if place.storage.is_some() { part } else { 0 };
            let (sent, received) = (read_once * (world - 1), all - read_once);
            RankLoad { read_once, sent, received, ..RankLoad::default() }
        };
        let loads: Vec<RankLoad> = self.topology.places().iter().map(load).collect();
        self.predict_loads(&loads)
    }

    /// Bytes of all tensors.
    #[must_use]
    pub fn checkpoint_bytes(&self) -> u64 {
        self.classes.iter().map(|class| class.bytes * class.tensors).sum()
    }

    fn predict_loads(&self, loads: &[RankLoad]) -> Prediction {
        let near = self.topology.same_node();
        let links = self.topology.links();
        let storages = self.topology.storages();
        let mut by_storage = vec![(0u64, 0u64); storages.len()];
        let mut prediction = Prediction { storage_s: 0.0, read_s: 0.0, link_s: 0.0 };
        for ((place, load), near) in self.topology.places().iter().zip(loads).zip(near) {
            if let Some(storage) = place.storage {
                let sums = &mut by_storage[storage as usize];
                sums.0 += load.read();
                sums.1 += load.requests;
                let rate = storages[storage as usize].rank_bytes_per_s;
                prediction.read_s = prediction.read_s.max(load.read() as f64 / rate);
            }
            // A broadcast is relayed: no rank sends more than each receives, but for its own part.
            let sent = load.sent.min(load.received.max(load.read_once));
            let bytes = load.received.max(sent) as f64;
            let seconds = bytes * near / links.node_bytes_per_s
                + bytes * (1.0 - near) / links.net_bytes_per_s;
            prediction.link_s = prediction.link_s.max(seconds);
        }
        for (storage, (bytes, requests)) in storages.iter().zip(by_storage) {
            let seconds =
                (bytes as f64 / storage.bytes_per_s).max(requests as f64 / storage.requests_per_s);
            prediction.storage_s = prediction.storage_s.max(seconds);
        }
        prediction
    }
}
