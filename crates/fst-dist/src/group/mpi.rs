//! A group over MPI: host ranks on any number of machines.
//!
//! MPI carries the bytes; this file adds what MPI lacks: deadlines, and errors that reach every rank
//! by name. All waits poll, so that a word of abort (a message of its own tag) is seen at once. Bytes
//! travel through buffers of the group's own: MPI cannot take back a message that was started, so
//! after a failure such buffers are leaked rather than a caller's memory left in MPI's hands.
//!
//! A rank that is killed is noticed by `mpirun`, which names it and ends the others (Open MPI within a
//! second or two). Where it is told to let them live (`--enable-recovery`), they end at their deadline,
//! with an error that names the rank they waited for.

use std::collections::VecDeque;
use std::mem::ManuallyDrop;
use std::os::raw::{c_int, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mpi::Threading;
use mpi::environment::Universe;
use mpi::ffi;

use super::{Control, Group, Occupancy, Op, Signs, check_peers};
use crate::error::GroupError;
use crate::memory::{Dst, Space, Src};

/// Message tags.
const DATA: c_int = 1;
const SMALL: c_int = 2;
const ABORT: c_int = 3;
const SIGN: c_int = 4;

/// Long messages travel in pieces of this size, so that copies and transfers overlap.
const CHUNK: usize = 8 << 20;

/// Pieces of one message under way at a time.
const WINDOW: usize = 2;

/// How often a sign of life is told in the time that a deadline takes.
const BEATS: u32 = 16;

/// How long a failed group waits for the others before it gives up on an orderly end of MPI.
const FAREWELL: Duration = Duration::from_secs(2);

/// One rank of a group over MPI's world.
pub struct MpiGroup {
    calls: Mutex<Calls>,
    signs: Signs,
    rank: u32,
    world: u32,
    deadline: Duration,
    occupancy: Occupancy,
    universe: ManuallyDrop<Universe>,
}

impl std::fmt::Debug for MpiGroup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MpiGroup({} of {})", self.rank, self.world)
    }
}

/// Everything that touches MPI, under one lock: MPI is asked for serialised calls only.
struct Calls {
    comm: ffi::MPI_Comm,
    rank: u32,
    world: u32,
    failure: Option<GroupError>,
    /// Buffers to use again.
    pool: Vec<Vec<u8>>,
    /// What the others know of this rank's signs, when they were told, and the messages under way.
    told: (u64, bool),
    told_at: Instant,
    telling: Vec<Flight>,
}

// SAFETY: the raw communicator is used under the lock around `Calls` only, and MPI was initialised
// for calls from any one thread at a time.
unsafe impl Send for Calls {}

/// A transfer under way. The buffer is MPI's until the request is complete.
struct Flight {
    request: ffi::MPI_Request,
    buffer: ManuallyDrop<Vec<u8>>,
}

// SAFETY: as for `Calls`: requests are touched under its lock only.
unsafe impl Send for Flight {}

