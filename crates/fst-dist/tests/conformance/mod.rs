//! The battery that every group passes: call [`run`] on all ranks at the same time.

#![allow(dead_code, reason = "each test takes what it needs")]

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use fst_dist::group::Op;
use fst_dist::{Cause, Dst, Group, GroupError, Space, Src};

/// Which check a group did not pass, and how.
pub(crate) type Failure = String;

/// A message that depends on sender, receiver and a number, of a length that does too.
fn message(from: u32, to: u32, number: u32, len: usize) -> Vec<u8> {
    let seed = from.wrapping_mul(31) ^ to.wrapping_mul(17) ^ number.wrapping_mul(101);
    (0..len as u32).map(|i| (i.wrapping_mul(7) ^ (i >> 8) ^ seed) as u8).collect()
}

fn same(check: &'static str, rank: u32, found: &[u8], expected: &[u8]) -> Result<(), Failure> {
    if found.len() != expected.len() {
        let (expected, found) = (expected.len(), found.len());
        return Err(format!("{check} on rank {rank}: {found} bytes, not {expected}"));
    }
    let differ = found.iter().zip(expected).position(|(a, b)| a != b);
    match differ {
        None => Ok(()),
        Some(at) => {
            let (expected, found) = (expected[at], found[at]);
            Err(format!("{check} on rank {rank}: byte {at} is {found}, not {expected}"))
        }
    }
}

/// Lengths around what transports treat differently: empty, eager, and beyond.
const LENGTHS: [usize; 5] = [0, 1, 1000, 70_000, 3 << 20];

/// Memory for the battery's messages, of the kind that the group moves.
pub(crate) trait Scratch {
    /// Its space.
    fn space(&self) -> Space;

    /// Allocates memory that holds `bytes`.
    ///
    /// # Errors
    /// No memory, or the bytes cannot be moved there.
    fn put(&self, bytes: &[u8]) -> Result<u64, Cause>;

    /// Gives the bytes at an address that `put` gave, and frees the memory.
    ///
    /// # Errors
    /// The bytes cannot be moved here.
    fn take(&self, addr: u64) -> Result<Vec<u8>, Cause>;
}

/// Host memory.
#[derive(Debug, Default)]
pub(crate) struct HostScratch(Mutex<HashMap<u64, Box<[u8]>>>);

impl Scratch for HostScratch {
    fn space(&self) -> Space {
        Space::Host
    }

    fn put(&self, bytes: &[u8]) -> Result<u64, Cause> {
        // One byte more: empty messages have addresses of their own too.
        let mut memory = vec![0; bytes.len() + 1].into_boxed_slice();
        memory[..bytes.len()].copy_from_slice(bytes);
        let addr = memory.as_mut_ptr() as u64;
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(addr, memory);
        Ok(addr)
    }

    fn take(&self, addr: u64) -> Result<Vec<u8>, Cause> {
        let memory = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&addr);
        let mut bytes = memory.ok_or("no such memory")?.into_vec();
        bytes.pop();
        Ok(bytes)
    }
}

/// Messages in scratch memory.
struct Messages<'a> {
    group: &'a dyn Group,
    scratch: &'a dyn Scratch,
    check: &'static str,
    rank: u32,
}

/// A message in scratch memory.
#[derive(Clone, Copy)]
struct Held {
    addr: u64,
    len: usize,
    space: Space,
}

impl Held {
    fn src<'a>(self) -> Src<'a> {
        // SAFETY: scratch memory is initialised and lives until it is taken, after the exchange.
        unsafe { Src::from_addr(self.addr, self.len, self.space) }
    }

    fn dst<'a>(self) -> Dst<'a> {
        // SAFETY: as for `src`; each place is received into once.
        unsafe { Dst::from_addr(self.addr, self.len, self.space) }
    }
}

