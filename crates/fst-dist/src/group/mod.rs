//! Process groups: ranks that exchange bytes, whatever carries them.
//!
//! [`Group`] asks for little of an implementation: a batch of transfers, and of its [`Control`] a
//! gathering of small host messages, and abort. The collectives are built on these. Every wait has a
//! deadline, which counts silence; once one rank fails, every rank's waits end with an error that names it.

mod launch;
mod local;
#[cfg(feature = "mpi")]
mod mpi;
mod nccl;
mod occupied;
mod signs;
mod tcp;

use std::fmt;
use std::time::Duration;

pub use launch::LaunchEnv;
pub use local::{Copier, CopyError, HostCopier, LocalGroup};

#[cfg(feature = "mpi")]
pub use mpi::MpiGroup;
pub use nccl::{DeviceStream, Nccl, NcclGroup, UniqueId};
pub use occupied::{Occupancy, Occupied};
pub use signs::{Signs, Waiting};
pub use tcp::TcpControl;

use crate::error::GroupError;
use crate::memory::{Dst, Space, Src};

/// One transfer of a batch.
#[derive(Debug)]
#[non_exhaustive]
pub enum Op<'a> {
    /// To another rank, which receives as many bytes in its batch.
    Send {
        /// The receiver.
        to: u32,
        /// The bytes.
        data: Src<'a>,
    },
    /// From another rank.
    Recv {
        /// The sender.
        from: u32,
        /// Where the bytes go.
        into: Dst<'a>,
    },
    /// This rank's bytes to all others, which have `BroadcastFrom` at the same place of their batch.
    Broadcast {
        /// The bytes.
        data: Src<'a>,
    },
    /// From `root`, which has `Broadcast` in its batch.
    BroadcastFrom {
        /// The sender.
        root: u32,
        /// Where the bytes go.
        into: Dst<'a>,
    },
}

/// How long a rank that is waited for may be silent, unless said otherwise.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(120);

/// What ranks need besides moving bytes: who they are, small messages, and word of failures.
///
/// After an error the group is broken: every further call fails with it.
pub trait Control: Send + Sync + fmt::Debug {
    /// This rank.
    fn rank(&self) -> u32;

    /// How many ranks there are.
    fn world_size(&self) -> u32;

    /// How long a rank that this one waits for may be silent.
    fn deadline(&self) -> Duration;

    /// What is known of when the ranks last did something.
    fn signs(&self) -> &Signs;

    /// Tells that this rank gets on with what it does outside of the group's operations, such as reading:
    /// those that wait for it wait on. Cheap; may be called often, and from any thread, by whoever sees
    /// that bytes have moved.
    fn alive(&self) {
        self.signs().alive(self.rank());
    }

    /// Every rank gives a small message and gets those of all, by rank. Over TCP those of all
    /// together may have 64 MiB.
    ///
    /// # Errors
    /// Another rank failed, left or was silent for the deadline; messages that are too long.
    fn gather_messages(&self, message: &[u8]) -> Result<Vec<Vec<u8>>, GroupError>;

    /// Ends the group: every rank's waits, now and later, fail with an error that names this rank and
    /// the cause. The first abort counts.
    fn abort(&self, cause: &str);

    /// The error that ended the group, if one has, as far as this rank knows.
    fn failure(&self) -> Option<GroupError>;

    /// Waits for all ranks.
    ///
    /// # Errors
    /// As for [`gather_messages`](Self::gather_messages).
    fn barrier(&self) -> Result<(), GroupError> {
        self.gather_messages(&[]).map(drop)
    }
}

/// A rank that leaves control to another handle of it, and so has [`Control`]: what moves bytes beside
/// a [`TcpControl`], for instance.
pub trait Controlled: Send + Sync + fmt::Debug {
    /// That handle.
    fn control(&self) -> &dyn Control;
}

impl<T: Controlled> Control for T {
    fn rank(&self) -> u32 {
        self.control().rank()
    }

    fn world_size(&self) -> u32 {
        self.control().world_size()
    }

    fn deadline(&self) -> Duration {
        self.control().deadline()
    }

    fn signs(&self) -> &Signs {
        self.control().signs()
    }

    fn alive(&self) {
        self.control().alive();
    }

    fn gather_messages(&self, message: &[u8]) -> Result<Vec<Vec<u8>>, GroupError> {
        self.control().gather_messages(message)
    }

    fn abort(&self, cause: &str) {
        self.control().abort(cause);
    }

    fn failure(&self) -> Option<GroupError> {
        self.control().failure()
    }
}

