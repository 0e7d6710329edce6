//! Streams under stress: many seeds, engines and numbers of threads, with consumers that hold,
//! drop and leave as they please.

#![allow(clippy::unwrap_used, clippy::panic)]

mod load_support;
mod stream_support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use fst::{CancelToken, Checkpoint, Dtype, Error, Loader, Tensor, TensorStream};
use safetensors::tensor::{Dtype as OfficialDtype, TensorView};

use load_support::*;
use stream_support::arrival;

/// These tests look at the whole process's memory and threads: one at a time.
fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(|e| e.into_inner())
}

struct Rng(u64);

impl Rng {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// One to three shards of tensors of all sizes up to `largest` bytes.
fn random_checkpoint(dir: &Path, rng: &mut Rng, tensors: u64, largest: u64) -> Vec<PathBuf> {
    let shards = 1 + rng.below(3);
    (0..shards)
        .map(|shard| {
            let path = dir.join(format!("{shard}.safetensors"));
            let data: Vec<(String, Vec<u8>)> = (0..1 + rng.below(tensors))
                .map(|i| {
                    let rows = match rng.below(6) {
                        0 => 0,
                        1 => 1 + rng.below(3),
                        2 => largest / 128,
                        _ => rng.below(largest / 128) + 1,
                    };
                    (format!("s{shard}.t{i}"), noise(rows as usize * 128, rng.0))
                })
                .collect();
            let views = data.iter().map(|(name, data)| {
                let dtype =
                    if data.len() % 256 == 0 { OfficialDtype::BF16 } else { OfficialDtype::F32 };
                let shape = vec![data.len() / 128, 1024 / dtype.bitsize()];
                (name.clone(), TensorView::new(dtype, shape, data).unwrap())
            });
            safetensors::serialize_to_file(views, None, &path).unwrap();
            path
        })
        .collect()
}

/// So many tensors of 2^20 elements each.
fn equal_tensors(dir: &Path, count: usize, dtype: OfficialDtype) -> Checkpoint {
    let path = dir.join("a.safetensors");
    let len = (dtype.bitsize() / 8) << 20;
    let data = noise(count * len, 1);
    let views = data
        .chunks(len)
        .enumerate()
        .map(|(i, part)| (format!("t{i}"), TensorView::new(dtype, vec![1 << 20], part).unwrap()));
    safetensors::serialize_to_file(views, None, &path).unwrap();
    Checkpoint::open(&path).unwrap()
}

/// Opens a stream with the smallest budget, or one of a few times that.
fn tight(loader: &Loader, checkpoint: &Checkpoint, rng: &mut Rng) -> (u64, TensorStream) {
    let needed = match loader.clone().memory_budget(1).stream(checkpoint) {
        Err(Error::Budget { budget: 1, needed }) => needed,
        // Nothing but empty tensors.
        Ok(_) => 1,
        Err(error) => panic!("{error}"),
    };
    let budget = needed * (1 + rng.below(3)) + rng.below(2) * rng.below(1 << 20);
    if needed > 1 {
        let less = loader.clone().memory_budget(needed - 1).stream(checkpoint);
        assert!(matches!(less, Err(Error::Budget { .. })));
    }
    (budget, loader.clone().memory_budget(budget).stream(checkpoint).unwrap())
}

/// This crate's threads that are alive. Those that have been joined may be listed for a moment yet.
fn threads() -> Vec<String> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
        let names = tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
        let alive: Vec<String> = names.filter(|name| name.starts_with("fst-")).collect();
        if alive.is_empty() || Instant::now() > deadline {
            return alive;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Bytes of memory of a kind, such as `VmHWM` (the most that was resident).
fn memory(kind: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(kind)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// A consumer that holds some tensors, drops held ones now and then, and must drop them when the
/// stream stalls. Returns the bytes by name.
fn consume(mut stream: TensorStream, budget: u64, rng: &mut Rng) -> BTreeMap<String, Vec<u8>> {
    let (mut held, mut got): (Vec<Tensor>, _) = (Vec::new(), BTreeMap::new());
    let mut stalls = 0;
    while let Some(next) = stream.next() {
        match next {
            Ok(tensor) => {
                let bytes = tensor.bytes().unwrap().to_vec();
                assert!(got.insert(tensor.name().to_owned(), bytes).is_none(), "twice");
                if !rng.one_in(3) {
                    held.push(tensor);
                }
                if rng.one_in(4) && !held.is_empty() {
                    held.swap_remove(rng.below(held.len() as u64) as usize);
                }
                stalls = 0;
            }
            Err(Error::Stalled { waited, .. }) => {
                assert!(waited >= Duration::from_millis(20));
                stalls += 1;
                assert!(stalls < 500, "stalled with {} tensors held", held.len());
                // What was held is still whole.
                for tensor in held.drain(..) {
                    assert!(got[tensor.name()] == tensor.bytes().unwrap());
                }
            }
            Err(error) => panic!("{error}"),
        }
        assert!(stream.peak_bytes() <= budget);
    }
    assert_eq!(stream.remaining(), 0);
    assert_eq!(stream.report().unwrap().tensors, got.len());
    got
}

#[test]
fn everything_comes_once_and_right_whatever_the_consumer_does() {
    let _alone = alone();
    for seed in 0..60 {
        let rng = &mut Rng(seed);
        let dir = tempfile::tempdir().unwrap();
        let paths = random_checkpoint(dir.path(), rng, 40, 300 << 10);
        let checkpoint = Checkpoint::open_all(&paths).unwrap();
        let want = official(&paths);
        let in_order = rng.one_in(2);
        let mut loader = Loader::new()
            .engine(ENGINES[rng.below(4) as usize])
            .workers(1 + rng.below(5) as usize)
            .in_order(in_order)
            .stall_timeout(Duration::from_millis(20));
        if rng.one_in(3) {
            loader = loader.dtype(Dtype::F32);
        }
        let want: BTreeMap<String, Vec<u8>> = match rng.one_in(2) {
            true => loader
                .load(&checkpoint)
                .unwrap()
                .iter()
                .map(|t| (t.name().to_owned(), t.bytes().unwrap().to_vec()))
                .collect(),
            false => {
                loader = loader.dtype(Dtype::BF16).select_with(|t| t.dtype() == Dtype::BF16);
                let bf16 = want.into_iter().filter(|(_, (dtype, _, _))| dtype == "BF16");
                bf16.map(|(name, (_, _, data))| (name, data)).collect()
            }
        };
        let (budget, stream) = tight(&loader, &checkpoint, rng);
        let got = consume(stream, budget, rng);
        assert_eq!(got.len(), want.len(), "seed {seed}");
        assert!(got == want, "seed {seed}");
    }
    assert_eq!(threads(), Vec::<String>::new());
}

#[test]
fn leaving_early_ends_reads_and_frees_everything() {
    let _alone = alone();
    let rng = &mut Rng(7);
    let dir = tempfile::tempdir().unwrap();
    let paths = random_checkpoint(dir.path(), rng, 60, 1 << 20);
    let checkpoint = Checkpoint::open_all(&paths).unwrap();
    let mut left = BTreeSet::new();
    for round in 0..60 {
        let loader = Loader::new()
            .engine(ENGINES[rng.below(4) as usize])
            .workers(1 + rng.below(5) as usize)
            .in_order(rng.one_in(2))
            .stall_timeout(Duration::from_millis(10));
        let loader = if rng.one_in(4) { loader.dtype(Dtype::F32) } else { loader };
        let (_, mut stream) = tight(&loader, &checkpoint, rng);
        let mut held: Vec<Tensor> = Vec::new();
        // With everything held the reader soon waits for memory: that wait must end, too.
        for _ in 0..rng.below(40) {
            match stream.next() {
                Some(Ok(tensor)) => held.push(tensor),
                Some(Err(Error::Stalled { .. })) => break,
                other => assert!(other.is_none(), "{other:?}"),
            }
        }
        let began = Instant::now();
        drop(stream);
        assert!(began.elapsed() < Duration::from_secs(60), "round {round}: {:?}", began.elapsed());
        assert_eq!(threads(), Vec::<String>::new(), "round {round}");
        left.insert(held.len());
        for tensor in held {
            assert_eq!(tensor.bytes().unwrap().len(), tensor.byte_len());
        }
    }
    assert!(left.len() > 5, "{left:?}");
}

#[test]
fn a_full_budget_stalls_says_so_and_goes_on() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = equal_tensors(dir.path(), 6, OfficialDtype::U8);
    // An arena of one tensor is a little longer than that, for the file's header.
    let budget = (5 << 20) / 2;
    let loader = Loader::new().memory_budget(budget).stall_timeout(Duration::from_millis(100));
    let tensor = |stream: &mut TensorStream| arrival(stream).unwrap().unwrap();
    for in_order in [false, true] {
        let mut stream = loader.clone().in_order(in_order).stream(&checkpoint).unwrap();
        let mut held = vec![tensor(&mut stream), tensor(&mut stream)];
        for _ in 0..3 {
            let began = Instant::now();
            let error = stream.next().unwrap().unwrap_err();
            assert!(
                matches!(error, Error::Stalled { waited, .. } if waited >= Duration::from_millis(100)),
                "{error}"
            );
            assert!(began.elapsed() < Duration::from_secs(60));
            assert_eq!(stream.remaining(), 4);
        }
        held.pop();
        held.push(tensor(&mut stream));
        assert!(stream.peak_bytes() <= budget);
        held.clear();
        assert_eq!([(); 3].map(|()| tensor(&mut stream).byte_len()), [1 << 20; 3]);
        assert!(stream.next().is_none());
    }
    // A token ends a stream that waits, too.
    let token = CancelToken::new();
    let waiting = Loader::new().memory_budget(budget).cancel(token.clone());
    let mut stream = waiting.stream(&checkpoint).unwrap();
    let held = [stream.next().unwrap().unwrap(), stream.next().unwrap().unwrap()];
    let canceller = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        token.cancel();
    });
    assert!(matches!(stream.next(), Some(Err(Error::Cancelled))));
    assert!(stream.next().is_none());
    canceller.join().unwrap();
    assert_eq!(threads(), Vec::<String>::new());
    drop(held);
}