impl MpiGroup {
    /// Initialises MPI and joins its world; a rank that is waited for may be silent for `deadline`. MPI
    /// is finalised when the group is dropped; a process can do this once.
    ///
    /// # Errors
    /// MPI was initialised before, or gives no serialised calls from several threads.
    pub fn init(deadline: Duration) -> Result<Self, GroupError> {
        let Some((universe, threading)) = mpi::initialize_with_threading(Threading::Serialized)
        else {
            return Err(GroupError::MpiInit { why: "it was initialised before" });
        };
        if threading < Threading::Serialized {
            return Err(GroupError::MpiInit { why: "it allows one thread only" });
        }
        let mut calls = Calls {
            // SAFETY: MPI is initialised; the constants are then valid.
            comm: unsafe { ffi::RSMPI_COMM_NULL },
            rank: 0,
            world: 0,
            failure: None,
            pool: Vec::new(),
            told: (0, false),
            told_at: Instant::now(),
            telling: Vec::new(),
        };
        let (mut rank, mut world) = (0, 0);
        // SAFETY: MPI is initialised and the arguments point to locals. The group's messages live in
        // a communicator of their own.
        unsafe {
            let comm = ffi::RSMPI_COMM_WORLD;
            ok(
                "MPI_Comm_set_errhandler",
                ffi::MPI_Comm_set_errhandler(comm, ffi::RSMPI_ERRORS_RETURN),
            )?;
            ok("MPI_Comm_dup", ffi::MPI_Comm_dup(comm, &mut calls.comm))?;
            let errors = ffi::MPI_Comm_set_errhandler(calls.comm, ffi::RSMPI_ERRORS_RETURN);
            ok("MPI_Comm_set_errhandler", errors)?;
            ok("MPI_Comm_rank", ffi::MPI_Comm_rank(calls.comm, &mut rank))?;
            ok("MPI_Comm_size", ffi::MPI_Comm_size(calls.comm, &mut world))?;
        }
        (calls.rank, calls.world) = (rank as u32, world as u32);
        let (rank, world) = (calls.rank, calls.world);
        let universe = ManuallyDrop::new(universe);
        Ok(Self {
            calls: Mutex::new(calls),
            signs: Signs::new(world),
            rank,
            world,
            deadline,
            occupancy: Occupancy::default(),
            universe,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hears of signs of life and of failures, and tells of this rank's signs, if it is time to.
    fn hear(&self, calls: &mut Calls) -> Result<(), GroupError> {
        calls.hear_signs(&self.signs)?;
        calls.tell_signs(&self.signs, self.deadline / BEATS)?;
        calls.hear_abort()
    }

    /// Calls `step` until it is done, watching for aborts and the deadline. `step` lists those for whom it
    /// waits, nobody when it is done, and says whether anything moved.
    fn poll(
        &self,
        op: &'static str,
        mut step: impl FnMut(&mut Calls, &mut Vec<u32>) -> Result<bool, GroupError>,
    ) -> Result<(), GroupError> {
        let _waiting = self.signs.wait(self.rank);
        let (mut start, mut idle) = (Instant::now(), 0u32);
        let mut peers = Vec::new();
        loop {
            let mut calls = self.lock();
            self.hear(&mut calls)?;
            peers.clear();
            match step(&mut calls, &mut peers) {
                Ok(_) if peers.is_empty() => return Ok(()),
                Ok(true) => {
                    self.signs.alive(self.rank);
                    (start, idle) = (Instant::now(), 0);
                    continue;
                }
                Ok(false) => {}
                Err(error) => return Err(calls.fail(error)),
            }
            let (rank, waited) = (self.rank, self.deadline);
            self.signs.patience(&peers, start, waited).map_err(|waiting_for| {
                calls.fail(GroupError::Deadline { op, rank, waiting_for, waited })
            })?;
            drop(calls);
            // Ranks may outnumber cores: let others work, soon without burning this one.
            idle += 1;
            match idle {
                0..50 => std::thread::yield_now(),
                _ => std::thread::sleep(Duration::from_micros(100)),
            }
        }
    }
}

/// Turns an MPI error code into an error.
fn ok(call: &'static str, code: c_int) -> Result<(), GroupError> {
    if code == 0 {
        return Ok(());
    }
    let mut text = vec![0u8; 1024];
    let mut len = 0;
    // SAFETY: 1024 bytes exceed MPI_MAX_ERROR_STRING of the known implementations (256 and 512).
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast(), &mut len) };
    text.truncate(usize::try_from(len).unwrap_or(0));
    Err(GroupError::Mpi { call, code, text: String::from_utf8_lossy(&text).into_owned() })
}

impl Calls {
    fn buffer(&mut self, len: usize) -> Vec<u8> {
        let mut buffer = self.pool.pop().unwrap_or_default();
        buffer.resize(len.max(buffer.len()), 0);
        buffer
    }

    fn start_send(&mut self, to: u32, tag: c_int, bytes: &[u8]) -> Result<Flight, GroupError> {
        let mut buffer = self.buffer(bytes.len());
        buffer[..bytes.len()].copy_from_slice(bytes);
        let buffer = ManuallyDrop::new(buffer);
        // SAFETY: a constant of MPI, which is initialised.
        let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
        // SAFETY: the buffer is not moved, freed or written until the request is complete; a flight
        // that is dropped earlier leaks it.
        let code = unsafe {
            ffi::MPI_Isend(
                buffer.as_ptr().cast::<c_void>(),
                bytes.len() as c_int,
                ffi::RSMPI_UINT8_T,
                to as c_int,
                tag,
                self.comm,
                &mut request,
            )
        };
        ok("MPI_Isend", code)?;
        Ok(Flight { request, buffer })
    }

