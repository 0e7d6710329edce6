//! `NcclGroup` over the simulated NCCL: the battery, a plan, and failures of each rank in turn.

#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "../../../crates/fst-dist/tests/conformance/mod.rs"]
mod conformance;
#[path = "../../../crates/fst-dist/tests/port/mod.rs"]
mod port;

use std::any::Any;
use std::ffi::{CString, c_char, c_int, c_void};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use conformance::{HostScratch, Scratch};
use fst_dist::group::{Control, DeviceStream, HostCopier, Nccl, NcclGroup, Op, TcpControl};
use fst_dist::{
    Backend, Cause, CopyAt, Dst, Group, GroupError, HostBackend, LocalGroup, Planner, ReadAt,
    ReadInto, Reader, Region, Shard, Space, Src, Staging, TensorDesc, Topology,
};
use libloading::Library;
use port::Port;

/// The simulator, for one test at a time.
struct Sim {
    library: Library,
    path: PathBuf,
    _turn: MutexGuard<'static, ()>,
}

static TURN: Mutex<()> = Mutex::new(());

impl Sim {
    fn new() -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let executable = std::env::current_exe().unwrap();
        // Test binaries lie in target/PROFILE/deps.
        let path = executable.parent().unwrap().join("libnccl_sim.so");
        // SAFETY: our own library, whose initialisers do nothing.
        let library = unsafe { Library::new(&path) }.unwrap();
        let sim = Self { library, path, _turn: turn };
        sim.violations();
        sim
    }

    fn nccl(&self) -> Arc<Nccl> {
        Nccl::open_at(&self.path).unwrap()
    }

    fn violations(&self) -> u32 {
        // SAFETY: the function has this signature.
        unsafe {
            let ask =
                self.library.get::<extern "C" fn() -> u32>("fst_sim_nccl_violations").unwrap();
            ask()
        }
    }

    fn fail(&self, call: &str, nth: u32, code: c_int) {
        let call = CString::new(call).unwrap();
        // SAFETY: the function has this signature.
        unsafe {
            let symbol = "fst_sim_nccl_fail";
            let fail = self.library.get::<unsafe extern "C" fn(*const c_char, u32, c_int)>(symbol);
            fail.unwrap()(call.as_ptr(), nth, code);
        }
    }

    fn stream(&self, rank: u32) -> Box<dyn DeviceStream> {
        // SAFETY: the function has this signature, and the library stays open for ever: the path was
        // opened once more by `Nccl`, which never closes it.
        let (done, context) = unsafe {
            let done = *self.library.get("fst_sim_nccl_stream_done").unwrap();
            (done, *self.library.get("fst_sim_nccl_context").unwrap())
        };
        Box::new(Stream { rank, done, context })
    }
}

#[derive(Debug)]
struct Stream {
    rank: u32,
    done: extern "C" fn(*mut c_void) -> c_int,
    context: extern "C" fn(c_int),
}

/// A thread's context, current until this is dropped.
struct Current(extern "C" fn(c_int));

impl Drop for Current {
    fn drop(&mut self) {
        (self.0)(0);
    }
}

// SAFETY: the simulator takes any address for a stream and tells whether its work is done.
unsafe impl DeviceStream for Stream {
    fn handle(&self) -> *mut c_void {
        std::ptr::without_provenance_mut(self.rank as usize + 1)
    }

    fn ordinal(&self) -> u32 {
        self.rank
    }

    fn make_current(&self) -> Result<Box<dyn Any>, Cause> {
        (self.context)(1);
        Ok(Box::new(Current(self.context)))
    }

    fn is_done(&self) -> Result<bool, Cause> {
        Ok((self.done)(self.handle()) != 0)
    }
}

/// Host memory that says it is a device's.
struct DeviceScratch(HostScratch, u32);

impl Scratch for DeviceScratch {
    fn space(&self) -> Space {
        Space::Device(self.1)
    }

    fn put(&self, bytes: &[u8]) -> Result<u64, Cause> {
        self.0.put(bytes)
    }

    fn take(&self, addr: u64) -> Result<Vec<u8>, Cause> {
        self.0.take(addr)
    }
}

/// Nobody waits for so long, unless something is broken.
const LONG: Duration = Duration::from_secs(60);

