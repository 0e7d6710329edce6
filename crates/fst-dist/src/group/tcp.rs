//! Small messages and word of failures between processes, over TCP through rank 0.
//!
//! This carries unique ids, digests, barriers and aborts, never tensors. Every rank keeps a connection
//! to rank 0; a connection that ends without goodbye is a rank that is lost, which rank 0
//! tells the others. One thread of each rank owns its connections and all that is known of the others,
//! and ends with the control. A frame is accepted where its message is due, and no longer than it can be.
//!
//! A connection begins with the mark of its job, so that ranks of another job which find the same port
//! are strangers. There is no authentication, as there is none in NCCL's own connections: use it
//! in networks that you trust.

mod join;
mod wire;

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use sha2::{Digest, Sha256};

use super::{Control, LaunchEnv, Signs};
use crate::error::GroupError;
use join::Join;
use wire::{Wire, frame, wait};

/// The mark of a job without a name; that of others is a digest of the name.
const MARK: [u8; 8] = *b"fst-dist";

/// Mark, rank and world size.
const HELLO: usize = 16;

/// The longest message of a gathering, and those of all ranks together, with the number of the gathering.
const LONGEST: usize = 64 << 20;

/// The longest cause of a failure that is told.
const CAUSE: usize = 64 << 10;

/// Connections beyond those of the ranks that may be open while ranks join; the oldest goes first.
const STRANGERS: usize = 64;

/// And no more often than this.
const LEAST_BEAT: Duration = Duration::from_millis(5);

/// How long a rank that leaves waits for others to take what it has sent, and to leave as well: closing
/// with unread bytes would reset the connection under what was just written.
const FAREWELL: Duration = Duration::from_millis(500);

const GATHER: u8 = 1;
const RESULT: u8 = 2;
const ABORT: u8 = 3;
const LOST: u8 = 4;
const BYE: u8 = 5;
const WELCOME: u8 = 6;
/// Ranks of whom there are new signs of life, and whether they wait. Rank 0 tells those of all, and so
/// that it lives itself while others wait for it.
const SIGNS: u8 = 7;

/// Bytes of a rank in them.
const SIGN: usize = 5;

/// How often signs of life are told in the time that a deadline takes.
const BEATS: u32 = 16;

/// One rank's connection to the others.
#[derive(Debug)]
pub struct TcpControl {
    rank: u32,
    world: u32,
    deadline: Duration,
    failure: Arc<OnceLock<GroupError>>,
    signs: Arc<Signs>,
    asks: Sender<Ask>,
    /// A byte wakes the thread, its end ends the thread.
    wake: UnixStream,
    thread: Option<JoinHandle<()>>,
}

/// A gathering that this rank wants, answered with the messages of all unless the group has failed.
struct Ask {
    message: Vec<u8>,
    answer: Sender<Vec<Vec<u8>>>,
}

