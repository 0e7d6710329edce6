//! The battery that every group passes: call [`run`] on all ranks at the same time.

use super::{Group, Op};
use crate::error::GroupError;
use crate::memory::{Dst, Src};

/// A check that a group did not pass.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// An operation that should have worked did not.
    #[error("{check}: {source}")]
    #[non_exhaustive]
    Group {
        /// The check.
        check: &'static str,
        /// What the group said.
        source: GroupError,
    },
    /// Bytes that are not what was sent.
    #[error("{check} on rank {rank}: byte {at} is {found}, not {expected}")]
    #[non_exhaustive]
    Bytes {
        /// The check.
        check: &'static str,
        /// The rank that received them.
        rank: u32,
        /// The first wrong byte.
        at: usize,
        /// What it should be.
        expected: u8,
        /// What it is.
        found: u8,
    },
}

/// A message that depends on sender, receiver and a number, of a length that does too.
fn message(from: u32, to: u32, number: u32, len: usize) -> Vec<u8> {
    let seed = from.wrapping_mul(31) ^ to.wrapping_mul(17) ^ number.wrapping_mul(101);
    (0..len as u32).map(|i| (i.wrapping_mul(7) ^ (i >> 8) ^ seed) as u8).collect()
}

fn same(check: &'static str, rank: u32, found: &[u8], expected: &[u8]) -> Result<(), Failure> {
    let differ = found.iter().zip(expected).position(|(a, b)| a != b);
    match differ {
        None => Ok(()),
        Some(at) => {
            let (expected, found) = (expected[at], found[at]);
            Err(Failure::Bytes { check, rank, at, expected, found })
        }
    }
}

/// Lengths around what transports treat differently: empty, eager, and beyond.
const LENGTHS: [usize; 5] = [0, 1, 1000, 70_000, 3 << 20];

/// Runs every check on host memory.
///
/// # Errors
/// The first check that fails.
pub fn run(group: &dyn Group) -> Result<(), Failure> {
    let (rank, world) = (group.rank(), group.world_size());
    let others = || (0..world).filter(move |&other| other != rank);
    let wrap = |check| move |source| Failure::Group { check, source };

    let check = "messages are gathered by rank";
    for round in 0..3 {
        let mine = message(rank, 0, round, 10 * rank as usize + round as usize);
        let all = group.gather_messages(&mine).map_err(wrap(check))?;
        for (other, found) in (0u32..).zip(&all) {
            let expected = message(other, 0, round, 10 * other as usize + round as usize);
            same(check, rank, &[&[found.len() as u8], &found[..]].concat(), &{
                [&[expected.len() as u8], &expected[..]].concat()
            })?;
        }
    }

    let check = "all ranks exchange with all in one batch, two messages each way in order";
    for len in LENGTHS {
        let sent: Vec<_> =
            others().flat_map(|to| [0, 1].map(|n| (to, message(rank, to, n, len)))).collect();
        let mut got: Vec<_> =
            others().flat_map(|from| [from, from]).map(|f| (f, vec![0; len])).collect();
        let mut batch: Vec<Op<'_>> = Vec::new();
        for (from, into) in &mut got {
            batch.push(Op::Recv { from: *from, into: Dst::from(&mut into[..]) });
        }
        for (to, data) in &sent {
            batch.push(Op::Send { to: *to, data: Src::from(&data[..]) });
        }
        group.exchange(batch).map_err(wrap(check))?;
        for (index, (from, found)) in got.iter().enumerate() {
            same(check, rank, found, &message(*from, rank, index as u32 % 2, len))?;
        }
    }

    let check = "every rank broadcasts in one batch";
    for len in LENGTHS {
        let mine = message(rank, 99, 0, len);
        let mut got: Vec<_> = (0..world).map(|_| vec![0; len]).collect();
        let into = got.iter_mut().map(|into| Dst::from(&mut into[..])).collect();
        group.all_gather(Src::from(&mine[..]), into).map_err(wrap(check))?;
        for from in others() {
            same(check, rank, &got[from as usize], &message(from, 99, 0, len))?;
        }
    }

    let check = "broadcast from each rank in turn";
    for root in 0..world {
        let mut data = if root == rank { message(root, 5, 0, 70_000) } else { vec![0; 70_000] };
        // SAFETY: a vector's bytes are initialised.
        unsafe { group.broadcast(root, Dst::from(&mut data[..])) }.map_err(wrap(check))?;
        same(check, rank, &data, &message(root, 5, 0, 70_000))?;
    }

    let check = "scatter of unequal parts";
    for root in 0..world {
        let len = |to: u32| 1000 * to as usize + 3;
        let parts: Vec<_> = (0..world).map(|to| message(root, to, 7, len(to))).collect();
        let parts: Vec<_> = parts.iter().map(|part| Src::from(&part[..])).collect();
        let mut into = vec![0; len(rank)];
        let parts = if root == rank { &parts[..] } else { &[] };
        group.scatter(root, parts, Dst::from(&mut into[..])).map_err(wrap(check))?;
        if root != rank {
            same(check, rank, &into, &message(root, rank, 7, len(rank)))?;
        }
    }

    let check = "a ring of single sends and receives, odd and even ranks in turn";
    if world > 1 {
        let (next, previous) = ((rank + 1) % world, (rank + world - 1) % world);
        let mine = message(rank, next, 3, 100_000);
        let mut into = vec![0; 100_000];
        if rank % 2 == 0 {
            group.send(next, Src::from(&mine[..])).map_err(wrap(check))?;
            group.recv(previous, Dst::from(&mut into[..])).map_err(wrap(check))?;
        } else {
            group.recv(previous, Dst::from(&mut into[..])).map_err(wrap(check))?;
            group.send(next, Src::from(&mine[..])).map_err(wrap(check))?;
        }
        same(check, rank, &into, &message(previous, rank, 3, 100_000))?;
    }

    group.barrier().map_err(wrap("barrier"))
}
