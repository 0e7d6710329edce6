#![allow(clippy::unwrap_used)] // helpers of tests, too
#![allow(clippy::panic)]
#![allow(clippy::field_reassign_with_default)] // options are non-exhaustive

//! One battery for every engine: whatever the file, its length and where it lies, the bytes that
//! arrive are those that `std::fs::read` gives.

use std::fs;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use fst_io::place::{InPlace, Layout};
use fst_io::plan::{Limits, ReadPlan};
use fst_io::{
    CachePolicy, Change, Control, Engine, Error, Extent, ReadOptions, SharedBuffer, SourceFile,
};

const ENGINES: [Engine; 4] = if cfg!(any(not(target_os = "linux"), fst_portable)) {
    [Engine::Auto, Engine::Pread, Engine::Auto, Engine::Pread]
} else {
    [Engine::Auto, Engine::Uring, Engine::Pread, Engine::Mmap]
};

fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

/// Folders on file systems that differ: a disk and, where there is one, memory.
fn folders() -> Vec<tempfile::TempDir> {
    let mut folders = vec![tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()];
    folders.extend(tempfile::tempdir_in("/dev/shm"));
    folders
}

fn evict(path: &Path) {
    let file = fs::File::open(path).unwrap();
    file.sync_all().unwrap();
    // SAFETY: advice on an open file touches no memory of this process.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
}

fn load(
    paths: &[PathBuf],
    extents: Vec<Extent>,
    limits: Limits,
    options: &ReadOptions,
) -> Result<Vec<Vec<u8>>, Error> {
    let files: Vec<_> =
        paths.iter().map(|p| SourceFile::open(p, None)).collect::<Result<_, _>>()?;
    let plan = ReadPlan::new(extents, limits)?;
    let layout = Layout::new(&plan, 8 << 20);
    let landed = AtomicU64::new(0);
    let hook = |block: &fst_io::plan::Block| {
        landed.fetch_add(block.need, Relaxed);
    };
    let arenas = Mutex::new(vec![None; layout.arenas().len()]);
    let keep = |index: usize, arena: SharedBuffer| {
        assert!(arenas.lock().unwrap()[index].replace(arena).is_none());
        Ok(())
    };
    let sink = InPlace::new(&plan, &layout, None, &keep).on_landed(&hook);
    let control = Control::new();
    let stats = fst_io::read(&files, &plan, &sink, options, &control)?;
    assert_eq!(landed.load(Relaxed), plan.bytes_read());
    assert_eq!(control.landed_bytes(), plan.bytes_read());
    assert_eq!(stats.stages.iter().map(|s| s.bytes).sum::<u64>(), plan.bytes_read());
    assert_eq!(stats.stages.iter().map(|s| s.blocks).sum::<u64>(), plan.blocks().len() as u64);
    let arenas = arenas.lock().unwrap();
    let bytes = (0..plan.extents().len() as u32).map(|i| {
        let len = plan.extents()[i as usize].len as usize;
        layout.extent(&plan, i).map_or(Vec::new(), |place| {
            let start = place.offset as usize;
            arenas[place.arena].as_ref().unwrap()[start..start + len].to_vec()
        })
    });
    Ok(bytes.collect())
}

fn options(engine: Engine, cache: CachePolicy, workers: usize) -> ReadOptions {
    let mut options = ReadOptions::default();
    options.engine = engine;
    options.cache = cache;
    options.workers = Some(workers);
    options
}

#[test]
fn every_engine_reads_what_std_reads() {
    for folder in folders() {
        let mut paths = Vec::new();
        let mut extents = Vec::new();
        for (i, len) in [1, 511, 4096, 4097, 300_000, 9_000_001].into_iter().enumerate() {
            let path = folder.path().join(len.to_string());
            fs::write(&path, noise(len, i as u64)).unwrap();
            paths.push(path);
            let (file, len) = (i as u32, len as u64);
            // All of it but a ragged start, with a hole in the large ones.
            if len > 100_000 {
                extents.push(Extent::new(file, 7..len / 3));
                extents.push(Extent::new(file, len / 3..len / 3));
                extents.push(Extent::new(file, len / 2..len));
            } else {
                extents.push(Extent::new(file, (len / 10)..len));
            }
        }
        let want: Vec<Vec<u8>> = extents
            .iter()
            .map(|e| {
                fs::read(&paths[e.file as usize]).unwrap()[e.offset as usize..e.end() as usize]
                    .to_vec()
            })
            .collect();
        for engine in ENGINES {
            for cache in [CachePolicy::Residency, CachePolicy::Direct, CachePolicy::Buffered] {
                for (cold, workers, block, gap) in
                    [(true, 1, 4 << 20, 0), (false, 3, 64 << 10, 1 << 20), (true, 2, 4096, 4096)]
                {
                    if cold {
                        paths.iter().for_each(|p| evict(p));
                    }
                    let limits = Limits { block, gap, ..Limits::default() };
                    let got =
                        load(&paths, extents.clone(), limits, &options(engine, cache, workers));
                    let got = got.unwrap_or_else(|e| panic!("{engine} {cache:?}: {e}"));
                    assert!(got == want, "{engine} {cache:?} cold {cold} in {folder:?}");
                }
            }
        }
    }
}

