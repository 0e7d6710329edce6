#![cfg(all(target_os = "linux", not(fst_portable)))] // system calls and engines that others have not
#![allow(clippy::unwrap_used)] // helpers of tests, too
#![allow(clippy::panic)]
#![allow(clippy::field_reassign_with_default)] // options are non-exhaustive

//! Machines that refuse what the fast path wants: system calls filtered by seccomp, file systems
//! without direct I/O or on top of others, signals. Bytes arrive all the same, and the report says
//! what was refused.
//!
//! Each case runs in a child process: this program again, told by its environment what to read.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::{env, fs, io};

use fst_io::place::{InPlace, Layout};
use fst_io::plan::{Block, Limits, ReadPlan};
use fst_io::ranges::{RangeInto, Ranges};
use fst_io::scratch::Scratch;
use fst_io::sink::{Sink, SinkError, Target};
use fst_io::{
    CachePolicy, Control, DirectIo, Engine, Error, Extent, HostBuffer, ReadOptions, ReadStats,
    ResolvedEngine, SharedBuffer, SourceFile,
};

const CHILD: &str = "FST_TEST_READ";
const LEN: usize = (5 << 20) + 4097;

fn bytes(len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

/// Reads a file as a checkpoint is read, and compares it with what it should hold.
fn check(path: &Path, options: &ReadOptions) -> Result<(ReadStats, DirectIo), Error> {
    let files = [SourceFile::open(path, None)?];
    let limits = Limits { block: 256 << 10, align: files[0].align(), ..Limits::default() };
    let len = files[0].len();
    let plan = ReadPlan::new(vec![Extent::new(0, 0..len)], limits)?;
    let layout = Layout::new(&plan, u64::MAX);
    let arenas = Mutex::new(Vec::new());
    let keep = |_, arena: SharedBuffer| {
        arenas.lock().unwrap().push(arena);
        Ok(())
    };
    let sink = InPlace::new(&plan, &layout, None, &keep);
    let stats = fst_io::read(&files, &plan, &sink, options, &Control::new())?;
    let arenas = arenas.lock().unwrap();
    assert!(arenas[0][..len as usize] == bytes(len as usize), "{} differs", path.display());
    Ok((stats, files[0].direct_io().clone()))
}

/// The part that runs in a child: every engine that there is, through and around the cache. One
/// line for each, which the parent checks.
#[test]
fn child() {
    let Some(path) = env::var_os(CHILD) else { return };
    for engine in [Engine::Auto, Engine::Uring, Engine::Pread, Engine::Mmap] {
        for cache in [CachePolicy::Residency, CachePolicy::Direct, CachePolicy::Buffered] {
            let mut options = ReadOptions::default();
            (options.engine, options.cache) = (engine, cache);
            match check(Path::new(&path), &options) {
                Ok((stats, direct)) => {
                    println!("{engine}: {}: {}; {direct:?}", stats.engine.used, stats.engine.reason)
                }
                Err(Error::EngineUnavailable { reason, .. }) => {
                    println!("{engine}: none: {reason}")
                }
                Err(error) => panic!("{engine} {cache:?}: {error}"),
            }
        }
    }
}

fn this_program(path: &Path) -> Command {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "child", "--nocapture", "--test-threads=1"]).env(CHILD, path);
    command
}

fn lines(output: &Output) -> Vec<String> {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    let engines = ["auto: ", "uring: ", "pread: ", "mmap: "];
    let lines: Vec<_> = text
        .lines()
        .filter_map(|line| Some(line[engines.iter().find_map(|e| line.find(e))?..].to_owned()))
        .collect();
    assert_eq!(lines.len(), 12, "{text}");
    lines
}

/// Tells that a case did not run, past the test harness, which hides what passing tests print.
fn skipped(what: &str) {
    io::stderr().write_all(format!("SKIPPED: {what}\n").as_bytes()).unwrap();
}

fn file_in(folder: &Path) -> std::path::PathBuf {
    let path = folder.join("data");
    fs::write(&path, bytes(LEN)).unwrap();
    path
}

