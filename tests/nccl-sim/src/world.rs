//! The state behind the calls: communicators, what was posted to them, and what has run.

use std::collections::HashMap;
use std::ffi::c_int;
use std::sync::{Mutex, PoisonError};

use crate::processes::Processes;
use crate::{IN_PROGRESS, INVALID_ARGUMENT, SUCCESS};

/// One half of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Send { to: u32 },
    Recv { from: u32 },
    Broadcast { root: u32 },
}

/// An operation with its memory and stream.
#[derive(Clone, Debug)]
pub(crate) struct Work {
    op: Op,
    addr: usize,
    len: usize,
    stream: usize,
    /// Of a broadcast: ranks that have copied from the root.
    copied: Vec<u32>,
    /// The place among the communicator's operations of this kind with this peer.
    number: u64,
}

impl Work {
    pub(crate) fn new(op: Op, addr: usize, len: usize, stream: usize) -> Self {
        Self { op, addr, len, stream, copied: Vec::new(), number: 0 }
    }
}

#[derive(Debug)]
struct Comm {
    id: u64,
    rank: u32,
    ranks: u32,
    pending: Vec<Work>,
    counts: HashMap<(u8, u32), u64>,
    /// Questions to be answered with "in progress" before work begins to count.
    delay: u32,
    ended: bool,
    /// Where the other ranks are, if they are processes.
    processes: Option<Processes>,
}

#[derive(Debug, Default)]
pub(crate) struct World {
    comms: Vec<Comm>,
    ids: u64,
    calls: HashMap<String, u32>,
    injected: Vec<(String, u32, c_int)>,
    pub(crate) violations: u32,
}

static WORLD: Mutex<Option<World>> = Mutex::new(None);

pub(crate) fn with_world<T>(f: impl FnOnce(&mut World) -> T) -> T {
    let mut world = WORLD.lock().unwrap_or_else(PoisonError::into_inner);
    f(world.get_or_insert_default())
}

impl World {
    pub(crate) fn fresh_id(&mut self) -> u64 {
        self.ids += 1;
        self.ids
    }

    /// Counts a call; the code that it is to fail with, if any.
    pub(crate) fn count(&mut self, call: &str) -> Option<c_int> {
        let count = self.calls.entry(call.to_owned()).or_default();
        *count += 1;
        let hit = self.injected.iter().position(|(name, at, _)| name == call && at == count);
        hit.map(|index| self.injected.remove(index).2)
    }

    pub(crate) fn inject(&mut self, name: String, nth: u32, code: c_int) {
        let at = self.calls.get(&name).copied().unwrap_or(0) + nth;
        self.injected.push((name, at, code));
    }

    /// A handle is the communicator's number, from 1.
    pub(crate) fn join(
        &mut self,
        id: u64,
        rank: u32,
        ranks: u32,
        processes: Option<Processes>,
    ) -> usize {
        let (pending, counts) = (Vec::new(), HashMap::new());
        let (delay, ended) = (3, false);
        self.comms.push(Comm { id, rank, ranks, pending, counts, delay, ended, processes });
        self.comms.len()
    }

    fn comm(&mut self, handle: usize) -> Option<&mut Comm> {
        let comm = self.comms.get_mut(handle.wrapping_sub(1)).filter(|comm| !comm.ended);
        if comm.is_none() {
            self.violations += 1;
        }
        comm
    }

    pub(crate) fn rank_and_count(&mut self, handle: usize) -> Option<(u32, u32)> {
        self.comm(handle).map(|comm| (comm.rank, comm.ranks))
    }

    pub(crate) fn async_state(&mut self, handle: usize) -> c_int {
        let Some(comm) = self.comm(handle) else { return INVALID_ARGUMENT };
        if comm.delay > 0 {
            comm.delay -= 1;
            return IN_PROGRESS;
        }
        let (id, ranks) = (comm.id, comm.ranks as usize);
        let here = match &comm.processes {
            Some(processes) => processes.here(comm.ranks),
            None => self.comms.iter().filter(|comm| comm.id == id).count(),
        };
        if here < ranks { IN_PROGRESS } else { SUCCESS }
    }