    /// Whether a transfer is complete; its buffer is then back in the caller's hands.
    fn test(&mut self, flight: &mut Flight) -> Result<bool, GroupError> {
        let mut done = 0;
        // SAFETY: the request is one that MPI gave and is not yet complete.
        let code =
            unsafe { ffi::MPI_Test(&mut flight.request, &mut done, ffi::RSMPI_STATUS_IGNORE) };
        ok("MPI_Test", code)?;
        Ok(done != 0)
    }

    fn recycle(&mut self, flight: Flight) {
        if self.pool.len() < 32 {
            self.pool.push(ManuallyDrop::into_inner(flight.buffer));
        }
    }

    /// Takes the next message of a tag from a rank, if one has come: its sender, length and the transfer.
    fn start_recv(
        &mut self,
        from: Option<u32>,
        tag: c_int,
    ) -> Result<Option<(u32, usize, Flight)>, GroupError> {
        let mut found = 0;
        // SAFETY: plain old data for MPI to fill.
        let mut status: ffi::MPI_Status = unsafe { std::mem::zeroed() };
        // SAFETY: MPI is initialised; the arguments point to locals. The matched message is received
        // below into a buffer as long as it, kept alive as in `start_send`.
        unsafe {
            let source = from.map_or(ffi::RSMPI_ANY_SOURCE, |rank| rank as c_int);
            let mut message = ffi::RSMPI_MESSAGE_NULL;
            let code =
                ffi::MPI_Improbe(source, tag, self.comm, &mut found, &mut message, &mut status);
            ok("MPI_Improbe", code)?;
            if found == 0 {
                return Ok(None);
            }
            let mut len = 0;
            ok("MPI_Get_count", ffi::MPI_Get_count(&status, ffi::RSMPI_UINT8_T, &mut len))?;
            let mut buffer = ManuallyDrop::new(self.buffer(len as usize));
            let mut request = ffi::RSMPI_REQUEST_NULL;
            let code = ffi::MPI_Imrecv(
                buffer.as_mut_ptr().cast::<c_void>(),
                len,
                ffi::RSMPI_UINT8_T,
                &mut message,
                &mut request,
            );
            ok("MPI_Imrecv", code)?;
            Ok(Some((status.MPI_SOURCE as u32, len as usize, Flight { request, buffer })))
        }
    }

    /// Whether a short message, which arrives with its envelope, has; one that has not is not waited
    /// for long.
    fn arrives(&mut self, flight: &mut Flight) -> Result<bool, GroupError> {
        let start = Instant::now();
        while start.elapsed() < FAREWELL {
            if self.test(flight)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Takes the signs of life that have come.
    fn hear_signs(&mut self, signs: &Signs) -> Result<(), GroupError> {
        while let Some((rank, len, mut flight)) = self.start_recv(None, SIGN)? {
            if self.arrives(&mut flight)? {
                signs.heard(rank, flight.buffer[..len] == [1]);
                self.recycle(flight);
            }
        }
        Ok(())
    }

    /// Tells the others of this rank's signs, if there are new ones and they have not been told for
    /// `interval`. While they have not taken the last ones, they are told no more.
    fn tell_signs(&mut self, signs: &Signs, interval: Duration) -> Result<(), GroupError> {
        let now = signs.of(self.rank);
        if now == self.told || self.told_at.elapsed() < interval || self.failure.is_some() {
            return Ok(());
        }
        for mut flight in std::mem::take(&mut self.telling) {
            match self.test(&mut flight)? {
                true => self.recycle(flight),
                false => self.telling.push(flight),
            }
        }
        if self.telling.is_empty() {
            (self.told, self.told_at) = (now, Instant::now());
            let rank = self.rank;
            for to in (0..self.world).filter(|&to| to != rank) {
                let flight = self.start_send(to, SIGN, &[now.1.into()])?;
                self.telling.push(flight);
            }
        }
        Ok(())
    }

    /// Fails if the group is broken, or another rank says so now.
    fn hear_abort(&mut self) -> Result<(), GroupError> {
        if self.failure.is_none()
            && let Some((rank, len, mut flight)) = self.start_recv(None, ABORT)?
        {
            self.arrives(&mut flight)?;
            let cause = String::from_utf8_lossy(&flight.buffer[..len]).into_owned();
            self.failure = Some(GroupError::Aborted { rank, cause });
        }
        self.failure.clone().map_or(Ok(()), Err)
    }

    /// Breaks the group and tells the others.
    fn fail(&mut self, error: GroupError) -> GroupError {
        if let Some(error) = &self.failure {
            return error.clone();
        }
        let cause = match &error {
            GroupError::Aborted { cause, .. } => cause.clone(),
            other => other.to_string(),
        };
        let rank = self.rank;
        for to in (0..self.world).filter(|&to| to != rank) {
            // A rank that cannot be told meets its deadline.
            let _ = self.start_send(to, ABORT, cause.as_bytes());
        }
        self.failure = Some(error.clone());
        error
    }
}

/// Bytes on their way to one rank.
struct Outgoing<'a> {
    to: u32,
    bytes: &'a [u8],
    /// An empty message is one piece too.
    fresh: bool,
    flights: VecDeque<Flight>,
}

/// Bytes on their way from one rank.
struct Incoming<'a> {
    from: u32,
    into: Dst<'a>,
    done: usize,
    flight: Option<(usize, Flight)>,
}

impl Outgoing<'_> {
    /// Starts and completes what can be; `None` when all is sent, else whether anything moved.
    fn step(&mut self, calls: &mut Calls) -> Result<Option<bool>, GroupError> {
        let mut moved = false;
        while let Some(flight) = self.flights.front_mut() {
            if !calls.test(flight)? {
                break;
            }
            self.flights.pop_front().into_iter().for_each(|flight| calls.recycle(flight));
            moved = true;
        }
        while self.flights.len() < WINDOW && (self.fresh || !self.bytes.is_empty()) {
            self.fresh = false;
            let (piece, rest) = self.bytes.split_at(self.bytes.len().min(CHUNK));
            self.bytes = rest;
            self.flights.push_back(calls.start_send(self.to, DATA, piece)?);
            moved = true;
        }
        Ok((!self.flights.is_empty()).then_some(moved))
    }
}

