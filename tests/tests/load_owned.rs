//! Loads into memory that the caller makes for each tensor and gets back as it lands.

#![allow(clippy::unwrap_used, clippy::panic)]

mod load_support;

use std::collections::BTreeMap;
use std::fs;
use std::mem::MaybeUninit;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use fst::{Checkpoint, Dtype, Error, Filled, Loader, Manifest, OwnedMemory, Planned, Request};
use fst_tests::{misaligned_checkpoint, odd_checkpoint};

use load_support::*;

/// Memory at a chosen place: its address equals the tensor's place in the file modulo a page, so that cold
/// files are read straight into it.
struct Congruent {
    pages: Vec<MaybeUninit<u8>>,
    start: usize,
    len: usize,
}

impl Congruent {
    fn new(planned: &Planned) -> Self {
        let len = planned.byte_len() as usize;
        let pages = vec![MaybeUninit::new(0xee); len + 8192];
        let phase = planned.contiguous().map_or(0, |range| range.start) as usize % 4096;
        let start = (phase + 4096 - pages.as_ptr() as usize % 4096) % 4096;
        Self { pages, start, len }
    }
}

// SAFETY: a vector's memory, always the same part of it.
unsafe impl OwnedMemory for Congruent {
    fn memory(&mut self) -> &mut [MaybeUninit<u8>] {
        &mut self.pages[self.start..self.start + self.len]
    }
}

#[test]
fn each_tensor_comes_back_once_and_right() {
    let dir = tempfile::tempdir().unwrap();
    let paths = odd_checkpoint(dir.path());
    let checkpoint = Checkpoint::open_all(&paths).unwrap();
    for cold in [false, true] {
        for loader in [
            Loader::new(),
            Loader::new().dtype(Dtype::F32),
            Loader::new()
                .request([Request::new("huge").slice(1, 1..700).named("part"), "a".into()]),
        ] {
            let Ok(wanted) = loader.load(&checkpoint) else { continue };
            if cold {
                paths.iter().for_each(|path| chill(path));
            }
            let seen = Mutex::new(BTreeMap::new());
            let report = loader
                .load_owned(&checkpoint, Congruent::new, |planned, mut filled| {
                    let again = seen
                        .lock()
                        .unwrap()
                        .insert(planned.name().to_owned(), filled.bytes().to_vec());
                    assert!(again.is_none(), "{} came twice", planned.name());
                })
                .unwrap();
            let seen = seen.into_inner().unwrap();
            assert_eq!((seen.len(), report.tensors), (wanted.len(), wanted.len()));
            assert_eq!(report.bytes, wanted.report().bytes);
            for tensor in &wanted {
                assert!(seen[tensor.name()] == tensor.bytes().unwrap(), "{}", tensor.name());
            }
        }
    }
}

/// Takes a file out of the page cache, as far as the file system does that.
fn chill(path: &std::path::Path) {
    use std::os::fd::AsRawFd;
    let file = fs::File::open(path).unwrap();
    file.sync_all().unwrap();
    // SAFETY: advice on an open file touches no memory of this process.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
}

#[test]
fn vectors_are_filled_behind_what_they_have() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("misaligned.safetensors");
    misaligned_checkpoint(&path);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let wanted = Loader::new().dtype(Dtype::F32).load(&checkpoint).unwrap();
    let seen = Mutex::new(BTreeMap::new());
    let allocate = |planned: &Planned| {
        let mut vec = Vec::with_capacity(1 + planned.shape().iter().product::<usize>());
        vec.push(0.5f32);
        vec
    };
    let landed = |planned: &Planned, filled: Filled<Vec<f32>>| {
        seen.lock().unwrap().insert(planned.name().to_owned(), filled.into_vec());
    };
    Loader::new().dtype(Dtype::F32).load_owned(&checkpoint, allocate, landed).unwrap();
    for (name, vec) in seen.into_inner().unwrap() {
        let bytes: Vec<u8> = vec[1..].iter().flat_map(|x| x.to_le_bytes()).collect();
        assert!(vec[0] == 0.5 && bytes == wanted.get(&name).unwrap().bytes().unwrap(), "{name}");
    }
}

