//! Loads by several ranks when one of them fails: all end, in time, and name it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod dist_support;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dist_support::{Join, LONG, load, load_in, synth};
use fst::dist::group::{Control, HostCopier, Occupancy, Op, Signs};
use fst::dist::{GroupError, Space};
use fst::{CancelToken, Checkpoint, DistError, Error, Group, Loader, LocalGroup, Preset, Shard};
use safetensors::tensor::{Dtype, TensorView};

const WORLD: u32 = 3;

/// A checkpoint of a few megabytes, and a copy of it.
fn two_copies(folder: &Path) -> [PathBuf; 2] {
    ["a", "b"].map(|name| {
        let path = folder.join(name);
        synth(&path, "llama-2-7b", |recipe| recipe.layers(1).shrink(10));
        path
    })
}

fn only_file(folder: &Path) -> PathBuf {
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).max().unwrap()
}

fn open(path: &Path) -> Checkpoint {
    Checkpoint::open(path).unwrap()
}

/// What each rank says, all of them within a few seconds.
fn failures(
    loader: impl Fn(u32) -> Loader + Sync,
    checkpoint: impl Fn(u32) -> Checkpoint + Sync,
) -> Vec<String> {
    let start = Instant::now();
    let results = load(WORLD, LONG, loader, checkpoint);
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    results.into_iter().map(|result| result.unwrap_err().to_string()).collect()
}

/// What the second load of a handle gets while the first has it: the group is as good as before.
#[test]
fn a_group_is_for_one_load_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let [path, _] = two_copies(folder.path());
    let checkpoint = open(&path);
    let group: Arc<dyn Group> = Arc::new(LocalGroup::host(1).remove(0));
    let loader = Loader::new().group(group.clone());
    let occupied = group.occupy().unwrap();
    let error = loader.load(&checkpoint).unwrap_err();
    assert!(
        matches!(error, Error::Dist(DistError::Group(GroupError::Busy { rank: 0, .. }))),
        "{error}"
    );
    drop(occupied);
    assert_eq!(loader.load(&checkpoint).unwrap().len(), checkpoint.tensors().len());
}

/// Loads that race for the handles of two ranks: right bytes, or an error.
#[test]
fn loads_at_once_through_one_group_never_get_each_others_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoints = [1u8, 2].map(|value| {
        let path = folder.path().join(format!("{value}.safetensors"));
        let data = vec![value; 3 << 20];
        let view = TensorView::new(Dtype::U8, vec![3 << 20], &data).unwrap();
        safetensors::serialize_to_file([("a", view)], None, &path).unwrap();
        open(&path)
    });
    let start = Instant::now();
    for _ in 0..20 {
        let groups = LocalGroup::with(2, HostCopier, LONG).into_iter();
        let groups: Vec<Arc<dyn Group>> = groups.map(|group| Arc::new(group) as _).collect();
        std::thread::scope(|scope| {
            for group in &groups {
                for (value, checkpoint) in (1u8..).zip(&checkpoints) {
                    scope.spawn(move || {
                        let loaded = Loader::new().group(group.clone()).load(checkpoint);
                        if let Ok(loaded) = loaded {
                            let tensor = loaded.get("a").unwrap();
                            assert!(tensor.bytes().unwrap().iter().all(|byte| *byte == value));
                        }
                    });
                }
            }
        });
    }
    // Nobody waits for a rank that has refused the load.
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