impl Incoming<'_> {
    fn step(&mut self, calls: &mut Calls) -> Result<Option<bool>, GroupError> {
        let len = self.into.len();
        let Some((piece, mut flight)) = self.flight.take() else {
            let expected = (len - self.done).min(CHUNK);
            let Some((from, sent, flight)) = calls.start_recv(Some(self.from), DATA)? else {
                return Ok(Some(false));
            };
            if sent != expected {
                let to = calls.rank;
                return Err(GroupError::Size { from, to, sent, expected });
            }
            self.flight = Some((sent, flight));
            return Ok(Some(true));
        };
        if !calls.test(&mut flight)? {
            self.flight = Some((piece, flight));
            return Ok(Some(false));
        }
        let addr = self.into.addr() + self.done as u64;
        // SAFETY: a part of the memory that `into` stands for.
        let mut part = unsafe { Dst::from_addr(addr, piece, Space::Host) };
        part.fill_host(&flight.buffer[..piece]);
        calls.recycle(flight);
        self.done += piece;
        Ok((self.done < len).then_some(true))
    }
}

fn host<'a>(data: &Src<'a>) -> Result<&'a [u8], GroupError> {
    data.host().ok_or(GroupError::Memory { space: data.space() })
}

impl Control for MpiGroup {
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

    /// Tells the others, too: no other thread does.
    fn alive(&self) {
        self.signs.alive(self.rank);
        let mut calls = self.lock();
        let told = calls.tell_signs(&self.signs, self.deadline / BEATS);
        // What MPI says of it is seen by the operation that fails.
        drop(told);
    }

    fn gather_messages(&self, message: &[u8]) -> Result<Vec<Vec<u8>>, GroupError> {
        let world = self.world as usize;
        let mut all: Vec<Option<Vec<u8>>> = vec![None; world];
        all[self.rank as usize] = Some(message.to_vec());
        let mut sends = VecDeque::new();
        let mut started = false;
        let mut receive: Option<(u32, usize, Flight)> = None;
        self.poll("gather", |calls, peers| {
            if !started {
                started = true;
                for to in (0..self.world).filter(|&to| to != self.rank) {
                    sends.push_back((to, calls.start_send(to, SMALL, message)?));
                }
            }
            let mut moved = false;
            if let Some((from, len, mut flight)) = receive.take() {
                if calls.test(&mut flight)? {
                    all[from as usize] = Some(flight.buffer[..len].to_vec());
                    calls.recycle(flight);
                    moved = true;
                } else {
                    receive = Some((from, len, flight));
                }
            }
            // By sender: the next gathering's message of a fast rank must wait its turn.
            if receive.is_none() {
                for from in (0..self.world).filter(|&from| all[from as usize].is_none()) {
                    receive = calls.start_recv(Some(from), SMALL)?;
                    if receive.is_some() {
                        moved = true;
                        break;
                    }
                }
            }
            while let Some((_, flight)) = sends.front_mut() {
                if !calls.test(flight)? {
                    break;
                }
                sends.pop_front().into_iter().for_each(|(_, flight)| calls.recycle(flight));
                moved = true;
            }
            peers.extend((0..self.world).filter(|&from| all[from as usize].is_none()));
            peers.extend(sends.iter().map(|(to, _)| *to));
            Ok(moved)
        })?;
        Ok(all.into_iter().flatten().collect())
    }

