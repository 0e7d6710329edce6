//! A group over NCCL: one CUDA device for each rank, on one or several machines.
//!
//! NCCL is opened at run time. Functions, codes and the configuration follow NVIDIA's "NCCL User
//! Guide" and the public `nccl.h` of 2.14; codes are kept as integers, so that those of later versions
//! are harmless. Communicators are non-blocking where the library can (2.14 and later): every wait
//! polls the stream, NCCL's asynchronous errors, the other ranks' word of failures and the deadline. One
//! batch is one NCCL group call and one wait, however many transfers it holds.
//!
//! Small messages and aborts go another way ([`Control`]): NCCL has neither.

use std::any::Any;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt;
use std::mem::ManuallyDrop;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use libloading::Library;

use super::{Control, Controlled, Group, LaunchEnv, Occupancy, Op, TcpControl, check_peers};
use crate::backend::Cause;
use crate::error::GroupError;
use crate::memory::Space;

/// The names under which NCCL is looked for.
const LIBRARIES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

const IN_PROGRESS: c_int = 7;
/// `ncclUint8`.
const BYTES: c_int = 1;

/// How long an error of NCCL waits for word of the rank whose end was its cause: NCCL does not name it.
const WORD: Duration = Duration::from_millis(500);

/// How long kernels may take to leave after their communicator was aborted.
const FAREWELL: Duration = Duration::from_secs(10);

type Comm = *mut c_void;
type Handle = *mut c_void;

/// What ranks share to form a communicator.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct UniqueId([u8; 128]);

impl UniqueId {
    /// An id that another part of the program made (`ncclUniqueId`).
    #[must_use]
    pub fn from_bytes(bytes: [u8; 128]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 128] {
        &self.0
    }
}

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UniqueId")
    }
}

/// `ncclConfig_t` as of 2.14; later versions read no further than `size`.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
}

/// The functions of an NCCL library.
pub struct Nccl {
    get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    comm_init_rank: unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int) -> c_int,
    comm_init_rank_config:
        Option<unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int, *const Config) -> c_int>,
    comm_finalize: Option<unsafe extern "C" fn(Comm) -> c_int>,
    comm_destroy: unsafe extern "C" fn(Comm) -> c_int,
    comm_abort: unsafe extern "C" fn(Comm) -> c_int,
    comm_get_async_error: unsafe extern "C" fn(Comm, *mut c_int) -> c_int,
    comm_count: unsafe extern "C" fn(Comm, *mut c_int) -> c_int,
    comm_user_rank: unsafe extern "C" fn(Comm, *mut c_int) -> c_int,
    get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
    send: unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Comm, Handle) -> c_int,
    recv: unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Comm, Handle) -> c_int,
    broadcast: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        c_int,
        Comm,
        Handle,
    ) -> c_int,
    name: String,
    /// Never closed: NCCL's threads may outlive communicators.
    _library: ManuallyDrop<Library>,
}

impl fmt::Debug for Nccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Nccl({})", self.name)
    }
}

impl Nccl {
    /// Opens NCCL under the names that installations and wheels give it.
    ///
    /// # Errors
    /// No such library, or one that lacks a function of NCCL 2.8.
    pub fn open() -> Result<Arc<Self>, GroupError> {
        let mut reasons = Vec::new();
        for name in LIBRARIES {
            match Self::open_at(Path::new(name)) {
                Err(GroupError::Library { reason, .. }) => reasons.push(reason),
                opened => return opened,
            }
        }
        let looked_for = LIBRARIES.map(str::to_owned).to_vec();
        Err(GroupError::Library { looked_for, reason: reasons.join("; ") })
    }