impl TcpControl {
    /// Meets the ranks that the environment tells of: rank 0 listens at the address and port, the others
    /// connect. All that are to come must do so within the deadline, whatever strangers connect
    /// meanwhile; ranks of a [job](LaunchEnv::job) of another name are strangers, and go on trying. Where
    /// the address is not one of this machine (that of a gateway, say), give rank 0 one that is, or
    /// `0.0.0.0`.
    ///
    /// # Errors
    /// The address does not resolve, the port cannot be listened at, a rank does not come in time, nobody
    /// at the address takes this rank in, two processes claim one rank or world sizes differ.
    pub fn from_env(env: &LaunchEnv, deadline: Duration) -> Result<Self, GroupError> {
        let LaunchEnv { rank, world, port, .. } = *env;
        if rank >= world {
            return Err(GroupError::Peer { peer: rank, rank, world });
        }
        let start = Instant::now();
        let address = format!("{}:{port}", env.address);
        let network = |what, e: io::Error| GroupError::Network {
            what,
            address: address.clone(),
            source: Arc::new(e),
        };
        let resolved = (&*env.address, port).to_socket_addrs();
        let resolved: Vec<SocketAddr> = resolved.map_err(|e| network("resolve", e))?.collect();
        let mark = mark(&env.job);
        let (mut listener, mut wires) = (None, Vec::new());
        if rank > 0 {
            let hello = [&mark[..], &rank.to_le_bytes(), &world.to_le_bytes()].concat();
            let join = Join { rank, address: &address, start, deadline };
            wires.push(Some(join.connect(&resolved, &hello)?));
        } else if world > 1 {
            let listening =
                TcpListener::bind(&resolved[..]).map_err(|e| network("listen at", e))?;
            listening.set_nonblocking(true).map_err(|e| network("listen at", e))?;
            listener = Some(listening);
            wires.resize_with(world as usize, || None);
        }
        let pair = UnixStream::pair().and_then(|(wake, woken)| {
            wake.set_nonblocking(true)?;
            woken.set_nonblocking(true)?;
            Ok((wake, woken))
        });
        let (wake, woken) = pair.map_err(|e| network("make a socket pair for", e))?;
        let (asks, asked) = mpsc::channel();
        let (failure, signs) = (Arc::new(OnceLock::new()), Arc::new(Signs::new(world)));
        let hub = Hub {
            rank,
            world,
            deadline,
            address: address.clone(),
            mark,
            failure: failure.clone(),
            signs: signs.clone(),
            known: vec![(0, false); world as usize],
            beat: start,
            heard: start,
            asks: asked,
            woken: Some(woken),
            listener,
            arrivals: VecDeque::new(),
            wires,
            left: vec![false; world as usize],
            turn: 1,
            since: start,
            messages: vec![None; world as usize],
            asked: VecDeque::new(),
            told: false,
        };
        let thread = std::thread::Builder::new().name(format!("fst-control-{rank}"));
        let thread =
            thread.spawn(move || hub.run()).map_err(|e| network("start a thread for", e))?;
        let thread = Some(thread);
        let control = Self { rank, world, deadline, failure, signs, asks, wake, thread };
        // All have come once rank 0 says so.
        control.barrier()?;
        Ok(control)
    }

    /// As [`from_env`](Self::from_env), for a job without a name.
    ///
    /// # Errors
    /// As for [`from_env`](Self::from_env).
    pub fn join(
        rank: u32,
        world: u32,
        address: &str,
        port: u16,
        deadline: Duration,
    ) -> Result<Self, GroupError> {
        Self::from_env(&LaunchEnv::new(rank, world, address, port), deadline)
    }

    fn wake(&self) {
        // If there is no room, bytes that wake are under way.
        let _ = (&self.wake).write(&[0]);
    }
}

fn mark(job: &str) -> [u8; 8] {
    let named = || {
        let digest = Sha256::new().chain_update(MARK).chain_update(job).finalize();
        digest.first_chunk().copied().unwrap_or(MARK)
    };
    if job.is_empty() { MARK } else { named() }
}

/// The failure that a frame tells of.
fn failure(kind: u8, body: &[u8]) -> GroupError {
    let (rank, cause) = body.split_first_chunk().unwrap_or((&[0; 4], &[]));
    let (rank, cause) = (u32::from_le_bytes(*rank), String::from_utf8_lossy(cause).into_owned());
    match kind {
        ABORT => GroupError::Aborted { rank, cause },
        _ => GroupError::Lost { rank, cause },
    }
}

/// A list of byte strings, each with its length before it.
fn join_list(list: &[Vec<u8>]) -> Vec<u8> {
    let item = |item: &Vec<u8>| [&(item.len() as u32).to_le_bytes(), &item[..]].concat();
    list.iter().flat_map(item).collect()
}

fn split_list(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut list = Vec::new();
    while let Some((len, rest)) = bytes.split_first_chunk::<4>() {
        let (item, rest) = rest.split_at(rest.len().min(u32::from_le_bytes(*len) as usize));
        list.push(item.to_vec());
        bytes = rest;
    }
    list
}