#[test]
fn a_file_shorter_than_the_plan_is_an_error_up_front() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("short");
    fs::write(&path, noise(10_000, 1)).unwrap();
    for engine in ENGINES {
        let result = load(
            std::slice::from_ref(&path),
            vec![Extent::new(0, 0..10_001)],
            Limits::default(),
            &options(engine, CachePolicy::Residency, 2),
        );
        let error = result.unwrap_err();
        assert!(
            matches!(&error, Error::EarlyEnd { end: 10_000, needed: 10_001, path: p } if *p == path),
            "{error}"
        );
    }
}

/// A sink that does something to the file when the first block lands.
struct Meddler<'a> {
    inner: InPlace<'a>,
    once: std::sync::Once,
    act: &'a (dyn Fn() + Send + Sync),
}

// SAFETY: all memory comes from the inner sink, whose promises are passed on.
unsafe impl fst_io::sink::Sink for Meddler<'_> {
    fn reserve(
        &self,
        block: &fst_io::plan::Block,
        wait: bool,
    ) -> Result<Option<fst_io::sink::Target>, fst_io::sink::SinkError> {
        self.inner.reserve(block, wait)
    }
    fn landed(
        &self,
        block: &fst_io::plan::Block,
        target: fst_io::sink::Target,
    ) -> Result<(), fst_io::sink::SinkError> {
        self.once.call_once(self.act);
        self.inner.landed(block, target)
    }
    fn abandoned(&self, block: &fst_io::plan::Block, target: fst_io::sink::Target) {
        self.inner.abandoned(block, target);
    }
}

fn load_while(
    path: &Path,
    engine: Engine,
    act: &(dyn Fn() + Send + Sync),
) -> Result<fst_io::ReadStats, Error> {
    let files = [SourceFile::open(path, None).unwrap()];
    let limits = Limits { block: 64 << 10, ..Limits::default() };
    let plan = ReadPlan::new(vec![Extent::new(0, 0..files[0].len())], limits).unwrap();
    let layout = Layout::new(&plan, u64::MAX);
    let inner = InPlace::new(&plan, &layout, None, &|_, _| Ok(()));
    let sink = Meddler { inner, once: std::sync::Once::new(), act };
    let options = options(engine, CachePolicy::Residency, 1);
    fst_io::read(&files, &plan, &sink, &options, &Control::new())
}

#[test]
fn a_file_that_shrinks_or_is_replaced_meanwhile_is_an_error() {
    for folder in folders() {
        for engine in ENGINES {
            let path = folder.path().join("victim");
            fs::write(&path, noise(8 << 20, 3)).unwrap();
            let error = load_while(&path, engine, &|| {
                fs::File::options().write(true).open(&path).unwrap().set_len(5 << 20).unwrap();
            })
            .unwrap_err();
            let told = matches!(&error, Error::EarlyEnd { end, needed, path: p }
                    if *p == path && *end >= 5 << 20 && end < needed)
                || matches!(&error, Error::Changed { change: Change::Length { .. }, .. });
            assert!(told, "{engine}: {error}");

            fs::write(&path, noise(8 << 20, 4)).unwrap();
            let error = load_while(&path, engine, &|| {
                let other = folder.path().join("other");
                fs::write(&other, noise(8 << 20, 5)).unwrap();
                fs::rename(&other, &path).unwrap();
            })
            .unwrap_err();
            assert!(
                matches!(&error, Error::Changed { change: Change::Replaced, .. }),
                "{engine}: {error}"
            );

            fs::write(&path, noise(8 << 20, 6)).unwrap();
            let before = fs::metadata(&path).unwrap().modified().unwrap();
            let error = load_while(&path, engine, &|| {
                let mut file = fs::File::options().write(true).open(&path).unwrap();
                file.write_all(b"x").unwrap();
                // Clocks of file systems tick coarsely; the test must not depend on that.
                file.set_modified(before + std::time::Duration::from_secs(1)).unwrap();
            })
            .unwrap_err();
            assert!(
                matches!(&error, Error::Changed { change: Change::Written, .. }),
                "{engine}: {error}"
            );

            fs::write(&path, noise(8 << 20, 6)).unwrap();
            let before = fs::metadata(&path).unwrap();
            let error = load_while(&path, engine, &|| {
                let mut file = fs::File::options().write(true).open(&path).unwrap();
                while fs::metadata(&path).unwrap().ctime_nsec() == before.ctime_nsec() {
                    file.write_all(b"x").unwrap();
                    file.set_modified(before.modified().unwrap()).unwrap();
                }
            })
            .unwrap_err();
            assert!(
                matches!(&error, Error::Changed { change: Change::Status, .. }),
                "{engine}: {error}"
            );

            fs::write(&path, noise(8 << 20, 7)).unwrap();
            let removed = load_while(&path, engine, &|| fs::remove_file(&path).unwrap());
            assert_eq!(removed.unwrap().bytes_read, 8 << 20, "{engine}");
        }
    }
}