    /// Opens the NCCL library at a path.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn open_at(path: &Path) -> Result<Arc<Self>, GroupError> {
        let name = path.display().to_string();
        // SAFETY: NCCL's initialisers are those of a plain C++ library.
        let library = unsafe { Library::new(path) }.map_err(|error| GroupError::Library {
            looked_for: vec![name.clone()],
            // The loader's own words are those of the source.
            reason: std::error::Error::source(&error).map_or(error.to_string(), |e| e.to_string()),
        })?;
        macro_rules! symbol {
            ($symbol:literal) => {
                // SAFETY: the function has this signature in every version of nccl.h since 2.8 (or
                // since it exists); see the module's source.
                match unsafe { library.get($symbol) } {
                    Ok(function) => *function,
                    Err(_) => {
                        return Err(GroupError::MissingSymbol { library: name, symbol: $symbol });
                    }
                }
            };
        }
        macro_rules! optional {
            ($symbol:literal) => {
                // SAFETY: as above.
                unsafe { library.get($symbol) }.ok().map(|function| *function)
            };
        }
        Ok(Arc::new(Self {
            get_version: symbol!("ncclGetVersion"),
            get_unique_id: symbol!("ncclGetUniqueId"),
            comm_init_rank: symbol!("ncclCommInitRank"),
            comm_init_rank_config: optional!("ncclCommInitRankConfig"),
            comm_finalize: optional!("ncclCommFinalize"),
            comm_destroy: symbol!("ncclCommDestroy"),
            comm_abort: symbol!("ncclCommAbort"),
            comm_get_async_error: symbol!("ncclCommGetAsyncError"),
            comm_count: symbol!("ncclCommCount"),
            comm_user_rank: symbol!("ncclCommUserRank"),
            get_error_string: symbol!("ncclGetErrorString"),
            group_start: symbol!("ncclGroupStart"),
            group_end: symbol!("ncclGroupEnd"),
            send: symbol!("ncclSend"),
            recv: symbol!("ncclRecv"),
            broadcast: symbol!("ncclBroadcast"),
            name,
            _library: ManuallyDrop::new(library),
        }))
    }

    /// The library's version: 21405 is 2.14.5.
    ///
    /// # Errors
    /// The library does not tell.
    pub fn version(&self) -> Result<u32, GroupError> {
        let mut version = 0;
        // SAFETY: the argument points to a local.
        self.ok("ncclGetVersion", unsafe { (self.get_version)(&mut version) })?;
        Ok(version as u32)
    }

    /// Makes an id for a new communicator.
    ///
    /// # Errors
    /// NCCL finds no network interface to listen at.
    pub fn unique_id(&self) -> Result<UniqueId, GroupError> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: the argument points to a local of the right size.
        self.ok("ncclGetUniqueId", unsafe { (self.get_unique_id)(&mut id) })?;
        Ok(id)
    }

    /// The name or path that it was opened by.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    fn ok(&self, call: &'static str, code: c_int) -> Result<(), GroupError> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: NCCL returns a static string for any code.
        let text = unsafe {
            let text = (self.get_error_string)(code);
            if text.is_null() { c"no words for it" } else { CStr::from_ptr(text) }
        };
        Err(GroupError::Nccl { call, code, text: text.to_string_lossy().into_owned() })
    }
}

/// A CUDA stream that NCCL works on.
///
/// # Safety
/// `handle` is a valid stream of device `ordinal` as long as the value lives, and `is_done` tells the
/// truth about it.
pub unsafe trait DeviceStream: Send + Sync + fmt::Debug {
    /// The `CUstream`.
    fn handle(&self) -> *mut c_void;

    /// The device's ordinal.
    fn ordinal(&self) -> u32;

    /// Makes the device's context current on the calling thread, until what it returns is dropped there.
    ///
    /// # Errors
    /// The driver refuses.
    fn make_current(&self) -> Result<Box<dyn Any>, Cause>;

    /// Whether all work on the stream is complete (`cuStreamQuery`).
    ///
    /// # Errors
    /// Work on the stream failed.
    fn is_done(&self) -> Result<bool, Cause>;
}

/// One rank of a group over NCCL.
pub struct NcclGroup {
    nccl: Arc<Nccl>,
    control: Box<dyn Control>,
    stream: Box<dyn DeviceStream>,
    /// `None` once aborted.
    comm: Mutex<Option<OwnedComm>>,
    occupancy: Occupancy,
}

#[derive(Clone, Copy)]
struct OwnedComm {
    comm: Comm,
    /// Whether we destroy it.
    ours: bool,
}

// SAFETY: NCCL's functions may be called from any thread; calls on one communicator are ordered by the
// lock around it.
unsafe impl Send for OwnedComm {}

impl fmt::Debug for NcclGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (rank, world) = (self.rank(), self.world_size());
        write!(f, "NcclGroup({rank} of {world} on device {})", self.stream.ordinal())
    }
}