    fn abort(&self, cause: &str) {
        let mut calls = self.lock();
        let error = GroupError::Aborted { rank: self.rank, cause: cause.to_owned() };
        calls.fail(error);
    }

    fn failure(&self) -> Option<GroupError> {
        self.hear(&mut self.lock()).err()
    }
}

impl Group for MpiGroup {
    /// The host's only, whatever the library could do.
    fn reaches(&self, space: Space) -> bool {
        space == Space::Host
    }

    fn occupancy(&self) -> &Occupancy {
        &self.occupancy
    }

    fn exchange(&self, batch: Vec<Op<'_>>) -> Result<(), GroupError> {
        check_peers(&batch, self.rank, self.world)?;
        // By peer, in order: MPI keeps the order of messages between two ranks.
        let mut sends: Vec<VecDeque<Outgoing<'_>>> = Vec::new();
        sends.resize_with(self.world as usize, VecDeque::new);
        let mut receives: Vec<VecDeque<Incoming<'_>>> = Vec::new();
        receives.resize_with(self.world as usize, VecDeque::new);
        for op in batch {
            let mut send = |to: u32, bytes| {
                let flights = VecDeque::new();
                sends[to as usize].push_back(Outgoing { to, bytes, fresh: true, flights });
            };
            match op {
                Op::Send { to, data } => send(to, host(&data)?),
                Op::Broadcast { data } => {
                    let bytes = host(&data)?;
                    (0..self.world).filter(|&to| to != self.rank).for_each(|to| send(to, bytes));
                }
                Op::Recv { from, into } | Op::BroadcastFrom { root: from, into } => {
                    if into.space() != Space::Host {
                        return Err(GroupError::Memory { space: into.space() });
                    }
                    let (done, flight) = (0, None);
                    receives[from as usize].push_back(Incoming { from, into, done, flight });
                }
            }
        }
        self.poll("exchange", |calls, peers| {
            let mut moved = false;
            for queue in &mut receives {
                let Some(first) = queue.front_mut() else { continue };
                peers.push(first.from);
                match first.step(calls)? {
                    Some(stepped) => moved |= stepped,
                    None => {
                        queue.pop_front();
                        moved = true;
                    }
                }
            }
            for queue in &mut sends {
                let Some(first) = queue.front_mut() else { continue };
                peers.push(first.to);
                match first.step(calls)? {
                    Some(stepped) => moved |= stepped,
                    None => {
                        queue.pop_front();
                        moved = true;
                    }
                }
            }
            Ok(moved)
        })
    }
}

impl Drop for MpiGroup {
    /// Ends MPI, unless after a failure some rank does not come along: that would wait for ever.
    fn drop(&mut self) {
        let calls = self.calls.get_mut().unwrap_or_else(PoisonError::into_inner);
        if calls.failure.is_some() {
            let start = Instant::now();
            let mut done = 0;
            // SAFETY: MPI is initialised and not finalised; the arguments point to locals. A request
            // left behind has no buffer.
            unsafe {
                let mut request = ffi::RSMPI_REQUEST_NULL;
                if ffi::MPI_Ibarrier(calls.comm, &mut request) != 0 {
                    return;
                }
                while done == 0 {
                    if ffi::MPI_Test(&mut request, &mut done, ffi::RSMPI_STATUS_IGNORE) != 0
                        || start.elapsed() > FAREWELL
                    {
                        return;
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
        // SAFETY: dropped once, here.
        unsafe { ManuallyDrop::drop(&mut self.universe) };
    }
}
