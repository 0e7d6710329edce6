//! The test's side: finds and opens the shared library, steers it, checks what is left.

use std::ffi::{CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// Why the simulator is not there.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum SimError {
    /// The library was not found beside the test's executable.
    Missing {
        /// Where it was looked for.
        looked_for: Vec<PathBuf>,
    },
    /// It did not open, or lacks a symbol.
    Open {
        /// The library.
        path: PathBuf,
        /// The loader's words.
        cause: String,
    },
}

impl std::fmt::Display for SimError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Missing { looked_for } => {
                write!(f, "the simulated driver is not built; looked for {looked_for:?}")
            }
            Self::Open { path, cause } => write!(f, "{}: {cause}", path.display()),
        }
    }
}

impl std::error::Error for SimError {}

/// The simulator, open in this process.
#[derive(Debug)]
pub struct Sim {
    path: PathBuf,
    reset: extern "C" fn(u64, u64),
    fail: unsafe extern "C" fn(*const c_char, u64, i32),
    calls: unsafe extern "C" fn(*const c_char) -> u64,
    set: unsafe extern "C" fn(*const c_char, i64) -> bool,
    add_kernels: unsafe extern "C" fn(*const c_char) -> bool,
    stream_hook: extern "C" fn(extern "C" fn(*mut c_void) -> i32),
    report: unsafe extern "C" fn(*mut u8, usize) -> usize,
}

/// What is alive in the simulator, and what went wrong.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs)]
#[non_exhaustive]
pub struct Report {
    pub arrays: u64,
    pub device_bytes: u64,
    pub pinned_ranges: u64,
    pub pinned_bytes: u64,
    pub streams: u64,
    pub events: u64,
    pub modules: u64,
    pub contexts: u64,
    pub cufile_files: u64,
    pub cufile_buffers: u64,
    pub pending: u64,
    pub copied_bytes: u64,
    /// Modules that were compiled from PTX.
    pub compiled_here: u64,
    /// Simulated nanoseconds since the clock was started, while it runs.
    pub clock_ns: u64,
    /// When the first copy to a device began, and when the last one ends.
    pub first_copy_ns: u64,
    pub last_copy_ns: u64,
    /// How long copies to devices take together.
    pub link_busy_ns: u64,
    /// Calls that took ten simulated microseconds and more.
    pub spans: Vec<Span>,
    /// Misuses, in the order in which they were seen.
    pub violations: Vec<String>,
}

/// A call that took long, in simulated nanoseconds since the clock was started.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
#[non_exhaustive]
pub struct Span {
    pub call: String,
    pub thread: String,
    pub began: u64,
    pub ended: u64,
}

impl Span {
    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let (call, thread) = (words.next()?.to_owned(), words.next()?.to_owned());
        let (began, ended) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        Some(Self { call, thread, began, ended })
    }
}

impl Report {
    /// Reads what a process left in the file that `FST_SIM_REPORT` named.
    pub fn parse(text: &str) -> Self {
        let mut report = Self::default();
        for line in text.lines() {
            let (name, value) = line.split_once(' ').unwrap_or((line, ""));
            let number = value.parse().unwrap_or(0);
            match name {
                "arrays" => report.arrays = number,
                "device_bytes" => report.device_bytes = number,
                "pinned_ranges" => report.pinned_ranges = number,
                "pinned_bytes" => report.pinned_bytes = number,
                "streams" => report.streams = number,
                "events" => report.events = number,
                "modules" => report.modules = number,
                "contexts" => report.contexts = number,
                "cufile_files" => report.cufile_files = number,
                "cufile_buffers" => report.cufile_buffers = number,
                "pending" => report.pending = number,
                "copied_bytes" => report.copied_bytes = number,
                "compiled_here" => report.compiled_here = number,
                "clock_ns" => report.clock_ns = number,
                "first_copy_ns" => report.first_copy_ns = number,
                "last_copy_ns" => report.last_copy_ns = number,
                "link_busy_ns" => report.link_busy_ns = number,
                "span" => report.spans.extend(Span::parse(value)),
                _ => report.violations.push(value.to_owned()),
            }
        }
        report
    }

    /// What a finished test must not leave behind; empty when all is well.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = self.violations.clone();
        for (what, count) in [
            ("device allocations", self.arrays),
            ("pinned ranges", self.pinned_ranges),
            ("streams", self.streams),
            ("events", self.events),
            ("modules", self.modules),
            ("context references", self.contexts),
            ("files registered with cuFile", self.cufile_files),
            ("buffers registered with cuFile", self.cufile_buffers),
            ("queued operations", self.pending),
        ] {
            if count > 0 {
                faults.push(format!("{count} {what} left"));
            }
        }
        faults
    }
}

static SIM: OnceLock<Result<Sim, SimError>> = OnceLock::new();
static TURN: Mutex<()> = Mutex::new(());

fn c_text(text: &str) -> CString {
    CString::new(text.replace('\0', "")).unwrap_or_default()
}