impl NcclGroup {
    /// Forms a communicator of the processes that a launcher started; see [`LaunchEnv`]. A rank that is
    /// waited for may be silent for `deadline`.
    ///
    /// # Errors
    /// Variables that are missing, ranks that do not come, or NCCL missing or failing.
    pub fn from_env(stream: Box<dyn DeviceStream>, deadline: Duration) -> Result<Self, GroupError> {
        let control = TcpControl::from_env(&LaunchEnv::from_env()?, deadline)?;
        Self::init(Box::new(control), stream)
    }

    /// Forms a communicator of all ranks of `control`, each with the device of its stream. Rank 0 makes
    /// the unique id.
    ///
    /// # Errors
    /// NCCL missing or failing, here or on another rank.
    pub fn init(
        control: Box<dyn Control>,
        stream: Box<dyn DeviceStream>,
    ) -> Result<Self, GroupError> {
        let nccl = Nccl::open().map_err(|error| broke(&*control, error))?;
        Self::init_with(nccl, control, stream)
    }

    /// As [`init`](Self::init), with a library that is open already.
    ///
    /// # Errors
    /// As for [`init`](Self::init).
    pub fn init_with(
        nccl: Arc<Nccl>,
        control: Box<dyn Control>,
        stream: Box<dyn DeviceStream>,
    ) -> Result<Self, GroupError> {
        let own = match control.rank() {
            0 => nccl.unique_id().map_err(|error| broke(&*control, error))?.0.to_vec(),
            _ => Vec::new(),
        };
        let all = control.gather_messages(&own)?;
        let id = all.first().and_then(|id| <[u8; 128]>::try_from(&id[..]).ok());
        let id = id.ok_or(GroupError::Parts { expected: 128, found: own.len() })?;
        Self::with_unique_id(nccl, UniqueId(id), control, stream)
    }

    /// Forms a communicator from a unique id that all ranks of `control` have.
    ///
    /// # Errors
    /// NCCL failing, here or on another rank.
    pub fn with_unique_id(
        nccl: Arc<Nccl>,
        id: UniqueId,
        control: Box<dyn Control>,
        stream: Box<dyn DeviceStream>,
    ) -> Result<Self, GroupError> {
        let (comm, occupancy) = (Mutex::new(None), Occupancy::default());
        let group = Self { nccl, control, stream, comm, occupancy };
        let (world, rank) = (group.world_size() as c_int, group.rank() as c_int);
        let mut comm: Comm = std::ptr::null_mut();
        let made = group.current().and_then(|_current| {
            let config = Config {
                size: size_of::<Config>(),
                magic: 0xcafe_beef,
                version: 21400,
                blocking: 0,
            };
            match group.nccl.comm_init_rank_config {
                // SAFETY: pointers to locals; the device's context is current.
                Some(init) => unsafe {
                    let code = init(&mut comm, world, id, rank, &config);
                    group.started("ncclCommInitRankConfig", code)
                },
                // SAFETY: as above. This one blocks until all ranks come.
                None => unsafe {
                    let code = (group.nccl.comm_init_rank)(&mut comm, world, id, rank);
                    group.started("ncclCommInitRank", code)
                },
            }
        });
        if !comm.is_null() {
            *group.lock() = Some(OwnedComm { comm, ours: true });
        }
        let ready = made.and_then(|()| {
            group.poll("forming a communicator", &group.others(), comm, || Ok(true))
        });
        ready.map_err(|error| group.fail(error))?;
        Ok(group)
    }

    /// Uses a communicator that the caller made, with the ranks of `control`. It is not destroyed with the
    /// group, but it is aborted if the group fails.
    ///
    /// # Errors
    /// Rank or size of the communicator are not those of `control`.
    ///
    /// # Safety
    /// `comm` is a valid `ncclComm_t` of this library, of the stream's device, and nobody else uses
    /// it as long as the group lives.
    pub unsafe fn from_comm(
        nccl: Arc<Nccl>,
        comm: *mut c_void,
        control: Box<dyn Control>,
        stream: Box<dyn DeviceStream>,
    ) -> Result<Self, GroupError> {
        let (mut rank, mut world) = (0, 0);
        // SAFETY: the communicator is valid; the others point to locals.
        unsafe {
            nccl.ok("ncclCommUserRank", (nccl.comm_user_rank)(comm, &mut rank))?;
            nccl.ok("ncclCommCount", (nccl.comm_count)(comm, &mut world))?;
        }
        let (rank, world) = (rank as u32, world as u32);
        if (rank, world) != (control.rank(), control.world_size()) {
            return Err(GroupError::Peer { peer: control.rank(), rank, world });
        }
        let comm = Mutex::new(Some(OwnedComm { comm, ours: false }));
        Ok(Self { nccl, control, stream, comm, occupancy: Occupancy::default() })
    }

