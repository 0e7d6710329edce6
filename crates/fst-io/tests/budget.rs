#![allow(clippy::unwrap_used, clippy::panic)]
#![allow(clippy::field_reassign_with_default)] // options are non-exhaustive

//! Reads within a memory budget.

use std::fs;
use std::time::{Duration, Instant};

use fst_io::arenas::Arenas;
use fst_io::place::{InPlace, Layout};
use fst_io::plan::{Block, Limits, ReadPlan};
use fst_io::sink::{Sink, SinkError, Target};
use fst_io::{Budget, Control, Engine, Error, Extent, ReadOptions, ResolvedEngine, SourceFile};

const LEN: u64 = 2 << 20;

/// Holds the second block back until somebody waits for the budget.
struct Ordered<'a>(InPlace<'a>, &'a Budget);

// SAFETY: the inner sink's targets, passed on.
unsafe impl Sink for Ordered<'_> {
    fn reserve(&self, block: &Block, wait: bool) -> Result<Option<Target>, SinkError> {
        let target = self.0.reserve(block, wait && block.index != 1);
        let deadline = Instant::now() + Duration::from_secs(10);
        while block.index == 1 && self.1.waiting() == 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        target
    }

    fn landed(&self, block: &Block, target: Target) -> Result<(), SinkError> {
        self.0.landed(block, target)
    }

    fn abandoned(&self, block: &Block, target: Target) {
        self.0.abandoned(block, target);
    }
}

#[test]
fn an_error_ends_those_who_wait_for_the_budget() {
    let dir = tempfile::tempdir().unwrap();
    let paths = [dir.path().join("a"), dir.path().join("b")];
    paths.iter().for_each(|path| fs::write(path, vec![1; LEN as usize]).unwrap());
    let files = paths.each_ref().map(|path| SourceFile::open(path, None).unwrap());
    // The arena of the first file will lack its second half, so that its memory never comes back.
    fs::File::options().write(true).open(&paths[0]).unwrap().set_len(LEN / 2).unwrap();
    let extents = (0..2).map(|file| Extent { file, offset: 0, len: LEN }).collect();
    let plan = ReadPlan::new(extents, Limits { block: LEN / 2, ..Limits::default() }).unwrap();
    let layout = Layout::new(&plan, LEN);
    let budget = Budget::new(LEN);
    let sink = InPlace::new(&plan, &layout, Some(&budget), &|_, _| Ok(()));
    let sink = Ordered(sink, &budget);
    let mut options = ReadOptions::default();
    options.engine = Engine::Pread;
    options.workers = Some(3);
    let error = fst_io::read(&files, &plan, &sink, &options, &Control::new()).unwrap_err();
    assert!(matches!(error, Error::EarlyEnd { .. }), "{error}");
}

#[test]
fn an_arena_that_is_gone_leaves_its_memory_to_the_next() {
    let budget = Budget::new(LEN);
    let arenas = Arenas::new([(LEN, 1), (LEN - 5000, 1)], Some(&budget), &|_, _| Ok(()));
    for (arena, before) in [(0, 0), (1, 7)] {
        let buffer = arenas.get(arena, false).unwrap().unwrap();
        // SAFETY: nobody else writes to the arena, or reads it.
        let bytes = unsafe { buffer.slice_mut(0..buffer.len()) }.unwrap();
        assert!(bytes.iter().all(|byte| *byte == before), "arena {arena}");
        bytes.fill(7);
        drop(buffer);
        // SAFETY: all of it is written.
        unsafe { arenas.fill(arena, 1) }.unwrap();
    }
    assert_eq!((budget.used(), budget.peak()), (0, LEN));
}

/// The only worker waits with a block of the third arena, for memory that what is preferred needs, too.
#[test]
fn what_is_preferred_gets_memory_that_others_wait_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    let content: Vec<u8> = (0..5 * LEN).map(|at| (at / LEN * 50 + at % 49) as u8).collect();
    fs::write(&path, &content).unwrap();
    let files = [SourceFile::open(&path, None).unwrap()];
    let extents = (0..5).map(|i| Extent { file: 0, offset: i * LEN, len: LEN }).collect();
    let limits = Limits { block: LEN / 4, segment: LEN, ..Limits::default() };
    let plan = ReadPlan::new(extents, limits).unwrap();
    let layout = Layout::new(&plan, LEN);
    assert_eq!(layout.arenas().len(), 5);
    // The system may refuse the calls that an engine needs.
    let can = |engine: &Engine| ResolvedEngine::resolve(*engine).is_ok();
    for engine in [Engine::Pread, Engine::Auto, Engine::Mmap].into_iter().filter(can) {
        for workers in [1, 3] {
            let budget = Budget::new(2 * LEN);
            let control = Control::new();
            let (full, arrived) = std::sync::mpsc::channel();
            let full = std::sync::Mutex::new(full);
            let on_arena = |arena: usize, buffer: fst_io::SharedBuffer| {
                let at = arena * LEN as usize;
                assert!(buffer[..LEN as usize] == content[at..at + LEN as usize]);
                let _ = full.lock().unwrap().send((arena, buffer));
                Ok(())
            };
            let sink = InPlace::new(&plan, &layout, Some(&budget), &on_arena);
            let mut options = ReadOptions::default();
            (options.engine, options.workers) = (engine, Some(workers));
            let next = || arrived.recv_timeout(Duration::from_secs(30)).unwrap();
            let order = std::thread::scope(|scope| {
                let read =
                    scope.spawn(|| fst_io::read(&files, &plan, &sink, &options, &control).unwrap());
                let (first, second) = (next(), next());
                while budget.waiting() == 0 {
                    std::thread::sleep(Duration::from_millis(1));
                }
                // One arena may be read ahead, and there is one: what comes back is for who asks.
                budget.set_ahead(LEN);
                control.prefer(3..4);
                control.prefer(4..5);
                budget.wake();
                let mut order = vec![first.0, second.0];
                drop(first);
                for _ in 0..2 {
                    order.push(next().0);
                }
                budget.set_ahead(2 * LEN);
                order.push(next().0);
                read.join().unwrap();
                drop(second);
                order
            });
            assert!(budget.peak() <= 2 * LEN);
            assert_eq!(order[2..], [4, 3, 2], "{engine} {workers}");
        }
    }
}
