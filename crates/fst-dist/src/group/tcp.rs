//! Small messages and word of failures between processes, over TCP through rank 0.
//!
//! This carries unique ids, digests, barriers and aborts, never tensors. Every rank keeps a connection
//! to rank 0; a connection that ends without goodbye is a rank that is lost, which rank 0
//! tells the others. There is no authentication, as there is none in NCCL's own connections: use it
//! in networks that you trust.

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Control, LaunchEnv};
use crate::error::GroupError;

/// The first bytes of a connection, with a version.
const MAGIC: [u8; 8] = *b"fst-dist";

/// Frames longer than this are not ours, and are not sent.
const LONGEST: usize = 64 << 20;

/// Connections beyond those of the ranks that may be open while ranks join; the oldest goes first.
const STRANGERS: usize = 64;

/// The shortest time in which to connect.
const LEAST: Duration = Duration::from_millis(1);

const GATHER: u8 = 1;
const RESULT: u8 = 2;
const ABORT: u8 = 3;
const LOST: u8 = 4;
const BYE: u8 = 5;

/// One rank's connection to the others.
#[derive(Debug)]
pub struct TcpControl {
    shared: Arc<Shared>,
    /// How often this rank has gathered.
    turn: Mutex<u64>,
}

#[derive(Debug)]
struct Shared {
    rank: u32,
    world: u32,
    deadline: Duration,
    state: Mutex<State>,
    wake: Condvar,
    /// On rank 0 the connections to all others by rank; on others the one to rank 0.
    peers: Vec<Option<Mutex<TcpStream>>>,
}

#[derive(Debug, Default)]
struct State {
    failure: Option<GroupError>,
    /// On rank 0: messages by turn and rank.
    gathers: HashMap<u64, Vec<Option<Vec<u8>>>>,
    results: HashMap<u64, Vec<Vec<u8>>>,
    left: Vec<bool>,
    /// Whether a failure is being told to the others.
    telling: bool,
    /// Connections that have not ended.
    open: usize,
}

impl TcpControl {
    /// Joins the ranks that the environment tells of.
    ///
    /// # Errors
    /// As for [`join`](Self::join).
    pub fn from_env(env: &LaunchEnv, deadline: Duration) -> Result<Self, GroupError> {
        Self::join(env.rank, env.world, &env.address, env.port, deadline)
    }