#[test]
fn memory_that_does_not_suit_is_refused_and_nothing_is_lost() {
    /// Counts those that are alive.
    struct Counted<'c>(Vec<u8>, &'c AtomicUsize);
    impl Drop for Counted<'_> {
        fn drop(&mut self) {
            self.1.fetch_sub(1, Ordering::SeqCst);
        }
    }
    // SAFETY: as the vector's.
    unsafe impl OwnedMemory for Counted<'_> {
        fn memory(&mut self) -> &mut [MaybeUninit<u8>] {
            self.0.memory()
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let paths = odd_checkpoint(dir.path());
    let checkpoint = Checkpoint::open_all(&paths).unwrap();
    let alive = AtomicUsize::new(0);
    let load = |loader: &Loader, less: usize, landed: &(dyn Fn(&Planned) + Sync)| {
        let allocate = |planned: &Planned| {
            alive.fetch_add(1, Ordering::SeqCst);
            Counted(Vec::with_capacity((planned.byte_len() as usize).saturating_sub(less)), &alive)
        };
        loader.load_owned(&checkpoint, allocate, |planned, _| landed(planned))
    };
    let error = load(&Loader::new(), 100, &|_| panic!("read")).unwrap_err();
    assert!(matches!(&error, Error::DestinationLength { .. }), "{error}");
    let allocate = |planned: &Planned| Vec::<i16>::with_capacity(planned.byte_len() as usize);
    let error = Loader::new().load_owned(&checkpoint, allocate, |_, _| {}).unwrap_err();
    assert!(matches!(error, Error::WrongDtype { .. }), "{error}");

    let mut sums = Loader::new().checksums(&checkpoint, |_| {}).unwrap();
    let last = sums.len() - 1;
    sums[last].sha256 = sums[0].sha256;
    let wrong = Loader::new().verify(Manifest::new(sums).unwrap());
    let error = load(&wrong, 0, &|_| {}).unwrap_err();
    assert!(matches!(error, Error::Verify(_)), "{error}");

    let panicking = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        load(&Loader::new(), 0, &|planned| assert!(planned.byte_len() < 10_000, "too large for me"))
    }));
    assert!(panicking.is_err());
    load(&Loader::new(), 0, &|_| {}).unwrap();
    assert_eq!(alive.load(Ordering::SeqCst), 0);
}

/// Pages that go back to the system when they are dropped, as a vector's may not.
struct Pages(memmap2::MmapMut);

// SAFETY: a mapping stays where it is, and is this value's own.
unsafe impl OwnedMemory for Pages {
    fn memory(&mut self) -> &mut [MaybeUninit<u8>] {
        let (start, len) = (self.0.as_mut_ptr().cast(), self.0.len());
        // SAFETY: the same bytes, of which less is promised.
        unsafe { std::slice::from_raw_parts_mut(start, len) }
    }
}

/// What was handed back is free again before the last of it is read.
#[test]
fn a_model_larger_than_its_share_of_memory_passes_through() {
    let dir = tempfile::tempdir().unwrap();
    let data = noise(96 << 20, 3);
    let path = dir.path().join("m.safetensors");
    let view = |part| {
        safetensors::tensor::TensorView::new(safetensors::Dtype::U8, vec![2 << 20], part).unwrap()
    };
    let views = data.chunks(2 << 20).enumerate().map(|(i, part)| (format!("t{i:02}"), view(part)));
    safetensors::serialize_to_file(views, None, &path).unwrap();
    drop(data);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let held = |line: &str| {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix(line)).unwrap().trim().to_owned();
        line.strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
    };
    let before = held("RssAnon:");
    let most = AtomicUsize::new(0);
    let allocate =
        |planned: &Planned| Pages(memmap2::MmapMut::map_anon(planned.byte_len() as usize).unwrap());
    Loader::new()
        .workers(2)
        .load_owned(&checkpoint, allocate, |_, filled| {
            most.fetch_max(held("RssAnon:").saturating_sub(before) as usize, Ordering::SeqCst);
            drop(filled);
        })
        .unwrap();
    let most = most.into_inner();
    assert!(most < 64 << 20, "{} MiB of 96 in memory at once", most >> 20);
}
