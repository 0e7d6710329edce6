//! A simulated NCCL for tests on machines without GPUs: ranks are threads of one process, or processes
//! of one machine (see `processes.rs`), device memory is host memory.
//!
//! Like the real one it promises little. Work runs when the stream it was given to is asked whether it
//! is done ([`fst_sim_nccl_stream_done`]), never earlier, and only once the peer has posted its half: a
//! buffer that is touched before shows as wrong bytes. Communicators are non-blocking: whatever is
//! begun reports "in progress" for a while. A peer that never comes is waited for without end; after
//! an abort nothing of the communicator moves any more.
//!
//! What a careful caller never does is counted: using a communicator after its end, ending it with work
//! pending, sizes that differ, leaving a group open, and ending a communicator with no context current (the real one
//! then makes one on the first device).

mod processes;
mod world;

use std::cell::{Cell, RefCell};
use std::ffi::{c_char, c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use processes::Processes;
use world::{Op, Work, with_world};

const SUCCESS: c_int = 0;
const INVALID_ARGUMENT: c_int = 4;
const IN_PROGRESS: c_int = 7;

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations)]
pub struct UniqueId([u8; 128]);

thread_local! {
    /// Depth of open groups and what they hold: communicator and work.
    static GROUP: RefCell<(u32, Vec<(usize, Work)>)> = const { RefCell::new((0, Vec::new())) };
}

/// Whether callers say which threads have a context current ([`fst_sim_nccl_context`]).
static CONTEXTS: AtomicBool = AtomicBool::new(false);

thread_local! {
    static CURRENT: Cell<bool> = const { Cell::new(false) };
}

/// Says whether the calling thread has a context current. Until this is called once, nobody is held to it.
#[unsafe(no_mangle)]
pub extern "C" fn fst_sim_nccl_context(current: c_int) {
    CONTEXTS.store(true, Relaxed);
    CURRENT.set(current != 0);
}

/// Counts a call that needs a current context and has none.
fn needs_context() {
    if CONTEXTS.load(Relaxed) && !CURRENT.get() {
        with_world(|world| world.violations += 1);
    }
}

fn injected(call: &str) -> Option<c_int> {
    with_world(|world| world.count(call))
}

/// `ncclGetVersion`.
///
/// # Safety
/// `version` points to an `int`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetVersion(version: *mut c_int) -> c_int {
    // SAFETY: by contract.
    unsafe { *version = 22_304 };
    SUCCESS
}

/// `ncclGetErrorString`.
#[unsafe(no_mangle)]
pub extern "C" fn ncclGetErrorString(code: c_int) -> *const c_char {
    let text = match code {
        0 => c"no error",
        1 => c"unhandled cuda error",
        2 => c"unhandled system error",
        3 => c"internal error",
        4 => c"invalid argument",
        5 => c"invalid usage",
        6 => c"remote process exited or there was a network error",
        7 => c"NCCL operation in progress",
        _ => c"unknown result code",
    };
    text.as_ptr()
}

/// `ncclGetUniqueId`.
///
/// # Safety
/// `id` points to 128 bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetUniqueId(id: *mut UniqueId) -> c_int {
    if let Some(code) = injected("ncclGetUniqueId") {
        return code;
    }
    let number = with_world(|world| world.fresh_id());
    let mut bytes = [0; 128];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    if Processes::announce(&mut bytes, number).is_none() {
        bytes[8..].fill(0xFF);
    }
    // SAFETY: by contract.
    unsafe { *id = UniqueId(bytes) };
    SUCCESS
}

/// `ncclCommInitRankConfig`; the configuration must be that of a non-blocking communicator.
///
/// # Safety
/// `comm` points to a pointer; `config` to an `ncclConfig_t` of 2.14 or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommInitRankConfig(
    comm: *mut *mut c_void,
    ranks: c_int,
    id: UniqueId,
    rank: c_int,
    config: *const c_void,
) -> c_int {
    if let Some(code) = injected("ncclCommInitRankConfig") {
        return code;
    }
    // SAFETY: by contract the first 24 bytes are size, magic, version and blocking.
    let (size, words) = unsafe {
        (config.cast::<usize>().read(), config.cast::<u8>().add(8).cast::<[u32; 3]>().read())
    };
    if size < 24 || words[0] != 0xcafe_beef || words[1] < 21_400 || words[2] != 0 {
        return INVALID_ARGUMENT;
    }
    meet_driver();
    let number = id.0.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    let processes = Processes::join(&id.0, rank as u32);
    let made = with_world(|world| world.join(number, rank as u32, ranks as u32, processes));
    // SAFETY: by contract.
    unsafe { *comm = made as *mut c_void };
    IN_PROGRESS
}

/// Has the simulated driver ask for work on its streams, where both are preloaded into a program. (In a
/// test they are opened privately, and the test brings them together.)
fn meet_driver() {
    static MET: std::sync::Once = std::sync::Once::new();
    type Hook = extern "C" fn(*mut c_void) -> c_int;
    MET.call_once(|| {
        let program = libloading::os::unix::Library::this();
        // SAFETY: the driver's function has this signature.
        if let Ok(hook) = unsafe { program.get::<extern "C" fn(Hook)>(b"fst_sim_stream_hook\0") } {
            hook(fst_sim_nccl_stream_done);
        }
    });
}

/// `ncclCommInitRank`: this simulator has non-blocking communicators only.
#[unsafe(no_mangle)]
pub extern "C" fn ncclCommInitRank(
    _comm: *mut *mut c_void,
    _ranks: c_int,
    _id: UniqueId,
    _rank: c_int,
) -> c_int {
    INVALID_ARGUMENT
}