impl Messages<'_> {
    fn put(&self, bytes: &[u8]) -> Result<Held, Failure> {
        let addr = self.scratch.put(bytes).map_err(|source| self.memory(source))?;
        Ok(Held { addr, len: bytes.len(), space: self.scratch.space() })
    }

    fn memory(&self, source: Cause) -> Failure {
        format!("{}: scratch memory: {source}", self.check)
    }

    /// A place of `len` bytes to receive into.
    fn place(&self, len: usize) -> Result<Held, Failure> {
        self.put(&vec![0xEE; len])
    }

    fn expect(&self, held: Held, expected: &[u8]) -> Result<(), Failure> {
        let found = self.scratch.take(held.addr).map_err(|source| self.memory(source))?;
        same(self.check, self.rank, &found, expected)
    }

    fn drop(&self, held: Held) -> Result<(), Failure> {
        self.scratch.take(held.addr).map(drop).map_err(|source| self.memory(source))
    }

    fn exchange(&self, batch: Vec<Op<'_>>) -> Result<(), Failure> {
        self.worked(self.group.exchange(batch))
    }

    fn worked<T>(&self, result: Result<T, GroupError>) -> Result<T, Failure> {
        result.map_err(|source| format!("{}: {source}", self.check))
    }
}

/// Waits for whoever lives: rank 0 is long in getting on with something else, several deadlines, and
/// each of the others gets its message from the rank before, so that they wait for ranks that wait.
///
/// # Errors
/// The check failed.
pub(crate) fn outwait(group: &dyn Group, scratch: &dyn Scratch) -> Result<(), Failure> {
    let (rank, world) = (group.rank(), group.world_size());
    let m = Messages { group, scratch, check: "a rank that gets on is waited for", rank };
    m.worked(group.barrier())?;
    let place = m.put(&message(0, 0, 9, 1000))?;
    if rank == 0 {
        for _ in 0..12 {
            std::thread::sleep(group.deadline() / 4);
            group.alive();
        }
    } else {
        m.worked(group.recv(rank - 1, place.dst()))?;
    }
    if rank + 1 < world {
        m.worked(group.send(rank + 1, place.src()))?;
    }
    m.expect(place, &message(0, 0, 9, 1000))?;
    m.worked(group.barrier())
}

/// The last rank hangs. Those that wait for it end with an error that names it, a deadline later,
/// however long rank 0 gets on with something else.
///
/// # Errors
/// The check failed.
pub(crate) fn outwait_none(group: &dyn Group, scratch: &dyn Scratch) -> Result<(), Failure> {
    let (rank, last) = (group.rank(), group.world_size() - 1);
    let m = Messages { group, scratch, check: "a rank that hangs is not waited for", rank };
    m.worked(group.barrier())?;
    let start = Instant::now();
    let error = if rank == 0 || rank == last {
        loop {
            if let Some(error) = group.failure() {
                break error;
            }
            if start.elapsed() > group.deadline() * 8 {
                return Err(format!("{}: rank {rank} hears of no failure", m.check));
            }
            std::thread::sleep(Duration::from_millis(1));
            if rank == 0 {
                group.alive();
            }
        }
    } else {
        let place = m.place(1000)?;
        let received = group.recv(last, place.dst());
        m.drop(place)?;
        received.err().ok_or_else(|| format!("{}: it was received from", m.check))?
    };
    match error.to_string() {
        error if error.contains(&format!("for rank {last}")) => Ok(()),
        error => Err(format!("{}: {error}", m.check)),
    }
}

/// Runs every check on host memory.
///
/// # Errors
/// The first check that fails.
pub(crate) fn run(group: &dyn Group) -> Result<(), Failure> {
    run_in(group, &HostScratch::default())
}

