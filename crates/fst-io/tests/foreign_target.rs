#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::panic)]
#![allow(clippy::field_reassign_with_default)] // options are non-exhaustive

//! Safe code hands sinks what is not theirs: it is refused, and nothing else is written to.

use fst_io::place::{ForeignLayout, InPlace, Layout};
use fst_io::plan::{Block, Limits, ReadPlan};
use fst_io::scratch::Scratch;
use fst_io::sink::{Sink, SinkError};
use fst_io::{CachePolicy, Control, Engine, Error, Extent, ReadOptions, ReadStats, SourceFile};

const LEN: u64 = 16 << 20;
const MIB: u64 = 1 << 20;

fn plan(extents: u64) -> ReadPlan {
    let extents = (0..extents).map(|i| Extent::new(0, i * MIB..(i + 1) * MIB)).collect();
    let limits = Limits { block: 64 << 10, segment: MIB, gap: 0, ..Limits::default() };
    ReadPlan::new(extents, limits).unwrap()
}

fn read(plan: &ReadPlan, sink: &dyn Sink) -> Result<ReadStats, Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    std::fs::write(&path, vec![0xaa; LEN as usize]).unwrap();
    let files = [SourceFile::open(&path, None).unwrap()];
    let mut options = ReadOptions::default();
    (options.engine, options.cache) = (Engine::Pread, CachePolicy::Buffered);
    options.workers = Some(1);
    fst_io::read(&files, plan, sink, &options, &Control::new())
}

fn admit(_: &Block, _: bool) -> Result<bool, SinkError> {
    Ok(true)
}

fn take(_: &Block, _: &[u8]) -> Result<(), SinkError> {
    Ok(())
}

#[test]
fn targets_of_another_scratch_are_refused() {
    let plan = plan(16);
    let blocks = &plan.blocks()[..200];
    let many = Scratch::new(&plan, 200, &admit, &take).unwrap();
    let foreign: Vec<_> =
        blocks.iter().map(|block| (block, many.reserve(block, true).unwrap().unwrap())).collect();
    drop(many);
    let victim = vec![1u8; 100 << 20];
    let one = Scratch::new(&plan, 1, &admit, &take).unwrap();
    for (at, (block, target)) in foreign.into_iter().enumerate() {
        match at % 2 {
            0 => assert!(one.landed(block, target).is_err()),
            _ => one.abandoned(block, target),
        }
    }
    read(&plan, &one).unwrap();
    assert!(victim.iter().all(|byte| *byte == 1));
}

#[test]
fn targets_come_back_for_their_own_block_only() {
    let plan = plan(16);
    let [first, second] = [&plan.blocks()[0], &plan.blocks()[1]];
    let layout = Layout::new(&plan, u64::MAX);
    let sinks: [&dyn Sink; 2] = [
        &Scratch::new(&plan, 4, &admit, &take).unwrap(),
        &InPlace::new(&plan, &layout, None, &|_, _| Ok(())),
    ];
    for sink in sinks {
        let [a, _b] = [first, second].map(|block| sink.reserve(block, true).unwrap().unwrap());
        assert!(sink.reserve(first, true).is_err(), "it is out");
        assert!(sink.landed(second, a).is_err());
    }
}

#[test]
fn the_layout_of_another_plan_is_refused() {
    let (small, large) = (plan(1), plan(16));
    // As many segments, but of other lengths.
    let unlike = [0..MIB, 2 * MIB..LEN].map(|range| Extent::new(0, range));
    let like = [0..MIB / 2, 2 * MIB..LEN].map(|range| Extent::new(0, range));
    let [unlike, like] =
        [unlike, like].map(|extents| ReadPlan::new(extents.into(), *large.limits()).unwrap());
    for (read_plan, laid_out) in [(&large, &small), (&small, &large), (&unlike, &like)] {
        for arena in [MIB, u64::MAX] {
            let layout = Layout::new(laid_out, arena);
            let none = |_, _| panic!("no arena is complete");
            let error = read(read_plan, &InPlace::new(read_plan, &layout, None, &none));
            let Err(Error::Sink(error)) = error else { panic!("{error:?}") };
            assert!(error.is::<ForeignLayout>(), "{error}");
        }
    }
    let layout = Layout::new(&large.clone(), MIB);
    read(&large, &InPlace::new(&large, &layout, None, &|_, _| Ok(()))).unwrap();
}
