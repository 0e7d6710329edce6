#![allow(clippy::unwrap_used, clippy::panic)]
#![allow(clippy::field_reassign_with_default)] // options are non-exhaustive

//! A panic in a callback ends the read, for all workers; so does a cancelled control.

use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::channel;
use std::time::Duration;

use fst_io::place::{InPlace, Layout};
use fst_io::plan::{Block, Limits, ReadPlan};
use fst_io::ranges::{RangeInto, Ranges};
use fst_io::scratch::Scratch;
use fst_io::sink::{Sink, SinkError};
use fst_io::{Budget, Control, Engine, Error, Extent, ReadOptions, SharedBuffer, SourceFile};

const MIB: u64 = 1 << 20;
const ENGINES: [Engine; 3] = [Engine::Pread, Engine::Uring, Engine::Mmap];

/// What `act` returns, unless it takes longer than anything here may take: then the process ends.
fn within_a_minute<T>(what: &str, act: impl FnOnce() -> T) -> T {
    let (ended, end) = channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            use std::sync::mpsc::RecvTimeoutError::Timeout;
            if end.recv_timeout(Duration::from_secs(60)) == Err(Timeout) {
                eprintln!("{what}: still waiting");
                std::process::abort();
            }
        });
        let result = act();
        drop(ended);
        result
    })
}

struct Case {
    files: [SourceFile; 1],
    plan: ReadPlan,
    options: ReadOptions,
    _folder: tempfile::TempDir,
}

impl Case {
    /// Segments of a MiB, in blocks of 64 KiB; `None` where the engine cannot run.
    fn new(engine: Engine) -> Option<Self> {
        if let Err(error) = fst_io::ResolvedEngine::resolve(engine) {
            eprintln!("SKIPPED: {error}");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, vec![0xaa; 16 << 20]).unwrap();
        let files = [SourceFile::open(&path, None).unwrap()];
        let limits = Limits { block: 64 << 10, segment: MIB, gap: 0, ..Limits::default() };
        let extents = (0..16).map(|i| Extent::new(0, i * MIB..(i + 1) * MIB)).collect();
        let plan = ReadPlan::new(extents, limits).unwrap();
        let mut options = ReadOptions::default();
        (options.engine, options.workers) = (engine, Some(4));
        Some(Self { files, plan, options, _folder: folder })
    }

    fn read(&self, sink: &dyn Sink, control: &Control) -> Result<(), Error> {
        fst_io::read(&self.files, &self.plan, sink, &self.options, control).map(drop)
    }

    /// Reads into `sink`, whose callback panics.
    fn panics(&self, what: &str, sink: &dyn Sink) {
        self.ends_in_panic(what, || self.read(sink, &Control::new()));
    }

    fn ends_in_panic(&self, what: &str, read: impl FnOnce() -> Result<(), Error>) {
        let what = format!("{what}, {}", self.options.engine);
        let read = || read().map_err(|e| e.to_string());
        let result = within_a_minute(&what, || catch_unwind(AssertUnwindSafe(read)));
        assert!(result.is_err(), "{what}: {result:?}");
    }
}

/// Panics when first called.
fn once() -> impl Fn() + Send + Sync {
    let called = AtomicBool::new(false);
    move || assert!(called.swap(true, Relaxed), "as the test wants")
}

#[test]
fn a_panic_where_blocks_are_taken() {
    for case in ENGINES.into_iter().filter_map(Case::new) {
        let panic = once();
        let take = |_: &Block, _: &[u8]| -> Result<(), SinkError> {
            panic();
            Ok(())
        };
        let sink = Scratch::new(&case.plan, 1, &|_, _| Ok(true), &take).unwrap();
        case.panics("take", &sink);
        let panic = once();
        let admit = |_: &Block, _| {
            panic();
            Ok(false)
        };
        let sink = Scratch::new(&case.plan, 2, &admit, &|_, _| Ok(())).unwrap();
        case.panics("admit", &sink);
    }
}

#[test]
fn a_panic_where_arenas_land_within_a_budget() {
    for case in ENGINES.into_iter().filter_map(Case::new) {
        let layout = Layout::new(&case.plan, MIB);
        let budget = Budget::new(MIB);
        let panic = once();
        let landed = |_: &Block| panic();
        let sink = InPlace::new(&case.plan, &layout, Some(&budget), &|_, _| Ok(()));
        case.panics("landed", &sink.on_landed(&landed));
        let panic = once();
        // Kept, so that the others wait for the budget.
        let kept = std::sync::Mutex::new(None);
        let full = |_: usize, buffer: SharedBuffer| -> Result<(), SinkError> {
            *kept.lock().unwrap() = Some(buffer);
            panic();
            Ok(())
        };
        case.panics("full", &InPlace::new(&case.plan, &layout, Some(&budget), &full));
    }
}

#[test]
fn a_panic_around_memory_of_the_caller() {
    for case in ENGINES.into_iter().filter_map(Case::new) {
        let mut memory = vec![MaybeUninit::new(0); 16 << 20];
        let range = RangeInto { file: 0, start: 0, into: &mut memory };
        let ranges = Ranges::new(&case.files, [range], 0).unwrap();
        let (slots, panic) = (ranges.slots().unwrap(), once());
        let landed = |_, _| {
            panic();
            Ok(())
        };
        let follow = || Arc::new(Control::new());
        case.ends_in_panic("landed", || {
            ranges.read(&case.files, &case.options, &slots, &follow, &landed).map(drop)
        });
    }
}

#[test]
fn cancelling_ends_those_who_wait_for_memory() {
    for case in ENGINES.into_iter().filter_map(Case::new) {
        let layout = Layout::new(&case.plan, MIB);
        let budget = Budget::new(MIB);
        let _taken = budget.take(MIB).unwrap();
        let sink = InPlace::new(&case.plan, &layout, Some(&budget), &|_, _| Ok(()));
        let control = Control::new();
        let result = within_a_minute("cancelled", || {
            std::thread::scope(|scope| {
                let read = scope.spawn(|| case.read(&sink, &control));
                while budget.waiting() == 0 {
                    std::thread::yield_now();
                }
                control.cancel();
                read.join().unwrap()
            })
        });
        assert!(matches!(result, Err(Error::Cancelled)), "{result:?}");
        assert!(!budget.is_closed(), "others may use it");
    }
}