/// Runs every check on memory of `scratch`.
///
/// # Errors
/// The first check that fails.
pub(crate) fn run_in(group: &dyn Group, scratch: &dyn Scratch) -> Result<(), Failure> {
    let (rank, world) = (group.rank(), group.world_size());
    let others = || (0..world).filter(move |&other| other != rank);
    let checking = |check| Messages { group, scratch, check, rank };

    let m = checking("messages are gathered by rank");
    for round in 0..3 {
        let text = |of: u32| message(of, 0, round, 10 * of as usize + round as usize);
        let all = m.worked(group.gather_messages(&text(rank)))?;
        for (other, found) in (0u32..).zip(&all) {
            same(m.check, rank, found, &text(other))?;
        }
    }

    let m = checking("all ranks exchange with all in one batch, two messages each way in order");
    for len in LENGTHS {
        let (mut batch, mut sent, mut got) = (Vec::new(), Vec::new(), Vec::new());
        for (other, n) in others().flat_map(|other| [(other, 0), (other, 1)]) {
            let (data, place) = (m.put(&message(rank, other, n, len))?, m.place(len)?);
            batch.push(Op::Send { to: other, data: data.src() });
            batch.push(Op::Recv { from: other, into: place.dst() });
            sent.push(data);
            got.push((other, n, place));
        }
        m.exchange(batch)?;
        sent.into_iter().try_for_each(|held| m.drop(held))?;
        for (from, n, place) in got {
            m.expect(place, &message(from, rank, n, len))?;
        }
    }

    let m = checking("every rank broadcasts in one batch");
    for len in LENGTHS {
        let mine = m.put(&message(rank, 99, 0, len))?;
        let places = (0..world).map(|_| m.place(len)).collect::<Result<Vec<_>, _>>()?;
        let into = places.iter().map(|place| place.dst()).collect();
        m.worked(group.all_gather(mine.src(), into))?;
        m.expect(mine, &message(rank, 99, 0, len))?;
        for (from, place) in (0..world).zip(places) {
            match from == rank {
                true => m.drop(place)?,
                false => m.expect(place, &message(from, 99, 0, len))?,
            }
        }
    }

    let m = checking("broadcast from each rank in turn");
    for root in 0..world {
        let bytes = message(root, 5, 0, 70_000);
        let held = if root == rank { m.put(&bytes)? } else { m.place(bytes.len())? };
        // SAFETY: scratch memory is initialised.
        m.worked(unsafe { group.broadcast(root, held.dst()) })?;
        m.expect(held, &bytes)?;
    }

    let m = checking("scatter of unequal parts");
    for root in 0..world {
        let text = |to: u32| message(root, to, 7, 1000 * to as usize + 3);
        let whose = if root == rank { 0..world } else { 0..0 };
        let parts = whose.map(|to| m.put(&text(to))).collect::<Result<Vec<_>, _>>()?;
        let place = m.place(text(rank).len())?;
        let sources: Vec<_> = parts.iter().map(|part| part.src()).collect();
        m.worked(group.scatter(root, &sources, place.dst()))?;
        parts.into_iter().try_for_each(|part| m.drop(part))?;
        match root == rank {
            true => m.drop(place)?,
            false => m.expect(place, &text(rank))?,
        }
    }

    let m = checking("a ring of single sends and receives, odd and even ranks in turn");
    if world > 1 {
        let (next, previous) = ((rank + 1) % world, (rank + world - 1) % world);
        let (data, place) = (m.put(&message(rank, next, 3, 100_000))?, m.place(100_000)?);
        // An odd ring has two even neighbours: rank 0 begins, the last rank receives first.
        let sends_first = rank % 2 == 0 && rank + 1 != world;
        if sends_first {
            m.worked(group.send(next, data.src()))?;
            m.worked(group.recv(previous, place.dst()))?;
        } else {
            m.worked(group.recv(previous, place.dst()))?;
            m.worked(group.send(next, data.src()))?;
        }
        m.drop(data)?;
        m.expect(place, &message(previous, rank, 3, 100_000))?;
    }

    checking("barrier").worked(group.barrier())
}