    /// Meets the other ranks: rank 0 listens at the address and port, the others connect. All ranks that
    /// are to come must do so within the deadline, whatever strangers connect meanwhile. Where the address
    /// is not one of this machine (that of a gateway, say), give rank 0 one that is, or `0.0.0.0`.
    ///
    /// # Errors
    /// The address does not resolve, the port cannot be listened at, a rank does not come in time, two
    /// processes claim one rank or world sizes differ.
    pub fn join(
        rank: u32,
        world: u32,
        address: &str,
        port: u16,
        deadline: Duration,
    ) -> Result<Self, GroupError> {
        if rank >= world {
            return Err(GroupError::Peer { peer: rank, rank, world });
        }
        let network = |what, source: io::Error| GroupError::Network {
            what,
            address: format!("{address}:{port}"),
            source: Arc::new(source),
        };
        let resolved = (address, port).to_socket_addrs().map_err(|e| network("resolve", e))?;
        let resolved: Vec<SocketAddr> = resolved.collect();
        let start = Instant::now();
        let mut streams: Vec<Option<TcpStream>> = (0..world).map(|_| None).collect();
        if world == 1 {
            // Nobody to meet.
        } else if rank == 0 {
            let listener = TcpListener::bind(&resolved[..]).map_err(|e| network("listen at", e))?;
            listener.set_nonblocking(true).map_err(|e| network("listen at", e))?;
            // Who has connected and not said yet who it is. None of them is waited for: strangers that say
            // nothing must not use up the deadline of the others.
            let mut arrivals: VecDeque<Arrival> = VecDeque::new();
            while let Some(missing) = (1..world).find(|&r| streams[r as usize].is_none()) {
                if start.elapsed() > deadline {
                    let (op, waiting_for) = ("joining", Some(missing));
                    return Err(GroupError::Deadline { op, rank, waiting_for, waited: deadline });
                }
                let mut idle = true;
                match listener.accept() {
                    Ok((stream, _)) => {
                        idle = false;
                        arrivals.extend(Arrival::new(stream));
                        if arrivals.len() > world as usize + STRANGERS {
                            arrivals.pop_front();
                        }
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    // The peer is gone again, or a signal came.
                    Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) => return Err(network("accept at", error)),
                }
                for _ in 0..arrivals.len() {
                    let Some(arrival) = arrivals.pop_front() else { break };
                    let (stream, peer, theirs) = match arrival.greeted() {
                        Greeting::Rank(stream, peer, theirs) => (stream, peer, theirs),
                        Greeting::More(arrival) => {
                            arrivals.push_back(arrival);
                            continue;
                        }
                        // Whoever does not speak the language is no rank of ours.
                        Greeting::Stranger => continue,
                    };
                    if theirs != world {
                        return Err(GroupError::WorldSizes { rank: peer, theirs, ours: world });
                    }
                    match streams.get_mut(peer as usize) {
                        Some(place) if peer != 0 && place.is_none() => *place = Some(stream),
                        _ => return Err(GroupError::RankTaken { rank: peer }),
                    }
                }
                if idle {
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        } else {
            let mut hello = MAGIC.to_vec();
            hello.extend(rank.to_le_bytes());
            hello.extend(world.to_le_bytes());
            let stream = loop {
                // Rank 0 may come later; one that does not answer must not use up more than the deadline.
                let left = || deadline.saturating_sub(start.elapsed()).max(LEAST);
                let connect = |address| TcpStream::connect_timeout(address, left());
                let none = || io::Error::new(ErrorKind::NotFound, "the name has no address");
                let tried = resolved.iter().map(connect).reduce(|one, other| one.or(other));
                match tried.unwrap_or_else(|| Err(none())) {
                    Ok(stream) => break stream,
                    Err(error) if start.elapsed() >= deadline => {
                        return Err(network("connect to", error));
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(20)),
                }
            };
            (&stream).write_all(&hello).map_err(|e| network("write to", e))?;
            streams[0] = Some(stream);
        }
        let mut peers = Vec::new();
        let mut readers = Vec::new();
        for (peer, stream) in (0u32..).zip(streams) {
            let Some(stream) = stream else {
                peers.push(None);
                continue;
            };
            let prepared = stream
                .set_nodelay(true)
                .and_then(|()| stream.set_write_timeout(Some(deadline.max(Duration::from_secs(1)))))
                .and_then(|()| stream.try_clone());
            readers.push((peer, prepared.map_err(|e| network("prepare", e))?));
            peers.push(Some(Mutex::new(stream)));
        }
        let state =
            State { left: vec![false; world as usize], open: readers.len(), ..State::default() };
        let (state, wake) = (Mutex::new(state), Condvar::new());
        let shared = Arc::new(Shared { rank, world, deadline, state, wake, peers });
        // From here on, an early end closes the sockets and so ends the threads.
        let control = Self { shared, turn: Mutex::new(0) };
        for (peer, stream) in readers {
            let shared = control.shared.clone();
            std::thread::Builder::new()
                .name(format!("fst-rank-{peer}"))
                .spawn(move || shared.listen(peer, stream))
                .map_err(|e| network("start a thread for", e))?;
        }
        // All have come once rank 0 says so.
        control.barrier()?;
        Ok(control)
    }
}

/// A connection that has not said yet who it is.
struct Arrival {
    stream: TcpStream,
    hello: [u8; 16],
    have: usize,
}

enum Greeting {
    /// A rank, and the world size that it knows.
    Rank(TcpStream, u32, u32),
    More(Arrival),
    Stranger,
}

impl Arrival {
    fn new(stream: TcpStream) -> Option<Self> {
        stream.set_nonblocking(true).ok()?;
        Some(Self { stream, hello: [0; 16], have: 0 })
    }

    /// Reads what is there of who it is.
    fn greeted(mut self) -> Greeting {
        while self.have < self.hello.len() {
            match (&self.stream).read(&mut self.hello[self.have..]) {
                Ok(0) => return Greeting::Stranger,
                Ok(read) => self.have += read,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Greeting::More(self),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Greeting::Stranger,
            }
        }
        let (magic, numbers) = self.hello.split_at(8);
        let number = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| numbers[at + i]));
        if magic != MAGIC || self.stream.set_nonblocking(false).is_err() {
            return Greeting::Stranger;
        }
        Greeting::Rank(self.stream, number(0), number(4))
    }
}