fn disk_folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// A system call that is refused, always or when an argument has a bit set or is a value.
struct Refuse {
    call: libc::c_long,
    when: Option<(u32, u16, u32)>,
    errno: i32,
}

const JUMP_SET: u16 = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
const JUMP_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;

/// The filter program for the kernel (`seccomp(2)`): for each rule, compare and return.
fn filter(rules: &[Refuse]) -> Vec<libc::sock_filter> {
    let load = |offset| libc::sock_filter {
        code: (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16,
        jt: 0,
        jf: 0,
        k: offset,
    };
    let answer =
        |k| libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k };
    let mut program = Vec::new();
    for rule in rules {
        program.push(load(0));
        let skip = if rule.when.is_some() { 3 } else { 1 };
        program.push(libc::sock_filter { code: JUMP_EQUAL, jt: 0, jf: skip, k: rule.call as u32 });
        if let Some((argument, code, k)) = rule.when {
            program.push(load(16 + 8 * argument)); // the lower half, little endian
            program.push(libc::sock_filter { code, jt: 0, jf: 1, k });
        }
        program.push(answer(libc::SECCOMP_RET_ERRNO | rule.errno as u32));
    }
    program.push(answer(libc::SECCOMP_RET_ALLOW));
    program
}

/// Has the calling thread, and what it starts, run under a filter.
fn install(program: &mut [libc::sock_filter]) -> io::Result<()> {
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the kernel copies the program, which lives until the call returns.
    let installed = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) == 0
    };
    if installed { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn under_filter(path: &Path, rules: &[Refuse]) -> Vec<String> {
    let mut program = filter(rules);
    let mut command = this_program(path);
    // SAFETY: between fork and exec, only two system calls are made, on memory that the closure
    // owns.
    unsafe {
        command.pre_exec(move || install(&mut program));
    }
    lines(&command.output().unwrap())
}

fn count(lines: &[String], part: &str) -> usize {
    lines.iter().filter(|line| line.contains(part)).count()
}

#[test]
fn without_io_uring_threads_read_and_the_reason_is_told() {
    let folder = disk_folder();
    let path = file_in(folder.path());
    for (errno, why) in [(libc::EPERM, "filtered by seccomp, or off by"), (libc::ENOSYS, "not in")]
    {
        let call = libc::SYS_io_uring_setup;
        let lines = under_filter(&path, &[Refuse { call, when: None, errno }]);
        assert_eq!(count(&lines, "auto: pread: io_uring is refused"), 3, "{lines:?}");
        assert_eq!(count(&lines, "uring: none: io_uring is refused"), 3, "{lines:?}");
        assert_eq!(count(&lines, why), 6, "{lines:?}");
    }
}

#[test]
fn without_direct_io_everything_goes_through_the_cache() {
    let folder = disk_folder();
    let path = file_in(folder.path());
    let when = Some((2, JUMP_SET, libc::O_DIRECT as u32));
    let rule = Refuse { call: libc::SYS_openat, when, errno: libc::EINVAL };
    let lines = under_filter(&path, &[rule]);
    assert_eq!(count(&lines, &format!("Refused({})", libc::EINVAL)), 12, "{lines:?}");
}

#[test]
fn an_old_kernel_does_too() {
    let folder = disk_folder();
    let path = file_in(folder.path());
    let refuse = |call, when, errno| Refuse { call, when, errno };
    let populate = Some((2, JUMP_EQUAL, libc::MADV_POPULATE_WRITE as u32));
    let huge = Some((2, JUMP_EQUAL, libc::MADV_HUGEPAGE as u32));
    let lines = under_filter(
        &path,
        &[
            refuse(libc::SYS_io_uring_setup, None, libc::ENOSYS),
            refuse(451, None, libc::ENOSYS), // cachestat
            refuse(libc::SYS_statx, None, libc::ENOSYS),
            refuse(libc::SYS_madvise, populate, libc::EINVAL),
            refuse(libc::SYS_madvise, huge, libc::EINVAL),
            refuse(libc::SYS_process_vm_readv, None, libc::EPERM),
        ],
    );
    assert_eq!(count(&lines, "auto: pread"), 3, "{lines:?}");
    assert_eq!(count(&lines, "mmap: none: process_vm_readv is refused"), 3, "{lines:?}");
}

#[test]
fn rings_that_can_be_made_and_not_used_are_not_used() {
    let folder = disk_folder();
    let path = file_in(folder.path());
    let call = libc::SYS_io_uring_enter;
    let lines = under_filter(&path, &[Refuse { call, when: None, errno: libc::EPERM }]);
    assert_eq!(count(&lines, "auto: pread: io_uring is refused"), 3, "{lines:?}");
    assert_eq!(count(&lines, "uring: none: io_uring is refused"), 3, "{lines:?}");
}

/// Lends an inner sink's memory, and at the n-th block has its thread lose `io_uring_enter(2)`.
struct Sabotage<S> {
    inner: S,
    after: u64,
    errno: i32,
    lent: AtomicU64,
    lost: AtomicU64,
    /// Where the memory of lost targets is.
    places: Mutex<Vec<usize>>,
}

impl<S> Sabotage<S> {
    fn of(inner: S, after: u64, errno: i32) -> Self {
        let (lent, lost) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { inner, after, errno, lent, lost, places: Mutex::default() }
    }
}

// SAFETY: the inner sink's targets, passed on.
unsafe impl<S: Sink> Sink for Sabotage<S> {
    fn reserve(&self, block: &Block, wait: bool) -> Result<Option<Target>, SinkError> {
        if self.lent.fetch_add(1, Relaxed) == self.after {
            let call = libc::SYS_io_uring_enter;
            install(&mut filter(&[Refuse { call, when: None, errno: self.errno }])).unwrap();
        }
        self.inner.reserve(block, wait)
    }

    fn reused(&self) -> Option<(NonNull<u8>, usize)> {
        self.inner.reused()
    }

    fn landed(&self, block: &Block, target: Target) -> Result<(), SinkError> {
        self.inner.landed(block, target)
    }

    fn abandoned(&self, block: &Block, target: Target) {
        self.inner.abandoned(block, target);
    }

    fn lost(&self, block: &Block, target: Target) -> Option<Target> {
        self.lost.fetch_add(1, Relaxed);
        self.places.lock().unwrap().push(target.ptr().as_ptr() as usize);
        self.inner.lost(block, target)
    }
}

/// Whether a page is mapped.
fn is_mapped(address: usize) -> bool {
    let mut present = [0u8];
    let page = std::ptr::without_provenance_mut(address / 4096 * 4096);
    // SAFETY: the call looks at no byte of the page, and answers with one byte.
    unsafe { libc::mincore(page, 1, present.as_mut_ptr()) == 0 }
}

/// Reads around the cache on a thread of its own, which the filter then goes with.
fn sabotaged(path: &Path, read: impl FnOnce(&[SourceFile], &ReadPlan, &ReadOptions) + Send) {
    let files = [SourceFile::open(path, None).unwrap()];
    let limits = Limits { block: 64 << 10, align: files[0].align(), ..Limits::default() };
    let plan = ReadPlan::new(vec![Extent::new(0, 0..5 << 20)], limits).unwrap();
    let mut options = ReadOptions::default();
    (options.engine, options.cache) = (Engine::Uring, CachePolicy::Direct);
    (options.workers, options.depth) = (Some(1), Some(8));
    std::thread::scope(|scope| scope.spawn(|| read(&files, &plan, &options)).join().unwrap());
}

#[test]
fn a_ring_that_fails_in_mid_read_ends_it_and_frees_nothing() {
    let folder = disk_folder();
    let path = file_in(folder.path());
    if ResolvedEngine::resolve(Engine::Uring).is_err() {
        return skipped("no io_uring here");
    }
    for after in [0, 1, 20] {
        sabotaged(&path, |files, plan, options| {
            let layout = Layout::new(plan, u64::MAX);
            let sink = InPlace::new(plan, &layout, None, &|_, _| panic!("it is not complete"));
            let sink = Sabotage::of(sink, after, libc::EPERM);
            let error = fst_io::read(files, plan, &sink, options, &Control::new()).unwrap_err();
            let Error::Ring { source } = &error else { panic!("{error}") };
            assert_eq!(source.raw_os_error(), Some(libc::EPERM));
            let lost = sink.lost.load(Relaxed);
            // Before the first call the kernel has nothing in hand.
            assert!(after > 0 || lost == 0, "{lost} blocks lost");
            eprintln!("{lost} blocks lost after {after}");
            let places = std::mem::take(&mut *sink.places.lock().unwrap());
            drop(sink);
            assert!(places.iter().all(|place| is_mapped(*place)), "the kernel may write to it");
        });
    }
    // Memory of others cannot be lost; here the kernel has nothing of it.
    sabotaged(&path, |files, _, options| {
        let memory = HostBuffer::new(5 << 20).unwrap();
        // SAFETY: the buffer is this closure's.
        let memory =
            unsafe { std::slice::from_raw_parts_mut(memory.as_ptr().as_ptr().cast(), 5 << 20) };
        let range = RangeInto { file: 0, start: 0, into: memory };
        let mut ranges = Ranges::new(files, [range], 0).unwrap();
        let slots = ranges.slots().unwrap();
        let (plan, sink) = ranges.direct.sink(&slots, &|_, _| Ok(()));
        let sink = Sabotage::of(sink, 0, libc::EPERM);
        let error = fst_io::read(files, plan, &sink, options, &Control::new()).unwrap_err();
        assert!(matches!(error, Error::Ring { .. }), "{error}");
    });
    let met = (0..50).any(|_| {
        let mut places = Vec::new();
        sabotaged(&path, |files, plan, options| {
            let take = |_: &Block, _: &[u8]| Ok(());
            let sink = Scratch::new(plan, 16, &|_, _| Ok(true), &take).unwrap();
            let sink = Sabotage::of(sink, 20, libc::EPERM);
            let error = fst_io::read(files, plan, &sink, options, &Control::new()).unwrap_err();
            assert!(matches!(error, Error::Ring { .. }), "{error}");
            places = std::mem::take(&mut *sink.places.lock().unwrap());
        });
        assert!(places.iter().all(|place| is_mapped(*place)), "the kernel may write to it");
        // With older kernels, all may have arrived by then.
        !places.is_empty()
    });
    assert!(met, "no block was under way");
}

#[test]
fn rings_whose_operations_cannot_be_asked_about_are_not_used() {
    let folder = disk_folder();
    let path = file_in(folder.path());
    let call = libc::SYS_io_uring_register;
    let lines = under_filter(&path, &[Refuse { call, when: None, errno: libc::EINVAL }]);
    assert_eq!(count(&lines, "auto: pread: io_uring is refused"), 3, "{lines:?}");
}

#[test]
fn rings_that_nothing_may_be_registered_with_are_used_without() {
    let folder = disk_folder();
    let path = file_in(folder.path());
    if ResolvedEngine::resolve(Engine::Uring).is_err() {
        return skipped("no io_uring here");
    }
    const BUFFERS: u32 = 0; // IORING_REGISTER_BUFFERS
    const FILES: u32 = 2; // IORING_REGISTER_FILES
    let refuse = |operation| {
        let (call, when) = (libc::SYS_io_uring_register, Some((1, JUMP_EQUAL, operation)));
        Refuse { call, when, errno: libc::ENOMEM }
    };
    let lines = under_filter(&path, &[refuse(BUFFERS), refuse(FILES)]);
    assert_eq!(count(&lines, "auto: uring: "), 3, "{lines:?}");
}

/// Mounts a file system over `$1/at`, and becomes the program that is the rest of the arguments.
/// Status 77: it cannot be mounted here.
fn mounted(folder: &Path, mount: &str) -> Option<Vec<String>> {
    let at = folder.join("at");
    fs::create_dir_all(&at).unwrap();
    let script =
        format!("mount --make-rprivate / && {{ {mount}; }} || exit 77; shift; exec \"$@\"");
    let program = this_program(&at.join("data"));
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", &script, "sh"]).arg(folder);
    command.arg(program.get_program()).args(program.get_args());
    let output = command.env(CHILD, at.join("data")).output();
    match output {
        Ok(output) if output.status.success() => Some(lines(&output)),
        // What `unshare` and `sh` answer when the namespace or the mount is refused.
        Ok(output) if matches!(output.status.code(), Some(1 | 77)) => {
            let why = String::from_utf8_lossy(&output.stderr).into_owned();
            let refused = ["unshare", "mount"].iter().any(|who| why.contains(who));
            assert!(refused && !why.contains("panicked"), "{why}");
            skipped(&format!("{mount}: {}", why.trim()));
            None
        }
        Ok(output) => panic!("{output:?}"),
        Err(error) => {
            skipped(&format!("{mount}: {error}"));
            None
        }
    }
}

#[test]
fn file_systems_of_all_kinds_are_read() {
    for mount in [
        "mkdir $1/up $1/work && mount -t overlay overlay \
         -o lowerdir=$1/low,upperdir=$1/up,workdir=$1/work $1/at",
        "mount --bind $1/low $1/at && mount -o remount,ro,bind $1/at && ! touch $1/at/x",
        "mount -t tmpfs -o size=64m tmpfs $1/at && cp $1/low/data $1/at",
        "mount -t ramfs ramfs $1/at && cp $1/low/data $1/at",
    ] {
        let folder = disk_folder();
        let low = folder.path().join("low");
        fs::create_dir(&low).unwrap();
        file_in(&low);
        if let Some(lines) = mounted(folder.path(), mount) {
            eprintln!("{mount}: {}", lines[0]);
        }
    }
}

static SIGNALS: AtomicU64 = AtomicU64::new(0);

extern "C" fn count_signal(_: libc::c_int) {
    SIGNALS.fetch_add(1, Relaxed);
}

#[test]
fn signals_do_not_disturb_a_read() {
    let folder = disk_folder();
    let path = file_in(folder.path());
    // SAFETY: all-zero bytes are a valid `sigaction` (no flags: calls are interrupted, not
    // restarted), and the handler only counts.
    unsafe {
        let mut action = std::mem::zeroed::<libc::sigaction>();
        action.sa_sigaction = count_signal as *const () as usize;
        assert_eq!(libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut()), 0);
    }
    // SAFETY: no memory is involved.
    let reader = unsafe { libc::pthread_self() };
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Relaxed) {
                // SAFETY: the reader is the thread that waits for this scope's end.
                unsafe { libc::pthread_kill(reader, libc::SIGUSR1) };
                std::thread::sleep(std::time::Duration::from_micros(20));
            }
        });
        for engine in [Engine::Uring, Engine::Pread, Engine::Mmap] {
            let before = SIGNALS.load(Relaxed);
            while SIGNALS.load(Relaxed) < before + 20 {
                let mut options = ReadOptions::default();
                (options.engine, options.cache) = (engine, CachePolicy::Direct);
                options.workers = Some(1); // the calling thread
                match check(&path, &options) {
                    Ok(_) => {}
                    Err(Error::EngineUnavailable { reason, .. }) => {
                        skipped(&format!("{engine}: {reason}"));
                        break;
                    }
                    Err(error) => panic!("{engine}: {error}"),
                }
            }
        }
        over.store(true, Relaxed);
    });
}

#[test]
fn without_threads_one_reads() {
    let folder = disk_folder();
    let path = file_in(folder.path());
    let refuse = |call| Refuse { call, when: None, errno: libc::EAGAIN };
    let lines = under_filter(&path, &[refuse(libc::SYS_clone3), refuse(libc::SYS_clone)]);
    assert_eq!(count(&lines, "pread: pread"), 3, "{lines:?}");
}