#[test]
fn cancelling_ends_the_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("long");
    fs::write(&path, noise(8 << 20, 7)).unwrap();
    for engine in ENGINES {
        let control = Control::new();
        let files = [SourceFile::open(&path, None).unwrap()];
        let limits = Limits { block: 64 << 10, ..Limits::default() };
        let plan = ReadPlan::new(vec![Extent::new(0, 0..8 << 20)], limits).unwrap();
        let layout = Layout::new(&plan, u64::MAX);
        let hook = |_: &fst_io::plan::Block| control.cancel();
        let sink = InPlace::new(&plan, &layout, None, &|_, _| Ok(())).on_landed(&hook);
        let options = options(engine, CachePolicy::Residency, 2);
        let error = fst_io::read(&files, &plan, &sink, &options, &control).unwrap_err();
        assert!(matches!(error, Error::Cancelled), "{engine}: {error}");
        assert!(control.landed_bytes() < 8 << 20);
    }
}

#[test]
fn a_failing_sink_ends_the_read_with_its_own_error() {
    #[derive(Debug)]
    struct Refuses;
    // SAFETY: it lends no memory at all.
    unsafe impl fst_io::sink::Sink for Refuses {
        fn reserve(
            &self,
            _: &fst_io::plan::Block,
            _: bool,
        ) -> Result<Option<fst_io::sink::Target>, fst_io::sink::SinkError> {
            Err("no room".into())
        }
        fn landed(
            &self,
            _: &fst_io::plan::Block,
            _: fst_io::sink::Target,
        ) -> Result<(), fst_io::sink::SinkError> {
            Ok(())
        }
        fn abandoned(&self, _: &fst_io::plan::Block, _: fst_io::sink::Target) {}
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("any");
    fs::write(&path, noise(8 << 20, 8)).unwrap();
    for engine in ENGINES {
        let files = [SourceFile::open(&path, None).unwrap()];
        let plan = ReadPlan::new(vec![Extent::new(0, 0..8 << 20)], Limits::default()).unwrap();
        let options = options(engine, CachePolicy::Residency, 2);
        let error = fst_io::read(&files, &plan, &Refuses, &options, &Control::new()).unwrap_err();
        assert!(matches!(&error, Error::Sink(e) if e.to_string() == "no room"), "{error}");
    }
}

#[test]
fn engines_that_cannot_run_say_so() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    let result = load(
        &[path],
        vec![Extent::new(0, 0..1)],
        Limits::default(),
        &options(Engine::Gds, CachePolicy::Residency, 1),
    );
    assert!(matches!(result, Err(Error::EngineUnavailable { engine: Engine::Gds, .. })));
}

#[test]
fn fresh_memory_is_faulted_in_by_the_reader_and_only_that() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = folder.path().join("cold");
    let len = (9 << 20) + 5;
    fs::write(&path, noise(len, 9)).unwrap();
    for engine in [Engine::Uring, Engine::Pread] {
        let files = [SourceFile::open(&path, None).unwrap()];
        if files[0].direct().is_none() {
            eprintln!("not tried: no direct I/O in {}", path.display());
            return;
        }
        let plan = ReadPlan::new(vec![Extent::new(0, 0..len as u64)], Limits::default()).unwrap();
        let whole: u64 = plan.blocks().iter().map(|block| block.len).sum();
        let layout = Layout::new(&plan, u64::MAX);
        let options = options(engine, CachePolicy::Direct, 2);
        let sink = InPlace::new(&plan, &layout, None, &|_, _| Ok(()));
        let stats = fst_io::read(&files, &plan, &sink, &options, &Control::new()).unwrap();
        assert_eq!(stats.touch_bytes, whole, "{engine}");
        assert!(!stats.touch.is_zero());

        let take = |_: &fst_io::plan::Block, _: &[u8]| Ok(());
        let scratch = fst_io::scratch::Scratch::new(&plan, 2, &|_, _| Ok(true), &take).unwrap();
        let stats = fst_io::read(&files, &plan, &scratch, &options, &Control::new()).unwrap();
        assert_eq!(stats.touch_bytes, 0, "{engine}: scratch memory is used again and again");
    }
}