#[test]
fn a_converting_stream_needs_its_largest_tensor_once() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = equal_tensors(dir.path(), 4, OfficialDtype::BF16);
    let loader = Loader::new().dtype(Dtype::F32).memory_budget(1);
    let Err(Error::Budget { needed, .. }) = loader.stream(&checkpoint) else { panic!("fits") };
    // A tensor of 4 MiB, and 12 MiB of scratch memory.
    assert!(needed < (4 << 20) + (13 << 20), "{needed}");
    let loaded = Loader::new().dtype(Dtype::F32).load(&checkpoint).unwrap();
    let mut stream = loader.memory_budget(needed).stream(&checkpoint).unwrap();
    for tensor in &mut stream {
        let tensor = tensor.unwrap();
        assert!(tensor.bytes().unwrap() == loaded.get(tensor.name()).unwrap().bytes().unwrap());
    }
    assert!(stream.peak_bytes() <= needed);
}

#[test]
fn the_process_never_grows_past_the_budget() {
    let _alone = alone();
    let rng = &mut Rng(11);
    let dir = tempfile::tempdir().unwrap();
    let paths = random_checkpoint(dir.path(), rng, 60, 4 << 20);
    let checkpoint = Checkpoint::open_all(&paths).unwrap();
    assert!(checkpoint.byte_len() > 90 << 20, "{}", checkpoint.byte_len());
    // 64 MiB: a budget that holds scratch memory too, and a good deal less than the checkpoint.
    let budget = 64 << 20;
    // Stacks of threads, rings, what tests themselves allocate; pages that each processor counts for
    // itself before it tells.
    let slack = 16 << 20;
    for dtype in [Dtype::BF16, Dtype::F32] {
        for engine in ENGINES {
            let loader = Loader::new().engine(engine).workers(4).memory_budget(budget).dtype(dtype);
            let stream = loader.stream(&checkpoint).unwrap();
            fs::write("/proc/self/clear_refs", "5").unwrap();
            let before = memory("VmRSS");
            let count = stream.map(|tensor| assert!(tensor.unwrap().bytes().is_ok())).count();
            assert_eq!(count, checkpoint.tensors().len());
            let grown = memory("VmHWM").saturating_sub(before);
            assert!(grown <= budget + slack, "{engine} {dtype}: {grown} bytes more");
        }
    }
}

#[test]
fn small_tensors_that_are_kept_hold_little_of_the_budget() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("i.safetensors");
    let (large, small) = (vec![1; 2 << 20], vec![2; 4096]);
    let views = (0..64).flat_map(|i| {
        [("w", &large), ("norm", &small)].map(|(name, data)| {
            let view = TensorView::new(OfficialDtype::U8, vec![data.len()], data).unwrap();
            (format!("{i:02}.{name}"), view)
        })
    });
    safetensors::serialize_to_file(views, None, &path).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    for budget in [32 << 20, 1 << 30] {
        let loader = Loader::new().memory_budget(budget).stall_timeout(Duration::from_secs(10));
        let before = memory("VmRSS");
        let mut stream = loader.in_order(true).stream(&checkpoint).unwrap();
        let mut kept = Vec::new();
        for tensor in &mut stream {
            kept.extend(tensor.ok().filter(|tensor| tensor.name().ends_with("norm")));
        }
        assert_eq!(kept.len(), 64);
        assert!(kept.iter().all(|tensor| tensor.bytes().unwrap() == small));
        // What dropped tensors left to the stream went at its end.
        let grown = memory("VmRSS").saturating_sub(before);
        assert!(grown < 32 << 20, "{grown} bytes");
    }
}