    /// The library.
    #[must_use]
    pub fn nccl(&self) -> &Nccl {
        &self.nccl
    }

    fn lock(&self) -> MutexGuard<'_, Option<OwnedComm>> {
        self.comm.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn current(&self) -> Result<Box<dyn Any>, GroupError> {
        let wrap = |source: Cause| GroupError::Stream { source: source.into() };
        self.stream.make_current().map_err(wrap)
    }

    /// Success, or begun: the rest is seen by polling.
    fn started(&self, call: &'static str, code: c_int) -> Result<(), GroupError> {
        if code == IN_PROGRESS { Ok(()) } else { self.nccl.ok(call, code) }
    }

    fn others(&self) -> Vec<u32> {
        (0..self.world_size()).filter(|&other| other != self.rank()).collect()
    }

    /// Waits until NCCL has nothing under way on the communicator and `done` says so too; this takes no
    /// longer than `peers` show signs of life.
    fn poll(
        &self,
        op: &'static str,
        peers: &[u32],
        comm: Comm,
        mut done: impl FnMut() -> Result<bool, GroupError>,
    ) -> Result<(), GroupError> {
        let (start, signs) = (Instant::now(), self.signs());
        let _waiting = signs.wait(self.rank());
        let mut idle = 0u32;
        loop {
            let mut state = 0;
            // SAFETY: the communicator is not destroyed yet; the other points to a local.
            let code = unsafe { (self.nccl.comm_get_async_error)(comm, &mut state) };
            self.nccl.ok("ncclCommGetAsyncError", code)?;
            if state != IN_PROGRESS {
                self.nccl.ok(op, state)?;
                if done()? {
                    return Ok(());
                }
            }
            if let Some(error) = self.control.failure() {
                return Err(error);
            }
            let (rank, waited) = (self.rank(), self.control.deadline());
            signs.patience(peers, start, waited).map_err(|waiting_for| GroupError::Deadline {
                op,
                rank,
                waiting_for,
                waited,
            })?;
            idle += 1;
            match idle {
                0..200 => std::thread::yield_now(),
                _ => std::thread::sleep(Duration::from_micros(20)),
            }
        }
    }