/// What the thread of a control owns.
struct Hub {
    rank: u32,
    world: u32,
    deadline: Duration,
    address: String,
    mark: [u8; 8],
    failure: Arc<OnceLock<GroupError>>,
    signs: Arc<Signs>,
    /// Signs that are told, and when they were looked at.
    known: Vec<(u64, bool)>,
    beat: Instant,
    /// When rank 0 was heard of, on others.
    heard: Instant,
    asks: Receiver<Ask>,
    /// Until this rank leaves.
    woken: Option<UnixStream>,
    /// Where ranks arrive, until all have.
    listener: Option<TcpListener>,
    /// Who has connected and is not known as a rank yet. None of them is waited for.
    arrivals: VecDeque<Wire>,
    /// On rank 0 the connections to all others by rank; on others the one to rank 0.
    wires: Vec<Option<Wire>>,
    left: Vec<bool>,
    /// The gathering that is due, and since when a rank waits for it: the first one from the beginning.
    turn: u64,
    since: Instant,
    /// What has come for it, by rank; all but a rank's own come to rank 0 only.
    messages: Vec<Option<Vec<u8>>>,
    /// What this rank wants: the gathering that is due, and those after it.
    asked: VecDeque<Ask>,
    /// Whether the others know of the failure.
    told: bool,
}

impl Hub {
    fn run(mut self) {
        let mut moved = Instant::now();
        // What came with the welcome.
        (0..self.wires.len()).for_each(|peer| self.hear(peer));
        loop {
            let mut timeout = None;
            if self.leaving() {
                let left = FAREWELL.saturating_sub(moved.elapsed());
                if left.is_zero() || self.wires.iter().all(Option::is_none) {
                    return;
                }
                timeout = Some(left);
            } else if self.failure.get().is_none() {
                timeout = self.judge().into_iter().chain(self.beat()).min();
            }
            if let Some(error) = self.failure.get() {
                self.tell(error.clone());
            }
            let mut ready = wait(self.interests(), timeout).into_iter();
            let mut ready = || ready.next().unwrap_or(false);
            let woken = self.woken.is_some() && ready();
            for peer in 0..self.wires.len() {
                if let Some(wire) = &mut self.wires[peer]
                    && ready()
                {
                    let had = wire.input.len();
                    if wire.pump() {
                        moved = Instant::now();
                    }
                    if wire.input.len() > had {
                        self.heard = moved;
                        // Messages may be long. Who joins has the deadline to do so in all, and what rank
                        // 0 passes on is no sign of its own.
                        if self.rank == 0 && self.turn > 1 {
                            self.signs.alive(peer as u32);
                        }
                    }
                    self.hear(peer);
                }
            }
            for mut wire in std::mem::take(&mut self.arrivals) {
                if ready() {
                    wire.pump();
                }
                self.greet(wire);
            }
            if ready() {
                self.accept();
            }
            if woken {
                self.wake();
                moved = Instant::now();
            }
        }
    }