/// A load that one rank refuses during another is refused by all, who may load again.
#[test]
fn a_load_that_one_rank_refuses_is_refused_by_all() {
    let folder = tempfile::tempdir().unwrap();
    let [path, _] = two_copies(folder.path());
    let start = Instant::now();
    let groups = LocalGroup::with(2, HostCopier, LONG).into_iter();
    let groups: Vec<Arc<dyn Group>> = groups.map(|group| Arc::new(group) as _).collect();
    let on = |rank: usize| Loader::new().group(groups[rank].clone());
    let (begun, begins) = std::sync::mpsc::channel();
    let (go, goes) = std::sync::mpsc::channel::<()>();
    let goes = std::sync::Mutex::new(goes);
    std::thread::scope(|scope| {
        let (path, on) = (&path, &on);
        scope.spawn(move || {
            let loader = on(0).shard(move |_| {
                // The first time; then nobody listens any more.
                if begun.send(()).is_ok() {
                    let _ = goes.lock().unwrap().recv();
                }
                Shard::split(0)
            });
            loader.load(&open(path)).unwrap();
        });
        begins.recv().unwrap();
        drop(begins);
        let error = on(0).load(&open(path)).unwrap_err().to_string();
        assert!(error.starts_with("rank 0 had another load"), "{error}");
        drop(go);
        on(1).shard(|_| Shard::split(0)).load(&open(path)).unwrap();
        let error = on(1).load(&open(path)).unwrap_err().to_string();
        assert!(error.starts_with("rank 0 had another load"), "{error}");
    });
    std::thread::scope(|scope| {
        for rank in 0..2 {
            let (path, on) = (&path, &on);
            scope.spawn(move || on(rank).load(&open(path)).unwrap());
        }
    });
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

#[test]
fn a_file_that_goes_bad_on_one_rank_ends_all() {
    for failing in 0..WORLD {
        for fault in ["gone", "shorter", "rewritten"] {
            let folder = tempfile::tempdir().unwrap();
            let [good, bad] = two_copies(folder.path());
            let checkpoint = |rank| {
                if rank != failing {
                    return open(&good);
                }
                let checkpoint = open(&bad);
                let file = only_file(&bad);
                match fault {
                    "gone" => std::fs::remove_file(&file).unwrap(),
                    "shorter" => {
                        let opened = File::options().write(true).open(&file).unwrap();
                        opened.set_len(100_000).unwrap();
                    }
                    _ => {
                        let opened = File::options().write(true).open(&file).unwrap();
                        let later = std::time::SystemTime::now() + Duration::from_secs(5);
                        opened.set_modified(later).unwrap();
                    }
                }
                checkpoint
            };
            let told = failures(|_| Loader::new().preset(Preset::llama()), checkpoint);
            let path = only_name(&bad);
            for (rank, error) in (0..).zip(&told) {
                assert!(error.contains(&path), "{fault}: rank {rank} says {error}");
                let names = error.contains(&format!("rank {failing} failed"));
                assert!(names || rank == failing, "{fault}: rank {rank} says {error}");
            }
        }
    }
}

fn only_name(folder: &Path) -> String {
    folder.display().to_string()
}

/// A group that makes a file shorter once its rank, with its files open, first talks to the others.
#[derive(Debug)]
struct Shrinks {
    group: LocalGroup,
    file: PathBuf,
}

impl Control for Shrinks {
    fn rank(&self) -> u32 {
        self.group.rank()
    }

    fn world_size(&self) -> u32 {
        self.group.world_size()
    }

    fn deadline(&self) -> Duration {
        self.group.deadline()
    }

    fn signs(&self) -> &Signs {
        self.group.signs()
    }

    fn gather_messages(&self, message: &[u8]) -> Result<Vec<Vec<u8>>, GroupError> {
        File::options().write(true).open(&self.file).unwrap().set_len(200_000).unwrap();
        self.group.gather_messages(message)
    }

    fn abort(&self, cause: &str) {
        self.group.abort(cause);
    }

    fn failure(&self) -> Option<GroupError> {
        self.group.failure()
    }
}

impl Group for Shrinks {
    fn reaches(&self, space: Space) -> bool {
        self.group.reaches(space)
    }

    fn occupancy(&self) -> &Occupancy {
        self.group.occupancy()
    }

    fn exchange(&self, batch: Vec<Op<'_>>) -> Result<(), GroupError> {
        self.group.exchange(batch)
    }
}

/// The file is whole when it is opened and too short when it is read.
#[test]
fn a_file_that_shrinks_under_the_load_of_one_rank_ends_all() {
    for failing in 0..WORLD {
        let folder = tempfile::tempdir().unwrap();
        let [good, bad] = two_copies(folder.path());
        let path_of = |rank| if rank == failing { &bad } else { &good };
        let loader = Loader::new().shard(|tensor| match tensor.shape().len() {
            2 => Shard::split(0),
            _ => Shard::replicate(),
        });
        let file = only_file(&bad);
        let join = |(rank, group): (u32, LocalGroup)| -> Join<'_> {
            let file = file.clone();
            Box::new(move || match rank == failing {
                true => Arc::new(Shrinks { group, file }),
                false => Arc::new(group),
            })
        };
        let ranks = (0..).zip(LocalGroup::host(WORLD)).map(join).collect();
        let results = load_in(ranks, |_| loader.clone(), |rank| open(path_of(rank)));
        let told: Vec<String> =
            results.into_iter().map(|result| result.unwrap_err().to_string()).collect();
        for (rank, error) in (0..).zip(&told) {
            assert!(error.contains(&format!("rank {failing}")), "rank {rank} says {error}");
            assert!(error.contains(&only_name(&bad)), "rank {rank} says {error}");
        }
    }
}