/// `ncclCommGetAsyncError`.
///
/// # Safety
/// `state` points to an `int`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommGetAsyncError(comm: *mut c_void, state: *mut c_int) -> c_int {
    let found = match injected("ncclCommGetAsyncError") {
        Some(code) => code,
        None => with_world(|world| world.async_state(comm as usize)),
    };
    // SAFETY: by contract.
    unsafe { *state = found };
    SUCCESS
}

/// `ncclCommCount`.
///
/// # Safety
/// `count` points to an `int`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommCount(comm: *mut c_void, count: *mut c_int) -> c_int {
    match with_world(|world| world.rank_and_count(comm as usize)) {
        // SAFETY: by contract.
        Some((_, ranks)) => unsafe { *count = ranks as c_int },
        None => return INVALID_ARGUMENT,
    }
    SUCCESS
}

/// `ncclCommUserRank`.
///
/// # Safety
/// `rank` points to an `int`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommUserRank(comm: *mut c_void, rank: *mut c_int) -> c_int {
    match with_world(|world| world.rank_and_count(comm as usize)) {
        // SAFETY: by contract.
        Some((own, _)) => unsafe { *rank = own as c_int },
        None => return INVALID_ARGUMENT,
    }
    SUCCESS
}

/// `ncclCommFinalize`.
#[unsafe(no_mangle)]
pub extern "C" fn ncclCommFinalize(comm: *mut c_void) -> c_int {
    needs_context();
    with_world(|world| world.finalize(comm as usize))
}

/// `ncclCommDestroy`.
#[unsafe(no_mangle)]
pub extern "C" fn ncclCommDestroy(comm: *mut c_void) -> c_int {
    needs_context();
    with_world(|world| world.end(comm as usize, false))
}

/// `ncclCommAbort`.
#[unsafe(no_mangle)]
pub extern "C" fn ncclCommAbort(comm: *mut c_void) -> c_int {
    needs_context();
    with_world(|world| world.end(comm as usize, true))
}

/// `ncclGroupStart`.
#[unsafe(no_mangle)]
pub extern "C" fn ncclGroupStart() -> c_int {
    GROUP.with_borrow_mut(|group| group.0 += 1);
    SUCCESS
}

/// `ncclGroupEnd`.
#[unsafe(no_mangle)]
pub extern "C" fn ncclGroupEnd() -> c_int {
    let work = GROUP.with_borrow_mut(|group| {
        group.0 = group.0.saturating_sub(1);
        if group.0 == 0 { std::mem::take(&mut group.1) } else { Vec::new() }
    });
    if let Some(code) = injected("ncclGroupEnd") {
        return code;
    }
    with_world(|world| work.into_iter().for_each(|(comm, work)| world.post(comm, work)));
    IN_PROGRESS
}

fn enqueue(call: &str, comm: *mut c_void, work: Work) -> c_int {
    if let Some(code) = injected(call) {
        return code;
    }
    GROUP.with_borrow_mut(|group| {
        if group.0 == 0 {
            // Work outside of a group is a group of its own.
            with_world(|world| world.post(comm as usize, work));
        } else {
            group.1.push((comm as usize, work));
        }
    });
    SUCCESS
}

/// `ncclSend`, of bytes.
#[unsafe(no_mangle)]
pub extern "C" fn ncclSend(
    data: *const c_void,
    count: usize,
    _type: c_int,
    peer: c_int,
    comm: *mut c_void,
    stream: *mut c_void,
) -> c_int {
    let op = Op::Send { to: peer as u32 };
    enqueue("ncclSend", comm, Work::new(op, data as usize, count, stream as usize))
}

/// `ncclRecv`, of bytes.
#[unsafe(no_mangle)]
pub extern "C" fn ncclRecv(
    into: *mut c_void,
    count: usize,
    _type: c_int,
    peer: c_int,
    comm: *mut c_void,
    stream: *mut c_void,
) -> c_int {
    let op = Op::Recv { from: peer as u32 };
    enqueue("ncclRecv", comm, Work::new(op, into as usize, count, stream as usize))
}

/// `ncclBroadcast`, of bytes, in place on the root.
#[unsafe(no_mangle)]
pub extern "C" fn ncclBroadcast(
    _data: *const c_void,
    into: *mut c_void,
    count: usize,
    _type: c_int,
    root: c_int,
    comm: *mut c_void,
    stream: *mut c_void,
) -> c_int {
    let op = Op::Broadcast { root: root as u32 };
    enqueue("ncclBroadcast", comm, Work::new(op, into as usize, count, stream as usize))
}

/// Whether all work given to a stream is complete; runs what can run. Streams are any addresses.
#[unsafe(no_mangle)]
pub extern "C" fn fst_sim_nccl_stream_done(stream: *mut c_void) -> c_int {
    c_int::from(with_world(|world| world.stream_done(stream as usize)))
}

/// Makes the `nth` call (from 1, counted from now) of a function fail with a code.
///
/// # Safety
/// `name` is a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fst_sim_nccl_fail(name: *const c_char, nth: u32, code: c_int) {
    // SAFETY: by contract.
    let name = unsafe { std::ffi::CStr::from_ptr(name) }.to_string_lossy().into_owned();
    with_world(|world| world.inject(name, nth, code));
}

/// How often callers did what they must not, since the last time this was asked.
#[unsafe(no_mangle)]
pub extern "C" fn fst_sim_nccl_violations() -> u32 {
    let open = GROUP.with_borrow(|group| group.0);
    with_world(|world| std::mem::take(&mut world.violations)) + open
}