/// Each rank on a thread, with a local group for its small messages.
fn on_ranks<T: Send>(
    sim: &Sim,
    world: u32,
    deadline: Duration,
    f: impl Fn(Result<NcclGroup, GroupError>, u32) -> T + Sync,
) -> Vec<T> {
    std::thread::scope(|scope| {
        let run = |(rank, control): (u32, LocalGroup)| {
            let f = &f;
            let (nccl, stream) = (sim.nccl(), sim.stream(rank));
            scope.spawn(move || f(NcclGroup::init_with(nccl, Box::new(control), stream), rank))
        };
        let controls = LocalGroup::with(world, HostCopier, deadline);
        let threads: Vec<_> = (0..).zip(controls).map(run).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn the_battery() {
    let sim = Sim::new();
    for world in [1, 2, 3, 4, 8] {
        let results = on_ranks(&sim, world, LONG, |group, rank| {
            let scratch = DeviceScratch(HostScratch::default(), rank);
            conformance::run_in(&group.unwrap(), &scratch)
        });
        assert_eq!(results, vec![Ok(()); world as usize]);
        assert_eq!(sim.violations(), 0);
    }
}

#[test]
fn a_deadline_counts_silence() {
    let sim = Sim::new();
    let checks = [conformance::outwait, conformance::outwait_none];
    for (check, tcp) in checks.into_iter().flat_map(|check| [(check, false), (check, true)]) {
        let held = Port::new();
        let port = held.number();
        let deadline = Duration::from_millis(800);
        let groups = LocalGroup::with(3, HostCopier, deadline);
        std::thread::scope(|scope| {
            let run = |(rank, local): (u32, LocalGroup)| {
                let (nccl, stream) = (sim.nccl(), sim.stream(rank));
                scope.spawn(move || {
                    let joined = || TcpControl::join(rank, 3, "127.0.0.1", port, deadline).unwrap();
                    let control: Box<dyn Control> =
                        if tcp { Box::new(joined()) } else { Box::new(local) };
                    let group = NcclGroup::init_with(nccl, control, stream).unwrap();
                    check(&group, &DeviceScratch(HostScratch::default(), rank))
                })
            };
            let threads: Vec<_> = (0..).zip(groups).map(run).collect();
            for thread in threads {
                assert_eq!(thread.join().unwrap(), Ok(()), "over TCP: {tcp}");
            }
        });
    }
}

#[test]
fn ranks_meet_over_tcp() {
    let sim = Sim::new();
    let held = Port::new();
    let port = held.number();
    std::thread::scope(|scope| {
        for rank in 0..3 {
            let (nccl, stream) = (sim.nccl(), sim.stream(rank));
            scope.spawn(move || {
                let control = TcpControl::join(rank, 3, "127.0.0.1", port, LONG).unwrap();
                let group = NcclGroup::init_with(nccl, Box::new(control), stream).unwrap();
                let scratch = DeviceScratch(HostScratch::default(), rank);
                conformance::run_in(&group, &scratch).unwrap();
            });
        }
    });
    assert_eq!(sim.violations(), 0);
}

/// All ranks broadcast to all, over and over, until something fails.
fn keep_busy(group: &NcclGroup) -> GroupError {
    let (rank, world) = (group.rank(), group.world_size());
    let space = Space::Device(rank);
    loop {
        let data = vec![rank as u8; 10_000];
        let mut into = vec![vec![0xEE; 10_000]; world as usize];
        let mut batch = Vec::new();
        for (root, into) in (0u32..).zip(&mut into) {
            // SAFETY: vectors that live until the batch is done.
            batch.push(unsafe {
                if root == rank {
                    let data = Src::from_addr(data.as_ptr() as u64, data.len(), space);
                    Op::Broadcast { data }
                } else {
                    let into = Dst::from_addr(into.as_mut_ptr() as u64, into.len(), space);
                    Op::BroadcastFrom { root, into }
                }
            });
        }
        if let Err(error) = group.exchange(batch) {
            return error;
        }
        for (root, into) in (0u32..).zip(&into).filter(|(root, _)| *root != rank) {
            assert!(into.iter().all(|byte| *byte == root as u8));
        }
    }
}

#[test]
fn an_abort_of_any_rank_ends_all() {
    let sim = Sim::new();
    for failing in 0..3 {
        let start = Instant::now();
        let errors = on_ranks(&sim, 3, LONG, |group, rank| {
            let group = group.unwrap();
            if rank == failing {
                std::thread::sleep(Duration::from_millis(20));
                group.abort("out of paper");
            }
            keep_busy(&group).to_string()
        });
        assert_eq!(errors, vec![format!("rank {failing} failed: out of paper"); 3]);
        assert!(start.elapsed() < LONG / 2);
        assert_eq!(sim.violations(), 0);
    }
}

/// Stands between a rank and rank 0, so that the connection can end as that of a killed process does.
struct Relay {
    port: u16,
    ends: Arc<Mutex<Option<(TcpStream, TcpStream)>>>,
}

impl Relay {
    /// Relays one connection to `port`.
    fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let relay = Self { port: listener.local_addr().unwrap().port(), ends: Arc::default() };
        let ends = relay.ends.clone();
        std::thread::spawn(move || {
            let (near, _) = listener.accept().unwrap();
            let far = loop {
                if let Ok(far) = TcpStream::connect(("127.0.0.1", port)) {
                    break far;
                }
            };
            let copy = |from: &TcpStream, to: &TcpStream| {
                let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                std::thread::spawn(move || std::io::copy(&mut from, &mut to));
            };
            // Ranks can meet, and one of them be cut off, once anything is copied.
            let mut ends = ends.lock().unwrap();
            copy(&near, &far);
            copy(&far, &near);
            *ends = Some((near, far));
        });
        relay
    }

    /// The ranks' ends first, all of them: rank 0, whose death this may stand for, lives on in this process, and
    /// would tell the others that those whose connections end are lost.
    fn cut(relays: &[Self]) {
        let ends: Vec<_> = relays.iter().map(|relay| relay.ends.lock().unwrap()).collect();
        let ends = || ends.iter().flat_map(|ends| ends.as_ref());
        ends().for_each(|(near, _)| near.shutdown(Shutdown::Both).unwrap());
        ends().for_each(|(_, far)| far.shutdown(Shutdown::Both).unwrap());
    }
}

/// NCCL itself does not tell: the others wait in an exchange for a rank that is gone.
#[test]
fn the_end_of_a_ranks_connection_ends_all() {
    let sim = Sim::new();
    for killed in 0..3u32 {
        let held = Port::new();
        let port = held.number();
        let relays = [Relay::to(port), Relay::to(port)];
        let start = Instant::now();
        let errors: Vec<Option<String>> = std::thread::scope(|scope| {
            let run = |rank: u32| {
                let (nccl, stream, relays) = (sim.nccl(), sim.stream(rank), &relays);
                scope.spawn(move || {
                    let port = rank.checked_sub(1).map_or(port, |at| relays[at as usize].port);
                    let control = TcpControl::join(rank, 3, "127.0.0.1", port, LONG).unwrap();
                    let group = NcclGroup::init_with(nccl, Box::new(control), stream).unwrap();
                    if rank != killed {
                        return Some(keep_busy(&group).to_string());
                    }
                    std::thread::sleep(Duration::from_millis(50));
                    Relay::cut(match rank.checked_sub(1) {
                        Some(at) => &relays[at as usize..][..1],
                        None => relays,
                    });
                    // A killed process says nothing more, neither to NCCL.
                    std::mem::forget(group);
                    None
                })
            };
            let threads: Vec<_> = (0..3).map(run).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for error in errors.into_iter().flatten() {
            assert!(error.starts_with(&format!("rank {killed} is lost: ")), "{error}");
        }
        assert!(start.elapsed() < LONG / 2);
        assert_eq!(sim.violations(), 0);
    }
}

#[test]
fn a_failing_call_is_told_with_its_words() {
    let sim = Sim::new();
    for (call, code, words) in [
        ("ncclBroadcast", 2, "ncclBroadcast: unhandled system error (ncclResult_t 2)"),
        ("ncclGroupEnd", 1, "ncclGroupEnd: unhandled cuda error (ncclResult_t 1)"),
        ("ncclCommGetAsyncError", 6, "exchange: remote process exited"),
        // A code that no version had yet.
        ("ncclBroadcast", 77, "ncclBroadcast: unknown result code (ncclResult_t 77)"),
    ] {
        let ready = std::sync::Barrier::new(3);
        let errors = on_ranks(&sim, 3, LONG, |group, rank| {
            let group = group.unwrap();
            ready.wait();
            if rank == 0 {
                sim.fail(call, 5, code);
            }
            ready.wait();
            keep_busy(&group).to_string()
        });
        assert!(errors.iter().all(|error| error.contains(words)), "{errors:?}");
        assert_eq!(sim.violations(), 0);
    }
}

#[test]
fn failures_while_forming_reach_all() {
    let sim = Sim::new();
    for call in ["ncclGetUniqueId", "ncclCommInitRankConfig"] {
        sim.fail(call, 1, 3);
        let errors = on_ranks(&sim, 3, LONG, |group, _| group.unwrap_err().to_string());
        let words = format!("{call}: internal error (ncclResult_t 3)");
        assert!(errors.iter().all(|error| error.contains(&words)), "{errors:?}");
    }
    assert_eq!(sim.violations(), 0);
}

#[test]
fn a_silent_rank_meets_the_deadline() {
    let sim = Sim::new();
    let done = std::sync::Barrier::new(2);
    // Long enough for both to have joined, which has the same deadline.
    let errors = on_ranks(&sim, 2, Duration::from_secs(2), |group, rank| {
        let group = group.unwrap();
        if rank == 0 {
            let error = keep_busy(&group).to_string();
            done.wait();
            return error;
        }
        done.wait();
        keep_busy(&group).to_string()
    });
    assert!(
        errors.iter().all(|error| error.contains("rank 0 waited 2s in exchange")),
        "{errors:?}"
    );
    assert_eq!(sim.violations(), 0);
}

#[test]
fn host_memory_is_refused() {
    let sim = Sim::new();
    let errors = on_ranks(&sim, 1, LONG, |group, _| {
        let data = [0u8; 4];
        group.unwrap().exchange(vec![Op::Broadcast { data: Src::from(&data[..]) }]).unwrap_err()
    });
    assert!(matches!(errors[0], GroupError::Memory { space: Space::Host, .. }), "{errors:?}");
}

#[test]
fn a_missing_library_is_an_error() {
    let error = Nccl::open_at("/nowhere/libnccl.so.2".as_ref()).unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("looked for /nowhere/libnccl.so.2: "), "{text}");
    assert!(text.contains("No such file"), "the loader's words are missing: {text}");
    // A library that is no NCCL.
    let error = Nccl::open_at("libc.so.6".as_ref()).unwrap_err();
    assert_eq!(error.to_string(), "libc.so.6 lacks ncclGetVersion");
}

/// Host memory that says it is a device's.
struct Device<R>(HostBackend<R>, u32);

// SAFETY: all is left to the host's backend.
unsafe impl<R: Reader> Backend for Device<R> {
    fn space(&self) -> Space {
        Space::Device(self.1)
    }

    fn stage(&self, bytes: u64) -> Result<Staging, Cause> {
        self.0.stage(bytes)
    }

    unsafe fn read(&self, ranges: &[ReadAt]) -> Result<(), (usize, Cause)> {
        // SAFETY: as asked of this function.
        unsafe { self.0.read(ranges) }
    }

    unsafe fn copy(&self, copies: &[CopyAt]) -> Result<(), Cause> {
        // SAFETY: as asked of this function.
        unsafe { self.0.copy(copies) }
    }

    unsafe fn zero(&self, addr: u64, len: u64) -> Result<(), Cause> {
        // SAFETY: as asked of this function.
        unsafe { self.0.zero(addr, len) }
    }
}

fn byte(at: u64) -> u8 {
    (at.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as u8
}

/// A file that holds `byte` everywhere.
struct Endless;

impl Reader for Endless {
    fn read(&self, ranges: &mut [ReadInto<'_>]) -> Result<(), (usize, Cause)> {
        for range in ranges {
            let (offset, into) = (range.offset, &mut *range.into);
            (offset..).zip(into).for_each(|(at, to)| *to = byte(at));
        }
        Ok(())
    }
}

#[test]
fn a_plan_loads_over_it() {
    let sim = Sim::new();
    let tensor = |name: &str, shape: [u64; 2], start: u64| {
        let (name, shape) = (name.to_owned(), shape.to_vec());
        TensorDesc { name, bits: 16, shape, shard: 0, file_range: start..start + 600_000 }
    };
    let tensors = [tensor("rows", [300, 1000], 0), tensor("columns", [400, 750], 600_000)];
    for world in [2, 3, 4] {
        let plan = Planner::new(Topology::one_node(world))
            .budget(1 << 20)
            .plan(&tensors[..], |t| match t.name.as_str() {
                "rows" => Shard::replicate(),
                _ => Shard::split(1),
            })
            .unwrap();
        let plan = &plan;
        on_ranks(&sim, world, LONG, |group, rank| {
            let view = plan.rank(rank);
            let mut outputs: Vec<Vec<u8>> =
                view.outputs().iter().map(|o| vec![0xEE; o.bytes as usize]).collect();
            let region =
                |o: &mut Vec<u8>| Region { addr: o.as_mut_ptr() as u64, len: o.len() as u64 };
            let regions: Vec<Region> = outputs.iter_mut().map(region).collect();
            let backend = Device(HostBackend::new(Endless), rank);
            // SAFETY: the regions are vectors that live on.
            unsafe { fst_dist::load(&view, &group.unwrap(), &backend, &regions) }.unwrap();
            assert!((0..).zip(&outputs[0]).all(|(at, found)| *found == byte(at)), "rank {rank}");
            let width = 750u64.div_ceil(u64::from(world));
            let mine = u64::from(rank) * width..750.min(u64::from(rank + 1) * width);
            let expected = (0..400).flat_map(|row| {
                let at = |column: u64| 600_000 + (row * 750 + column) * 2;
                (at(mine.start)..at(mine.end)).map(byte)
            });
            assert!(expected.eq(outputs[1].iter().copied()), "rank {rank}");
        });
        assert_eq!(sim.violations(), 0);
    }
}