#[test]
fn a_panic_of_one_rank_ends_all() {
    let folder = tempfile::tempdir().unwrap();
    let [path, _] = two_copies(folder.path());
    for failing in 0..WORLD {
        let start = Instant::now();
        let told: Vec<Option<String>> = std::thread::scope(|scope| {
            let rank = |(rank, group): (u32, fst::LocalGroup)| {
                let path = &path;
                scope.spawn(move || {
                    let loader = Loader::new().group(std::sync::Arc::new(group)).shard(move |_| {
                        assert!(rank != failing, "as the test wants");
                        Shard::split(0)
                    });
                    loader.load(&open(path)).unwrap_err().to_string()
                })
            };
            let groups = (0..).zip(fst::LocalGroup::host(WORLD));
            let threads: Vec<_> = groups.map(rank).collect();
            threads.into_iter().map(|thread| thread.join().ok()).collect()
        });
        assert!(start.elapsed() < Duration::from_secs(20));
        for (rank, error) in (0..).zip(told) {
            assert_eq!(rank == failing, error.is_none());
            if let Some(error) = error {
                assert!(error.contains(&format!("rank {failing}")), "rank {rank} says {error}");
                assert!(error.contains("panicked"), "rank {rank} says {error}");
            }
        }
    }
}

#[test]
fn ranks_with_other_checkpoints_are_refused_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    synth(&path("a"), "llama-2-7b", |recipe| recipe.layers(1).shrink(20));
    // The same names, shapes and lengths: a fine-tune, as it were.
    synth(&path("tuned"), "llama-2-7b", |recipe| recipe.layers(1).shrink(20).seed(1));
    synth(&path("longer"), "llama-2-7b", |recipe| recipe.layers(2).shrink(20));
    for other in ["tuned", "longer"] {
        let checkpoint = |rank| open(&path(if rank == 1 { other } else { "a" }));
        let results = load(WORLD, LONG, |_| Loader::new().preset(Preset::llama()), checkpoint);
        for result in results {
            let error = result.unwrap_err();
            let Error::Dist(DistError::Exchange(told)) = &error else { panic!("{error}") };
            let differs = matches!(**told, fst::dist::ExchangeError::PlanDiffers { rank: 1, .. });
            assert!(differs, "{error}");
        }
    }
    // Nor do ranks load by different rules.
    let loader = |rank| Loader::new().shard(move |_| Shard::keep_on(u32::from(rank == 2)));
    for result in load(WORLD, LONG, loader, |_| open(&path("a"))) {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("the plan of rank 2 differs"), "{error}");
    }
}

#[test]
fn a_rank_that_never_comes_is_missed_at_the_deadline() {
    let folder = tempfile::tempdir().unwrap();
    let [path, _] = two_copies(folder.path());
    let deadline = Duration::from_millis(300);
    let groups = fst::LocalGroup::with(2, fst::dist::group::HostCopier, deadline);
    let start = Instant::now();
    let first = std::sync::Arc::new(groups.into_iter().next().unwrap());
    let error = Loader::new().group(first).load(&open(&path)).unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(20));
    assert!(matches!(error, Error::Dist(DistError::Group(_))), "{error}");
    assert!(error.to_string().contains("rank 1"), "{error}");
}

#[test]
fn cancelling_one_rank_ends_all() {
    let folder = tempfile::tempdir().unwrap();
    let [path, _] = two_copies(folder.path());
    let start = Instant::now();
    let loader = |rank| {
        let token = CancelToken::new();
        if rank == 1 {
            token.cancel();
        }
        Loader::new().preset(Preset::llama()).cancel(token)
    };
    let results = load(2, LONG, loader, |_| open(&path));
    assert!(start.elapsed() < Duration::from_secs(20));
    assert!(matches!(results[1], Err(Error::Cancelled)), "{:?}", results[1]);
    let error = results[0].as_ref().unwrap_err().to_string();
    // Rank 1 notices between two reads or in one, which it then names: rank and cause stay.
    assert!(error.starts_with("rank 1 failed: ") && error.ends_with("cancelled"), "{error}");
}