fn read_frame(stream: &mut TcpStream) -> io::Result<(u8, Vec<u8>)> {
    let mut head = [0; 5];
    stream.read_exact(&mut head)?;
    let len = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if len > LONGEST {
        return Err(ErrorKind::InvalidData.into());
    }
    let mut body = vec![0; len];
    stream.read_exact(&mut body)?;
    Ok((head[0], body))
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

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, peer: u32, kind: u8, body: &[u8]) -> io::Result<()> {
        let Some(Some(stream)) = self.peers.get(peer as usize) else { return Ok(()) };
        let mut frame = vec![kind];
        frame.extend((body.len() as u32).to_le_bytes());
        frame.extend(body);
        stream.lock().unwrap_or_else(PoisonError::into_inner).write_all(&frame)
    }

    /// Refuses what does not fit into a frame with the number of its turn.
    fn check_size(&self, bytes: usize) -> Result<(), GroupError> {
        let (rank, most) = (self.rank, LONGEST - 8);
        if bytes > most { Err(GroupError::MessageSize { rank, bytes, most }) } else { Ok(()) }
    }

    /// Breaks the group and tells those that this rank is connected to. Never called under the lock.
    fn fail(&self, error: GroupError) -> GroupError {
        let mut state = self.lock();
        if let Some(first) = &state.failure {
            return first.clone();
        }
        state.failure = Some(error.clone());
        // Woken threads may want to leave: not before the others are told.
        state.telling = true;
        self.wake.notify_all();
        drop(state);
        let (kind, rank, cause) = match &error {
            GroupError::Aborted { rank, cause } => (ABORT, *rank, cause.clone()),
            GroupError::Lost { rank, cause } => (LOST, *rank, cause.clone()),
            other => (ABORT, self.rank, other.to_string()),
        };
        let body = [&rank.to_le_bytes(), cause.as_bytes()].concat();
        for peer in 0..self.world {
            // A rank that cannot be told notices the connection's end.
            let _ = self.send(peer, kind, &body);
        }
        self.lock().telling = false;
        self.wake.notify_all();
        error
    }

    /// Waits, a moment at most, until a failure is known or all connections have ended.
    fn wait_for_the_end(&self) {
        let open = |state: &mut State| state.failure.is_none() && state.open > 0;
        let _ = self.wake.wait_timeout_while(self.lock(), Duration::from_secs(5), open);
    }

    /// Puts a message of `rank` into its turn; on rank 0 only.
    fn put(&self, turn: u64, rank: u32, message: Vec<u8>) {
        let mut state = self.lock();
        let slots = state.gathers.entry(turn).or_insert_with(|| vec![None; self.world as usize]);
        slots[rank as usize] = Some(message);
        if slots.iter().any(Option::is_none) {
            drop(state);
            return self.check_left();
        }
        let all: Vec<Vec<u8>> =
            state.gathers.remove(&turn).into_iter().flatten().flatten().collect();
        drop(state);
        if let Err(error) = self.check_size(all.iter().map(|message| 4 + message.len()).sum()) {
            self.fail(error);
            return;
        }
        let body = [&turn.to_le_bytes()[..], &join_list(&all)].concat();
        // Before this rank sees the result: it may leave at once.
        for peer in 1..self.world {
            if let Err(error) = self.send(peer, RESULT, &body) {
                self.fail(GroupError::Lost { rank: peer, cause: error.to_string() });
            }
        }
        self.lock().results.insert(turn, all);
        self.wake.notify_all();
    }

    /// Fails if a gathering waits for a rank that said goodbye.
    fn check_left(&self) {
        let state = self.lock();
        let missing = |slots: &Vec<Option<Vec<u8>>>| {
            (0..self.world).find(|&r| slots[r as usize].is_none() && state.left[r as usize])
        };
        let lost = state.gathers.values().find_map(missing);
        let lost = lost.or_else(|| (self.rank != 0 && state.left[0]).then_some(0));
        drop(state);
        if let Some(rank) = lost {
            self.fail(GroupError::Lost { rank, cause: "it left the group".to_owned() });
        }
    }

    /// The life of one connection's reading thread.
    fn listen(&self, peer: u32, mut stream: TcpStream) {
        loop {
            let frame = read_frame(&mut stream);
            let number = |body: &[u8]| body.first_chunk().map_or(0, |n| u64::from_le_bytes(*n));
            match frame {
                Ok((GATHER, body)) if self.rank == 0 && body.len() >= 8 => {
                    self.put(number(&body), peer, body[8..].to_vec());
                }
                Ok((RESULT, body)) if body.len() >= 8 => {
                    self.lock().results.insert(number(&body), split_list(&body[8..]));
                    self.wake.notify_all();
                }
                Ok((kind @ (ABORT | LOST), body)) if body.len() >= 4 => {
                    let rank = u32::from_le_bytes([body[0], body[1], body[2], body[3]]);
                    let cause = String::from_utf8_lossy(&body[4..]).into_owned();
                    // Rank 0 thereby tells the others.
                    self.fail(match kind {
                        ABORT => GroupError::Aborted { rank, cause },
                        _ => GroupError::Lost { rank, cause },
                    });
                }
                Ok((BYE, _)) => {
                    self.lock().left[peer as usize] = true;
                    self.check_left_if_waiting();
                }
                other => {
                    let mut state = self.lock();
                    state.open -= 1;
                    let silent = state.left[peer as usize] || state.left[self.rank as usize];
                    self.wake.notify_all();
                    drop(state);
                    if !silent {
                        let cause = match other {
                            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                                "its connection ended".to_owned()
                            }
                            Err(error) => error.to_string(),
                            Ok((kind, _)) => format!("it sent a frame of unknown kind {kind}"),
                        };
                        self.fail(GroupError::Lost { rank: peer, cause });
                    }
                    return;
                }
            }
        }
    }

    /// A goodbye of rank 0 matters to a rank only once it waits for something.
    fn check_left_if_waiting(&self) {
        self.wake.notify_all();
        if self.rank == 0 {
            self.check_left();
        }
    }
}