    /// In the order of [`run`](Self::run).
    fn interests(&self) -> Vec<PollFd<'_>> {
        let mut fds: Vec<PollFd<'_>> = Vec::new();
        fds.extend(self.woken.iter().map(|woken| PollFd::new(woken, PollFlags::IN)));
        fds.extend(self.wires.iter().flatten().chain(&self.arrivals).map(Wire::interest));
        fds.extend(self.listener.iter().map(|listener| PollFd::new(listener, PollFlags::IN)));
        fds
    }

    fn leaving(&self) -> bool {
        self.woken.is_none()
    }

    /// The first error counts; [`run`](Self::run) tells it.
    fn fail(&self, error: GroupError) {
        let _ = self.failure.set(error);
    }

    fn lost(&self, rank: u32, cause: impl Into<String>) {
        self.fail(GroupError::Lost { rank, cause: cause.into() });
    }

    /// For which ranks the gathering that is due waits, if one waits for it: on rank 0 all others whose
    /// messages it lacks, elsewhere rank 0.
    fn missing(&self) -> impl Iterator<Item = u32> {
        let waits = self.messages.iter().any(Option::is_some);
        let lacks = |rank: &u32| match self.rank {
            0 => self.messages[*rank as usize].is_none(),
            _ => *rank == 0,
        };
        (0..self.world).filter(move |rank| waits && lacks(rank))
    }

    /// Fails if what a gathering waits for will not come, or does not in time; else how long that may take.
    fn judge(&self) -> Option<Duration> {
        let missing: Vec<u32> = self.missing().collect();
        if let Some(&rank) = missing.iter().find(|&&rank| self.left[rank as usize]) {
            self.lost(rank, "it left the group");
        }
        let left = match (self.rank, self.turn) {
            _ if missing.is_empty() => return None,
            (0, _) => self.signs.patience(&missing, self.since, self.deadline),
            // Rank 0 tells who is silent, unless it is itself.
            (_, 1) => self.signs.patience(&[], self.since, self.deadline),
            _ => self.signs.patience(&[], self.since.max(self.heard), self.deadline),
        };
        if let Err(silent) = left {
            let op = if self.turn == 1 { "joining" } else { "gather" };
            let rank = self.messages.iter().position(Option::is_some).unwrap_or(0) as u32;
            let (waiting_for, waited) = (silent.or(missing.first().copied()), self.deadline);
            self.fail(GroupError::Deadline { op, rank, waiting_for, waited });
        }
        left.ok()
    }

    /// Tells signs of life if it is time to; how long until it is again.
    fn beat(&mut self) -> Option<Duration> {
        let interval = (self.deadline / BEATS).max(LEAST_BEAT);
        let left = interval.saturating_sub(self.beat.elapsed());
        if self.wires.is_empty() || !left.is_zero() {
            return (!self.wires.is_empty()).then_some(left);
        }
        self.beat = Instant::now();
        let ranks = if self.rank == 0 { 0..self.world } else { self.rank..self.rank + 1 };
        let mut news = Vec::new();
        for (rank, known) in ranks.clone().zip(&mut self.known[ranks.start as usize..]) {
            let now = self.signs.of(rank);
            if std::mem::replace(known, now) != now {
                news.extend(rank.to_le_bytes());
                news.push(now.1.into());
            }
        }
        if !news.is_empty() || self.rank == 0 && self.missing().next().is_some() {
            let word = frame(SIGNS, &[&news]);
            self.wires.iter_mut().flatten().for_each(|wire| wire.queue_unless_full(&word));
        }
        Some(interval)
    }

    /// Tells those that this rank is connected to of a failure, once, and gives up on all gatherings.
    fn tell(&mut self, error: GroupError) {
        self.asked.clear();
        if std::mem::replace(&mut self.told, true) {
            return;
        }
        let (kind, rank, cause) = match error {
            GroupError::Aborted { rank, cause } => (ABORT, rank, cause),
            GroupError::Lost { rank, cause } => (LOST, rank, cause),
            other => (ABORT, self.rank, other.to_string()),
        };
        let cause = &cause.as_bytes()[..cause.len().min(CAUSE)];
        let word = frame(kind, &[&rank.to_le_bytes(), cause]);
        let wires = self.wires.iter_mut().flatten().chain(&mut self.arrivals);
        wires.for_each(|wire| wire.queue(word.clone()));
        self.listener = None;
        self.messages.fill(None);
    }

    /// Hears what this rank wants of its thread.
    fn wake(&mut self) {
        match self.woken.as_mut().map(|woken| woken.read(&mut [0; 64])) {
            Some(Ok(0)) => {
                if let Some(error) = self.failure.get() {
                    self.tell(error.clone());
                }
                self.woken = None;
                self.listener = None;
                self.arrivals.clear();
                let bye = frame(BYE, &[]);
                for wire in self.wires.iter_mut().flatten() {
                    wire.queue(bye.clone());
                    wire.close();
                }
            }
            _ => {
                let idle = self.asked.is_empty();
                self.asked.extend(self.asks.try_iter());
                if idle {
                    self.begin();
                }
            }
        }
    }

    /// Gives this rank's message for the gathering that is due, if it wants that.
    fn begin(&mut self) {
        let Some(ask) = self.asked.front_mut() else { return };
        if self.failure.get().is_some() {
            return;
        }
        let message = std::mem::take(&mut ask.message);
        if self.rank == 0 {
            return self.put(0, message);
        }
        let word = frame(GATHER, &[&self.turn.to_le_bytes(), &message]);
        self.wires.iter_mut().flatten().for_each(|wire| wire.queue(word.clone()));
        // Rank 0 has it; here it stands for the wait.
        self.put(self.rank, Vec::new());
    }

    /// Puts a message of `rank` into the gathering that is due.
    fn put(&mut self, rank: u32, message: Vec<u8>) {
        if self.turn > 1 && self.messages.iter().all(Option::is_none) {
            self.since = Instant::now();
        }
        self.messages[rank as usize] = Some(message);
        if self.rank != 0 || self.messages.iter().any(Option::is_none) {
            return;
        }
        let bytes = self.held();
        if bytes > LONGEST - 8 {
            return self.fail(GroupError::MessageSize { rank: 0, bytes, most: LONGEST - 8 });
        }
        let all: Vec<Vec<u8>> = self.messages.iter_mut().filter_map(Option::take).collect();
        let word = frame(RESULT, &[&self.turn.to_le_bytes(), &join_list(&all)]);
        self.wires.iter_mut().flatten().for_each(|wire| wire.queue(word.clone()));
        self.answer(all);
    }

    /// Bytes of all that has come for the gathering that is due, as they are sent.
    fn held(&self) -> usize {
        self.messages.iter().flatten().map(|message| 4 + message.len()).sum()
    }

    /// Ends the gathering that is due, and begins the next if this rank wants one.
    fn answer(&mut self, all: Vec<Vec<u8>>) {
        self.messages.fill(None);
        self.turn += 1;
        if let Some(ask) = self.asked.pop_front() {
            let _ = ask.answer.send(all);
        }
        self.begin();
    }

    /// Takes in who has connected.
    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        match listener.accept() {
            Ok((stream, _)) => {
                self.arrivals.extend(Wire::new(stream));
                if self.arrivals.len() > self.world as usize + STRANGERS {
                    self.arrivals.pop_front();
                }
            }
            Err(error) => match error.kind() {
                // The peer is gone again, or a signal came.
                ErrorKind::WouldBlock | ErrorKind::ConnectionAborted | ErrorKind::Interrupted => {}
                _ => {
                    let (what, address) = ("accept at", self.address.clone());
                    self.fail(GroupError::Network { what, address, source: Arc::new(error) });
                }
            },
        }
    }

    /// Finds out who has connected. Whoever does not show the job's mark is no rank of ours.
    fn greet(&mut self, mut wire: Wire) {
        // Once all ranks are there nobody else has a place.
        if self.listener.is_none() && self.failure.get().is_none() {
            return;
        }
        let shown = wire.input.len().min(MARK.len());
        if wire.ended.is_some() || wire.input[..shown] != self.mark[..shown] {
            return;
        }
        if self.failure.get().is_some() {
            wire.input.truncate(HELLO);
        }
        if wire.input.len() < HELLO || self.failure.get().is_some() {
            return self.arrivals.push_back(wire);
        }
        let number = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| wire.input[at + i]));
        let (peer, theirs) = (number(8), number(12));
        if theirs != self.world {
            self.fail(GroupError::WorldSizes { rank: peer, theirs, ours: self.world });
            // It is told so.
            return self.arrivals.push_back(wire);
        }
        match self.wires.get_mut(peer as usize) {
            Some(place) if peer != 0 && place.is_none() => {
                wire.input.drain(..HELLO);
                wire.queue(frame(WELCOME, &[]));
                *place = Some(wire);
                if self.wires[1..].iter().all(Option::is_some) {
                    self.listener = None;
                    self.arrivals.clear();
                }
                self.hear(peer as usize);
            }
            _ => {
                self.fail(GroupError::RankTaken { rank: peer });
                self.arrivals.push_back(wire);
            }
        }
    }

    /// Takes the frames that have come whole on a connection.
    fn hear(&mut self, at: usize) {
        let peer = at as u32;
        while self.failure.get().is_none()
            && let Some((kind, len)) = self.wires[at].as_ref().and_then(Wire::head)
        {
            if let Err(error) = self.check(peer, kind, len) {
                self.fail(error);
                break;
            }
            let Some(body) = self.wires[at].as_mut().and_then(|wire| wire.take(len)) else { break };
            self.frame(peer, kind, &body);
        }
        let over = self.failure.get().is_some() || self.leaving();
        let Some(wire) = &mut self.wires[at] else { return };
        if over {
            wire.input.clear();
        }
        if let Some(cause) = wire.ended.take() {
            self.wires[at] = None;
            if !self.left[at] && !over {
                self.lost(peer, cause);
            }
        }
    }

    /// Refuses frames that are not due, or longer than they can be.
    fn check(&self, peer: u32, kind: u8, len: usize) -> Result<(), GroupError> {
        let due = match kind {
            GATHER => self.rank == 0 && self.messages[peer as usize].is_none(),
            RESULT => self.rank != 0 && !self.asked.is_empty(),
            ABORT | LOST | BYE | SIGNS => true,
            _ => false,
        };
        let range = match kind {
            GATHER | RESULT => 8..=LONGEST,
            BYE => 0..=0,
            SIGNS => 0..=SIGN * self.world as usize,
            _ => 4..=4 + CAUSE,
        };
        if !due || !range.contains(&len) {
            let cause = format!("it sent a frame that is not due: of kind {kind} and {len} bytes");
            return Err(GroupError::Lost { rank: peer, cause });
        }
        // With its length in the place of the number.
        let bytes = self.held() + len.saturating_sub(4);
        if kind == GATHER && bytes > LONGEST - 8 {
            return Err(GroupError::MessageSize { rank: 0, bytes, most: LONGEST - 8 });
        }
        Ok(())
    }

    /// Takes signs of life: rank 0 of who sends them, others of all from rank 0.
    fn heed(&self, peer: u32, body: &[u8]) {
        for sign in body.chunks_exact(SIGN) {
            let rank = u32::from_le_bytes([sign[0], sign[1], sign[2], sign[3]]);
            if rank != self.rank && (self.rank != 0 || rank == peer) {
                self.signs.heard(rank, sign[4] == 1);
            }
        }
    }

    /// Does what a frame says.
    fn frame(&mut self, peer: u32, kind: u8, body: &[u8]) {
        if kind == SIGNS {
            return self.heed(peer, body);
        }
        match (kind, body.split_first_chunk()) {
            (GATHER | RESULT, Some((turn, rest))) => match u64::from_le_bytes(*turn) {
                turn if turn != self.turn => {
                    let due = self.turn;
                    self.lost(peer, format!("it is at gathering {turn} where {due} is due"));
                }
                _ if kind == GATHER => self.put(peer, rest.to_vec()),
                _ => self.answer(split_list(rest)),
            },
            (BYE, _) => self.left[peer as usize] = true,
            // Rank 0 thereby tells the others.
            _ => self.fail(failure(kind, body)),
        }
    }
}