impl Sim {
    /// Opens the simulator for the rest of the process. Call it before anything asks for
    /// `libcuda.so`; afterwards that name leads here, with no environment variable set.
    pub fn load() -> Result<&'static Sim, SimError> {
        SIM.get_or_init(Self::open).as_ref().map_err(Clone::clone)
    }

    fn open() -> Result<Sim, SimError> {
        let mut looked_for = Vec::new();
        let executable = std::env::current_exe().unwrap_or_default();
        // Test binaries lie in target/PROFILE/deps, programs one level above.
        for folder in executable.ancestors().skip(1).take(2) {
            for name in ["libcuda_sim.so", "deps/libcuda_sim.so"] {
                let path = folder.join(name);
                if path.is_file() {
                    return Self::open_at(&path);
                }
                looked_for.push(path);
            }
        }
        Err(SimError::Missing { looked_for })
    }

    fn open_at(path: &Path) -> Result<Sim, SimError> {
        let cause =
            |e: libloading::Error| SimError::Open { path: path.to_owned(), cause: e.to_string() };
        // SAFETY: our own library: its initialisers do nothing, and the symbols have the
        // signatures of `control`. It is never closed, so the function pointers stay valid.
        unsafe {
            let library =
                std::mem::ManuallyDrop::new(libloading::Library::new(path).map_err(cause)?);
            Ok(Sim {
                path: path.to_owned(),
                reset: *library.get(b"fst_sim_reset\0").map_err(cause)?,
                fail: *library.get(b"fst_sim_fail\0").map_err(cause)?,
                calls: *library.get(b"fst_sim_calls\0").map_err(cause)?,
                set: *library.get(b"fst_sim_set\0").map_err(cause)?,
                add_kernels: *library.get(b"fst_sim_add_kernels\0").map_err(cause)?,
                stream_hook: *library.get(b"fst_sim_stream_hook\0").map_err(cause)?,
                report: *library.get(b"fst_sim_report\0").map_err(cause)?,
            })
        }
    }

    /// The shared library's path (it exports cuFile's functions too).
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The environment that puts the simulator into a program started by a test; `report` is where
    /// it leaves its [`Report`] at exit. `FST_SIM_DEVICES` and the others (see the crate's page)
    /// may be added.
    pub fn environment(&self, report: &Path) -> [(&'static str, PathBuf); 2] {
        [("LD_PRELOAD", self.path.clone()), ("FST_SIM_REPORT", report.to_owned())]
    }

    /// Takes the simulator for one test: a fresh machine, and a check on drop that nothing leaked
    /// and nothing was misused. Tests of a process take turns.
    pub fn exclusive(&'static self, devices: u64, memory: u64) -> Guard {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        (self.reset)(devices, memory);
        Guard { sim: self, check: true, _turn: turn }
    }

    /// Makes the `nth` use from now on of `call` return `code` (see `run:copy` and `run:launch`
    /// for failures of work already accepted, `register:file` for registrations of files' mappings). `NAME@DEVICE` counts uses on one device only.
    pub fn fail(&self, call: &str, nth: u64, code: i32) {
        // SAFETY: a NUL-terminated string.
        unsafe { (self.fail)(c_text(call).as_ptr(), nth, code) }
    }

    /// Uses of `call` since the test took the simulator.
    pub fn calls(&self, call: &str) -> u64 {
        // SAFETY: a NUL-terminated string.
        unsafe { (self.calls)(c_text(call).as_ptr()) }
    }

    /// Changes a setting: `driver_version`, `read_only_register`, `batch_copies`, `allocation_unit` (bytes
    /// that long allocations take are a multiple of it), `host_pointers`
    /// (registered memory has the host's addresses on the device), `capability` (80 is 8.0), `integrated` and
    /// `coherent` (the device has no memory but the host's; it reads that, too), `patience`
    /// (queries answered "not ready" before one lets work run), `cufile_most` (bytes of a read),
    /// `cufile_flags` (status flags of its driver), `cufile_p2p` (its flags for NVMe), `discard` (copies
    /// and kernels move nothing, and device memory has no bytes), `cost_NAME` (of the table in `clock.rs`).
    /// False if there is none of that name.
    pub fn set(&self, name: &str, value: i64) -> bool {
        // SAFETY: a NUL-terminated string.
        unsafe { (self.set)(c_text(name).as_ptr(), value) }
    }

    /// Starts the clock at 0, so that simulated time passes `scale` times as slowly as real time; 0 stops it.
    pub fn run_clock(&self, scale: f64) {
        self.set("clock_percent", (scale * 100.0) as i64);
    }

    /// Adds a library of host kernels. False if it does not open.
    pub fn add_kernels(&self, path: &Path) -> bool {
        // SAFETY: a NUL-terminated string.
        unsafe { (self.add_kernels)(c_text(&path.to_string_lossy()).as_ptr()) }
    }

    /// Has `hook` asked, once a stream's own work is done, whether another simulated library's work
    /// on it is done too (0 if not).
    pub fn stream_hook(&self, hook: extern "C" fn(*mut c_void) -> i32) {
        (self.stream_hook)(hook);
    }

    /// What is alive now.
    pub fn report(&self) -> Report {
        let mut text = vec![0; 1 << 16];
        loop {
            // SAFETY: the buffer is as long as said.
            let len = unsafe { (self.report)(text.as_mut_ptr(), text.len()) };
            if len <= text.len() {
                return Report::parse(&String::from_utf8_lossy(&text[..len]));
            }
            text.resize(2 * len, 0);
        }
    }
}

/// A test's turn with the simulator.
#[derive(Debug)]
pub struct Guard {
    sim: &'static Sim,
    check: bool,
    _turn: MutexGuard<'static, ()>,
}

impl Guard {
    /// For tests that leave things behind on purpose.
    pub fn skip_check(&mut self) {
        self.check = false;
    }
}

impl std::ops::Deref for Guard {
    type Target = Sim;

    fn deref(&self) -> &Sim {
        self.sim
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let faults = self.sim.report().faults();
        if self.check && !std::thread::panicking() {
            assert!(faults.is_empty(), "the simulated driver found: {faults:#?}");
        }
    }
}
