//! The exchange on host memory: random plans run by ranks on threads, and failures of each rank.

#![allow(clippy::unwrap_used, clippy::panic)]

mod cases;

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use cases::{Case, case};
use fst_dist::group::HostCopier;
use fst_dist::{
    Backend, Cause, Choice, CopyAt, ExchangeError, ExchangeReport, HostBackend, Links, LocalGroup,
    Plan, Planner, ReadAt, ReadInto, Reader, Region, Shard, Space, Staging, Storage, TensorDesc,
    Topology, load_host,
};
use proptest::prelude::*;

/// Files in memory.
struct Files {
    files: Vec<Vec<u8>>,
}

impl Files {
    /// Bytes that differ from their neighbours near and far.
    fn new(tensors: &[TensorDesc]) -> Self {
        let count = tensors.iter().map(|t| t.shard as usize + 1).max().unwrap_or(0);
        let len = |shard| {
            let of_file = tensors.iter().filter(|t| t.shard as usize == shard);
            of_file.map(|t| t.file_range.end).max().unwrap_or(0)
        };
        let byte = |shard: usize, at: u64| {
            let x = (at + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(shard as u64 * 77);
            (x >> 32) as u8
        };
        let file = |shard| (0..len(shard)).map(|at| byte(shard, at)).collect();
        Self { files: (0..count).map(file).collect() }
    }

    fn slice(&self, tensors: &[TensorDesc], tensor: u32, byte: u64) -> u8 {
        let desc = &tensors[tensor as usize];
        self.files[desc.shard as usize][(desc.file_range.start + byte) as usize]
    }
}

impl Reader for &Files {
    fn read(&self, ranges: &mut [ReadInto<'_>]) -> Result<(), (usize, Cause)> {
        for (index, range) in ranges.iter_mut().enumerate() {
            let (start, len) = (range.offset as usize, range.into.len());
            let file = &self.files[range.shard as usize];
            let bytes = file.get(start..start + len).ok_or((index, "beyond the end".into()))?;
            range.into.copy_from_slice(bytes);
        }
        Ok(())
    }
}

type Outcome = (Vec<Vec<u8>>, Result<ExchangeReport, ExchangeError>);

/// Every rank loads on its own thread; outputs start as garbage.
fn load<R: Reader>(
    plans: impl Fn(u32) -> Plan + Sync,
    world: u32,
    reader: impl Fn(u32) -> R + Sync,
    deadline: Duration,
) -> Vec<Outcome> {
    std::thread::scope(|scope| {
        let run = |(rank, group): (u32, LocalGroup)| {
            let (plans, reader) = (&plans, &reader);
            scope.spawn(move || {
                let plan = plans(rank);
                let view = plan.rank(rank);
                let mut outputs: Vec<Vec<u8>> =
                    view.outputs().iter().map(|o| vec![0xA5; o.bytes as usize]).collect();
                let mut slices: Vec<&mut [u8]> = outputs.iter_mut().map(|o| &mut o[..]).collect();
                let result = load_host(&view, &group, reader(rank), &mut slices);
                (outputs, result)
            })
        };
        let groups = LocalGroup::with(world, HostCopier, deadline);
        let threads: Vec<_> = (0..).zip(groups).map(run).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

const LONG: Duration = Duration::from_secs(60);

fn check(case: &Case) {
    let plan = case.plan().unwrap();
    let world = case.topology.world();
    let files = Files::new(&case.tensors);
    let noted: Vec<Mutex<BTreeSet<u32>>> = (0..world).map(|_| Mutex::default()).collect();
    let reader = |rank: u32| Noted(&files, &noted[rank as usize]);
    let outcomes = load(|_| plan.clone(), world, reader, LONG);
    for (rank, (outputs, result)) in (0u32..).zip(outcomes) {
        let report = result.unwrap();
        let load = plan.loads()[rank as usize];
        let moved = (report.sent_bytes, report.received_bytes);
        assert_eq!(moved, (load.sent, load.received), "rank {rank}");
        // Gaps at which a block ends are not read.
        assert!(report.read_bytes <= load.read(), "rank {rank}: {report:?}, told {load:?}");
        assert!(report.read_bytes >= load.read_once, "rank {rank}");
        let noted = noted[rank as usize].lock().unwrap();
        assert_eq!(*noted, plan.rank(rank).shards(), "rank {rank}");
        for ((name, expected), found) in case.expected(rank).iter().zip(&outputs) {
            let byte = |from: &Option<(u32, u64)>| {
                from.map_or(0, |(tensor, byte)| files.slice(&case.tensors, tensor, byte))
            };
            let expected: Vec<u8> = expected.iter().map(byte).collect();
            assert!(*found == expected, "rank {rank}: {name}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Every rank ends with exactly its bytes, having moved exactly what the plan told.
    #[test]
    fn ranks_load_what_they_keep(case in case()) {
        check(&case);
    }
}

/// Tensors that go each of the ways, a few units long.
fn mixed(world: u32) -> (Vec<TensorDesc>, Plan) {
    let mut tensors = Vec::new();
    let mut end = 100;
    for (name, shape) in [
        ("rows", vec![512, 600]),
        ("columns", vec![700, 512]),
        ("everywhere", vec![300, 512]),
        ("more columns", vec![3, 511, 64]),
    ] {
        let len = shape.iter().product::<u64>() * 2;
        let file_range = end..end + len;
        end += len;
        tensors.push(TensorDesc { name: name.into(), bits: 16, shape, shard: 0, file_range });
    }
    let storage = Storage { bytes_per_s: 1e9, rank_bytes_per_s: 1e9, requests_per_s: 1e4 };
    let links = Links { node_bytes_per_s: 1e10, net_bytes_per_s: 1e10, latency_s: 1e-6 };
    let topology = Topology::one_node(world).with_storage(storage).with_links(links);
    let plan = Planner::new(topology)
        .budget(1 << 20)
        .plan(tensors.clone(), |t| match t.name.as_str() {
            "rows" => Shard::split(0),
            "everywhere" => Shard::replicate(),
            _ => Shard::split(1),
        })
        .unwrap();
    let choices: Vec<Choice> = (0..4).map(|t| plan.choice(t)).collect();
    let expected = [Choice::Direct, Choice::Scatter, Choice::Broadcast, Choice::Scatter];
    assert_eq!(choices, expected);
    (tensors, plan)
}

/// Fails, panics or stalls at the n-th range read by one rank.
struct Faulty<'a> {
    files: &'a Files,
    fault: Option<(&'static str, usize)>,
    reads: AtomicUsize,
}

impl Reader for Faulty<'_> {
    fn read(&self, ranges: &mut [ReadInto<'_>]) -> Result<(), (usize, Cause)> {
        for (index, range) in ranges.iter_mut().enumerate() {
            let n = self.reads.fetch_add(1, Ordering::Relaxed);
            match self.fault {
                Some(("fail", at)) if at == n => return Err((index, "no such sector".into())),
                Some(("panic", at)) if at == n => panic!("as the test wants"),
                Some(("stall", at)) if at == n => std::thread::sleep(Duration::from_secs(1)),
                _ => {}
            }
            self.files.read(std::slice::from_mut(range))?;
        }
        Ok(())
    }
}

#[test]
fn a_fault_of_any_rank_reaches_all() {
    let world = 3;
    let (tensors, plan) = mixed(world);
    let files = Files::new(&tensors);
    for failing in 0..world {
        for (kind, at) in [("fail", 0), ("fail", 3), ("panic", 1), ("stall", 0)] {
            let start = Instant::now();
            let reader = |rank| Faulty {
                files: &files,
                fault: (rank == failing).then_some((kind, at)),
                reads: AtomicUsize::new(0),
            };
            let deadline = if kind == "stall" { Duration::from_millis(100) } else { LONG };
            let outcomes = load(|_| plan.clone(), world, reader, deadline);
            assert!(start.elapsed() < LONG / 2);
            for (rank, (_, result)) in (0u32..).zip(outcomes) {
                let error = result.unwrap_err().to_string();
                let told = match kind {
                    "fail" => {
                        error.contains(&format!("rank {failing}: reading tensor"))
                            && error.ends_with("no such sector")
                    }
                    "panic" => {
                        error.contains(&format!("rank {failing}")) && error.contains("panicked")
                    }
                    _ => error.contains("waited 100ms"),
                };
                assert!(told, "{kind} on rank {failing}, as rank {rank} tells it: {error}");
            }
        }
    }
}

/// Notes which files are read from.
struct Noted<'a>(&'a Files, &'a Mutex<BTreeSet<u32>>);

impl Reader for Noted<'_> {
    fn read(&self, ranges: &mut [ReadInto<'_>]) -> Result<(), (usize, Cause)> {
        self.1.lock().unwrap().extend(ranges.iter().map(|range| range.shard));
        self.0.read(ranges)
    }
}

/// Takes its time for every read of one rank.
struct Slow(Duration);

impl Reader for Slow {
    fn read(&self, ranges: &mut [ReadInto<'_>]) -> Result<(), (usize, Cause)> {
        std::thread::sleep(self.0);
        ranges.iter_mut().for_each(|range| range.into.fill(7));
        Ok(())
    }
}

#[test]
fn a_deadline_does_not_count_what_another_rank_reads() {
    let bytes = 32 << 20;
    let (name, shape) = ("t".to_owned(), vec![bytes]);
    let tensor = TensorDesc { name, bits: 8, shape, shard: 0, file_range: 0..bytes };
    let plan = Planner::new(Topology::one_node(2))
        .budget(1 << 20)
        .plan([tensor], |_| Shard::split(0))
        .unwrap();
    let deadline = Duration::from_millis(800);
    let start = Instant::now();
    let slow = |rank| Slow(if rank == 0 { deadline / 4 } else { Duration::ZERO });
    for (outputs, result) in load(|_| plan.clone(), 2, slow, deadline) {
        result.unwrap();
        assert!(outputs.iter().flatten().all(|byte| *byte == 7));
    }
    assert!(start.elapsed() > deadline * 2, "too few reads to show anything");
}

#[test]
fn ranks_with_other_plans_are_refused_before_anything_is_read() {
    let world = 3;
    let (tensors, plan) = mixed(world);
    let other = Planner::new(plan.topology().clone())
        .budget(1 << 20)
        .fingerprint("written on another day")
        .plan(tensors, |_| Shard::replicate())
        .unwrap();
    let nothing = Files { files: vec![] };
    let plans = |rank| if rank == 2 { other.clone() } else { plan.clone() };
    for (_, result) in load(plans, world, |_| &nothing, LONG) {
        assert!(matches!(result, Err(ExchangeError::PlanDiffers { rank: 2, .. })), "{result:?}");
    }
}

#[test]
fn outputs_of_the_wrong_size_fail_all_ranks() {
    let (tensors, plan) = mixed(2);
    let files = Files::new(&tensors);
    let results = std::thread::scope(|scope| {
        let run = |(rank, group): (u32, LocalGroup)| {
            let (plan, files) = (&plan, &files);
            scope.spawn(move || {
                let view = plan.rank(rank);
                let wrong = |bytes: u64| bytes as usize - usize::from(rank == 1);
                let mut outputs: Vec<Vec<u8>> =
                    view.outputs().iter().map(|o| vec![0; wrong(o.bytes)]).collect();
                let mut slices: Vec<&mut [u8]> = outputs.iter_mut().map(|o| &mut o[..]).collect();
                load_host(&view, &group, files, &mut slices).unwrap_err().to_string()
            })
        };
        let threads: Vec<_> = (0..).zip(LocalGroup::host(2)).map(run).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(results[1].starts_with("output rows: "), "{results:?}");
    assert_eq!(results[0], format!("rank 1 failed: {}", results[1]));
}

/// Memory of a device that must not be asked for anything.
struct Elsewhere;

// SAFETY: it does nothing.
unsafe impl Backend for Elsewhere {
    fn space(&self) -> Space {
        Space::Device(3)
    }

    fn stage(&self, _: u64) -> Result<Staging, Cause> {
        panic!("staging");
    }

    unsafe fn read(&self, _: &[ReadAt]) -> Result<(), (usize, Cause)> {
        panic!("read");
    }

    unsafe fn copy(&self, _: &[CopyAt]) -> Result<(), Cause> {
        panic!("copy");
    }

    unsafe fn zero(&self, _: u64, _: u64) -> Result<(), Cause> {
        panic!("zero");
    }
}

#[test]
fn memory_that_the_group_does_not_reach_is_refused_on_all_ranks_before_anything_is_read() {
    let (tensors, plan) = mixed(2);
    let files = Files::new(&tensors);
    let mut groups = LocalGroup::host(2);
    let (there, here) = (groups.remove(1), groups.remove(0));
    let other = std::thread::scope(|scope| {
        let host = scope.spawn(|| {
            let view = plan.rank(0);
            let mut outputs: Vec<Vec<u8>> =
                view.outputs().iter().map(|o| vec![0; o.bytes as usize]).collect();
            let mut slices: Vec<&mut [u8]> = outputs.iter_mut().map(|o| &mut o[..]).collect();
            load_host(&view, &here, &files, &mut slices).unwrap_err().to_string()
        });
        let view = plan.rank(1);
        let regions: Vec<Region> =
            view.outputs().iter().map(|o| Region { addr: 0, len: o.bytes }).collect();
        // SAFETY: the regions are not touched.
        let error = unsafe { fst_dist::load(&view, &there, &Elsewhere, &regions) }.unwrap_err();
        let space = Space::Device(3);
        assert!(
            matches!(error, ExchangeError::Unreached { rank: 1, space: s, .. } if s == space),
            "{error}"
        );
        host.join().unwrap()
    });
    assert_eq!(other, "rank 1 failed: rank 1: its group does not reach memory of Device(3)");
}

#[test]
fn staging_that_the_address_space_has_no_room_for_is_an_error() {
    struct Nothing;
    impl Reader for Nothing {
        fn read(&self, _: &mut [ReadInto<'_>]) -> Result<(), (usize, Cause)> {
            Ok(())
        }
    }
    let backend = HostBackend::new(Nothing);
    assert!(backend.stage(1 << 60).is_err());
}