impl Control for TcpControl {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn world_size(&self) -> u32 {
        self.world
    }

    fn deadline(&self) -> Duration {
        self.deadline
    }

    fn signs(&self) -> &Signs {
        &self.signs
    }

    fn gather_messages(&self, message: &[u8]) -> Result<Vec<Vec<u8>>, GroupError> {
        let (rank, bytes, most) = (self.rank, message.len(), LONGEST - 8);
        if bytes > most {
            let _ = self.failure.set(GroupError::MessageSize { rank, bytes, most });
            self.wake();
        }
        if self.failure.get().is_none() {
            let _waiting = self.signs.wait(self.rank);
            let (answer, answered) = mpsc::channel();
            let _ = self.asks.send(Ask { message: message.to_vec(), answer });
            self.wake();
            if let Ok(all) = answered.recv() {
                return Ok(all);
            }
        }
        let gone = || GroupError::Lost { rank: self.rank, cause: "its control ended".to_owned() };
        Err(self.failure.get_or_init(gone).clone())
    }

    fn abort(&self, cause: &str) {
        let _ = self.failure.set(GroupError::Aborted { rank: self.rank, cause: cause.to_owned() });
        self.wake();
    }

    fn failure(&self) -> Option<GroupError> {
        self.failure.get().cloned()
    }
}

impl Drop for TcpControl {
    /// Says goodbye, and ends thread and sockets.
    fn drop(&mut self) {
        if std::thread::panicking() {
            let cause = "its thread panicked".to_owned();
            let _ = self.failure.set(GroupError::Lost { rank: self.rank, cause });
        }
        let _ = self.wake.shutdown(std::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