    /// What the other ranks tell of a failure of NCCL, which may come a moment after NCCL notices it.
    fn explained(&self, error: GroupError) -> GroupError {
        if !matches!(error, GroupError::Nccl { .. }) {
            return error;
        }
        let start = Instant::now();
        while start.elapsed() < WORD {
            if let Some(known) = self.control.failure() {
                return known;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        error
    }

    fn stream_done(&self) -> Result<bool, GroupError> {
        self.stream.is_done().map_err(|source| GroupError::Stream { source: source.into() })
    }

    /// Tells the other ranks, aborts the communicator and waits for its kernels to leave.
    fn fail(&self, error: GroupError) -> GroupError {
        let error = broke(&*self.control, self.explained(error));
        if let Some(OwnedComm { comm, .. }) = self.lock().take() {
            let _current = self.current();
            // SAFETY: taken out of its place: aborted once, and used by nobody after.
            unsafe { (self.nccl.comm_abort)(comm) };
            let start = Instant::now();
            while start.elapsed() < FAREWELL && matches!(self.stream.is_done(), Ok(false)) {
                std::thread::sleep(Duration::from_micros(100));
            }
        }
        error
    }

    fn enqueue(&self, comm: Comm, batch: &[Op<'_>]) -> Result<(), GroupError> {
        let (nccl, stream) = (&*self.nccl, self.stream.handle());
        // SAFETY: no arguments.
        nccl.ok("ncclGroupStart", unsafe { (nccl.group_start)() })?;
        let one = |op: &Op<'_>| {
            // SAFETY: addresses and lengths are those of memory that the caller lends until
            // `exchange` returns, which is after the stream is done; communicator and stream live.
            let (call, code) = unsafe {
                match op {
                    Op::Send { to, data } => {
                        let (data, len) = (data.addr() as *const c_void, data.len());
                        ("ncclSend", (nccl.send)(data, len, BYTES, *to as c_int, comm, stream))
                    }
                    Op::Recv { from, into } => {
                        let (into, len) = (into.addr() as *mut c_void, into.len());
                        ("ncclRecv", (nccl.recv)(into, len, BYTES, *from as c_int, comm, stream))
                    }
                    Op::Broadcast { data } => {
                        let (root, addr) = (self.rank() as c_int, data.addr());
                        let (from, to) = (addr as *const c_void, addr as *mut c_void);
                        let len = data.len();
                        let code = (nccl.broadcast)(from, to, len, BYTES, root, comm, stream);
                        ("ncclBroadcast", code)
                    }
                    Op::BroadcastFrom { root, into } => {
                        let (root, addr) = (*root as c_int, into.addr());
                        let (from, to) = (addr as *const c_void, addr as *mut c_void);
                        let len = into.len();
                        let code = (nccl.broadcast)(from, to, len, BYTES, root, comm, stream);
                        ("ncclBroadcast", code)
                    }
                }
            };
            self.started(call, code)
        };
        let enqueued = batch.iter().try_for_each(one);
        // The group must end, whatever was said within.
        // SAFETY: no arguments.
        let ended = self.started("ncclGroupEnd", unsafe { (nccl.group_end)() });
        enqueued.and(ended)
    }
}

/// Tells the other ranks of an error of this one, unless it came from them.
fn broke(control: &dyn Control, error: GroupError) -> GroupError {
    if control.failure().is_none() {
        control.abort(&error.to_string());
    }
    error
}

impl Controlled for NcclGroup {
    fn control(&self) -> &dyn Control {
        &*self.control
    }
}

impl Group for NcclGroup {
    /// That of the stream's device only.
    fn reaches(&self, space: Space) -> bool {
        space == Space::Device(self.stream.ordinal())
    }

    fn occupancy(&self) -> &Occupancy {
        &self.occupancy
    }

    fn exchange(&self, batch: Vec<Op<'_>>) -> Result<(), GroupError> {
        let peers = check_peers(&batch, self.rank(), self.world_size())?;
        for op in &batch {
            let space = match op {
                Op::Send { data, .. } | Op::Broadcast { data } => data.space(),
                Op::Recv { into, .. } | Op::BroadcastFrom { into, .. } => into.space(),
            };
            if !self.reaches(space) {
                return Err(GroupError::Memory { space });
            }
        }
        if let Some(error) = self.control.failure() {
            return Err(self.fail(error));
        }
        if batch.is_empty() {
            return Ok(());
        }
        let Some(OwnedComm { comm, .. }) = *self.lock() else {
            let cause = "its communicator was aborted".to_owned();
            return Err(GroupError::Aborted { rank: self.rank(), cause });
        };
        self.current()
            .and_then(|_current| self.enqueue(comm, &batch))
            .and_then(|()| self.poll("exchange", &peers, comm, || self.stream_done()))
            .map_err(|error| self.fail(error))
    }
}

impl Drop for NcclGroup {
    fn drop(&mut self) {
        // With no context current, NCCL makes one on the first device to end a communicator.
        let _current = self.current();
        if self.control.failure().is_some() {
            // Others may be gone: an orderly end would wait for them.
            if let Some(OwnedComm { comm, .. }) = self.lock().take() {
                // SAFETY: taken out of its place: aborted once, and used by nobody after.
                unsafe { (self.nccl.comm_abort)(comm) };
            }
            return;
        }
        let Some(OwnedComm { comm, ours: true }) = self.lock().take() else { return };
        if let Some(finalize) = self.nccl.comm_finalize {
            // SAFETY: the communicator is ours and idle.
            let code = unsafe { finalize(comm) };
            let finalized = self.started("ncclCommFinalize", code);
            if finalized
                .and_then(|()| self.poll("finalising", &self.others(), comm, || Ok(true)))
                .is_err()
            {
                // SAFETY: as above; aborting ends it whatever the state.
                unsafe { (self.nccl.comm_abort)(comm) };
                return;
            }
        }
        // SAFETY: ours, idle and finalised.
        unsafe { (self.nccl.comm_destroy)(comm) };
    }
}