/// Ranks that exchange bytes.
///
/// Between two ranks messages arrive in the order in which they were sent. A group is a handle of one
/// rank, and one thread at a time exchanges; [`abort`](Control::abort) may come from any.
pub trait Group: Control {
    /// Whether transfers can begin and end in memory of `space`. A load whose memory the group does
    /// not reach is refused before anything is read.
    fn reaches(&self, space: Space) -> bool;

    /// Whether a load has the group ([`Occupied`]): this handle's own, and new with it.
    fn occupancy(&self) -> &Occupancy;

    /// Carries out a batch, all transfers at the same time; returns when this rank's memory is free to
    /// use again and what it receives has arrived. Ranks that broadcast or receive broadcasts
    /// list these in the same order.
    ///
    /// # Errors
    /// Another rank failed, left or was silent for the deadline; sizes that differ; memory that the
    /// group cannot reach.
    fn exchange(&self, batch: Vec<Op<'_>>) -> Result<(), GroupError>;

    /// Sends to one rank.
    ///
    /// # Errors
    /// As for [`exchange`](Self::exchange).
    fn send(&self, to: u32, data: Src<'_>) -> Result<(), GroupError> {
        self.exchange(vec![Op::Send { to, data }])
    }

    /// Receives from one rank.
    ///
    /// # Errors
    /// As for [`exchange`](Self::exchange).
    fn recv(&self, from: u32, into: Dst<'_>) -> Result<(), GroupError> {
        self.exchange(vec![Op::Recv { from, into }])
    }
}

impl dyn Group + '_ {
    /// The bytes of `root` to all ranks: `root` gives, the others receive, `data`.
    ///
    /// # Errors
    /// As for [`exchange`](Group::exchange).
    ///
    /// # Safety
    /// On `root` the bytes are initialised.
    pub unsafe fn broadcast(&self, root: u32, data: Dst<'_>) -> Result<(), GroupError> {
        if root == self.rank() {
            // SAFETY: by this function's contract.
            let data = unsafe { data.as_src() };
            return self.exchange(vec![Op::Broadcast { data }]);
        }
        self.exchange(vec![Op::BroadcastFrom { root, into: data }])
    }

    /// Rank `r` receives into `into` the `r`-th of the parts that `root` gives; on other ranks `parts` is
    /// empty. The root's own part is not moved: `into` is left alone there.
    ///
    /// # Errors
    /// As for [`exchange`](Group::exchange), or not one part for each rank.
    pub fn scatter(&self, root: u32, parts: &[Src<'_>], into: Dst<'_>) -> Result<(), GroupError> {
        if root != self.rank() {
            return self.recv(root, into);
        }
        if parts.len() != self.world_size() as usize {
            let (expected, found) = (self.world_size() as usize, parts.len());
            return Err(GroupError::Parts { expected, found });
        }
        let others = (0u32..).zip(parts.iter().copied()).filter(|&(to, _)| to != root);
        self.exchange(others.map(|(to, data)| Op::Send { to, data }).collect())
    }

    /// Every rank gives `data` and receives, for each other rank `r`, its bytes into `into[r]`; the
    /// place of the rank itself is left alone.
    ///
    /// # Errors
    /// As for [`exchange`](Group::exchange), or not one place for each rank.
    pub fn all_gather(&self, data: Src<'_>, into: Vec<Dst<'_>>) -> Result<(), GroupError> {
        if into.len() != self.world_size() as usize {
            let (expected, found) = (self.world_size() as usize, into.len());
            return Err(GroupError::Parts { expected, found });
        }
        let op = |(root, into): (u32, _)| match root == self.rank() {
            true => Op::Broadcast { data },
            false => Op::BroadcastFrom { root, into },
        };
        self.exchange((0u32..).zip(into).map(op).collect())
    }
}

/// The ranks that a batch waits for. Refuses those that the world does not have, and transfers of a rank
/// with itself.
pub(crate) fn check_peers(batch: &[Op<'_>], rank: u32, world: u32) -> Result<Vec<u32>, GroupError> {
    let mut peers = Vec::with_capacity(batch.len());
    for op in batch {
        let peer = match op {
            Op::Send { to, .. } => *to,
            Op::Recv { from, .. } => *from,
            Op::BroadcastFrom { root, .. } => *root,
            Op::Broadcast { .. } => {
                peers.extend((0..world).filter(|&other| other != rank));
                continue;
            }
        };
        if peer >= world || peer == rank {
            return Err(GroupError::Peer { peer, rank, world });
        }
        peers.push(peer);
    }
    peers.sort_unstable();
    peers.dedup();
    Ok(peers)
}