    pub(crate) fn post(&mut self, handle: usize, mut work: Work) {
        let Some(comm) = self.comm(handle) else { return };
        // Transfers match in order: each with its peer, broadcasts all together.
        let key = match work.op {
            Op::Send { to } => (0, to),
            Op::Recv { from } => (1, from),
            Op::Broadcast { .. } => (2, 0),
        };
        let count = comm.counts.entry(key).or_default();
        *count += 1;
        work.number = *count;
        comm.pending.push(work);
        comm.delay = 3;
    }

    pub(crate) fn finalize(&mut self, handle: usize) -> c_int {
        let Some(comm) = self.comm(handle) else { return INVALID_ARGUMENT };
        comm.delay = 3;
        if !comm.pending.is_empty() {
            self.violations += 1;
        }
        IN_PROGRESS
    }

    pub(crate) fn end(&mut self, handle: usize, abort: bool) -> c_int {
        let Some(comm) = self.comm(handle) else { return INVALID_ARGUMENT };
        let pending = !std::mem::take(&mut comm.pending).is_empty();
        comm.ended = true;
        if pending && !abort {
            self.violations += 1;
        }
        SUCCESS
    }

    /// Runs what this stream's work is waiting for and the peers have posted.
    pub(crate) fn stream_done(&mut self, stream: usize) -> bool {
        for index in 0..self.comms.len() {
            if self.comms[index].delay > 0 {
                continue;
            }
            let pending = std::mem::take(&mut self.comms[index].pending);
            let (own, mut left): (Vec<Work>, Vec<Work>) =
                pending.into_iter().partition(|work| work.stream == stream);
            for mut work in own {
                if !self.run(index, &mut work) {
                    left.push(work);
                }
            }
            self.comms[index].pending.append(&mut left);
        }
        let mut all = self.comms.iter().flat_map(|comm| &comm.pending);
        !all.any(|work| work.stream == stream)
    }

    /// Receives copy from the posted other half and note that there; a sender is done once that is
    /// noted by all it sends to.
    fn run(&mut self, index: usize, work: &mut Work) -> bool {
        if let Some(processes) = self.comms[index].processes.clone() {
            let Comm { rank, ranks, .. } = self.comms[index];
            let memory = match work.len {
                0 => &mut [][..],
                // SAFETY: the caller lends its memory until its stream is done, which is being asked.
                _ => unsafe { std::slice::from_raw_parts_mut(work.addr as *mut u8, work.len) },
            };
            let (half, sent) = ((work.op, work.number), &mut work.copied);
            let moved = processes.run((rank, ranks), half, memory, sent);
            self.violations += u32::from(moved.is_none());
            return moved.unwrap_or(false);
        }
        let (id, rank, ranks) =
            (self.comms[index].id, self.comms[index].rank, self.comms[index].ranks);
        let (source, receivers) = match work.op {
            Op::Send { .. } => (rank, 1),
            Op::Recv { from } => (from, 1),
            Op::Broadcast { root } => (root, ranks - 1),
        };
        if source == rank {
            return work.copied.len() == receivers as usize;
        }
        let other = self.comms.iter_mut().find(|c| c.id == id && c.rank == source && !c.ended);
        let half = other.and_then(|comm| {
            comm.pending.iter_mut().find(|half| match (half.op, work.op) {
                (Op::Send { to }, Op::Recv { .. }) => to == rank && half.number == work.number,
                (Op::Broadcast { root }, Op::Broadcast { root: mine }) => {
                    root == mine && half.number == work.number
                }
                _ => false,
            })
        });
        let Some(half) = half else { return false };
        if half.len != work.len {
            self.violations += 1;
            return false;
        }
        // SAFETY: both callers lend their memory until their streams are done: the sender's is not
        // before `copied` is noted, the receiver's is being asked now.
        unsafe {
            std::ptr::copy_nonoverlapping(half.addr as *const u8, work.addr as *mut u8, work.len);
        }
        half.copied.push(rank);
        true
    }
}