impl Control for TcpControl {
    fn rank(&self) -> u32 {
        self.shared.rank
    }

    fn world_size(&self) -> u32 {
        self.shared.world
    }

    fn deadline(&self) -> Duration {
        self.shared.deadline
    }

    fn gather_messages(&self, message: &[u8]) -> Result<Vec<Vec<u8>>, GroupError> {
        let shared = &self.shared;
        if let Some(error) = self.failure() {
            return Err(error);
        }
        shared.check_size(message.len()).map_err(|error| shared.fail(error))?;
        let mut turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        *turn += 1;
        let turn = *turn;
        if shared.rank == 0 {
            shared.put(turn, 0, message.to_vec());
        } else {
            let body = [&turn.to_le_bytes(), message].concat();
            if let Err(error) = shared.send(0, GATHER, &body) {
                // The reading thread may know better why, and ends with the connection.
                shared.wait_for_the_end();
                return Err(shared.fail(GroupError::Lost { rank: 0, cause: error.to_string() }));
            }
        }
        let start = Instant::now();
        let mut state = shared.lock();
        loop {
            if let Some(result) = state.results.remove(&turn) {
                return Ok(result);
            }
            if let Some(error) = &state.failure {
                return Err(error.clone());
            }
            if shared.rank != 0 && state.left[0] {
                drop(state);
                let cause = "it left the group".to_owned();
                return Err(shared.fail(GroupError::Lost { rank: 0, cause }));
            }
            let left = shared.deadline.saturating_sub(start.elapsed());
            if left.is_zero() {
                let slots = state.gathers.get(&turn);
                let missing = slots.and_then(|slots| slots.iter().position(Option::is_none));
                let waiting_for = missing.map(|rank| rank as u32);
                drop(state);
                let (op, rank, waited) = ("gather", shared.rank, shared.deadline);
                let error = GroupError::Deadline { op, rank, waiting_for, waited };
                return Err(shared.fail(error));
            }
            let woken = shared.wake.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn abort(&self, cause: &str) {
        let rank = self.shared.rank;
        self.shared.fail(GroupError::Aborted { rank, cause: cause.to_owned() });
    }

    fn failure(&self) -> Option<GroupError> {
        self.shared.lock().failure.clone()
    }
}

impl Drop for TcpControl {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let (rank, cause) = (self.shared.rank, "its thread panicked".to_owned());
            self.shared.fail(GroupError::Lost { rank, cause });
        }
        let mut state = self.shared.lock();
        while state.telling {
            state = self.shared.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.left[self.shared.rank as usize] = true;
        drop(state);
        for peer in 0..self.shared.world {
            let _ = self.shared.send(peer, BYE, &[]);
        }
        for stream in self.shared.peers.iter().flatten() {
            let stream = stream.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = stream.shutdown(std::net::Shutdown::Write);
        }
        // Closing with unread bytes would reset the connection under what was just written: give the
        // others a moment to say goodbye too.
        let start = Instant::now();
        let mut state = self.shared.lock();
        let moment = Duration::from_millis(500);
        while state.open > 0 && start.elapsed() < moment {
            let left = moment.saturating_sub(start.elapsed());
            let woken = self.shared.wake.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
