//! Sources that are no local files: read by range, compared with the bytes that they hold, and ended like
//! any other.

#![allow(clippy::unwrap_used)] // helpers of tests, too

use std::mem::MaybeUninit;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fst_io::place::{InPlace, Layout};
use fst_io::plan::{Limits, ReadPlan};
use fst_io::ranges::{RangeInto, Ranges};
use fst_io::source::{Source, Unfilled};
use fst_io::{
    Change, Control, Engine, Error, Extent, ReadOptions, ReadStats, SharedBuffer, SourceFile,
};

/// Bytes in memory, given out in short pieces, with what a test wants to go wrong.
#[derive(Debug, Default)]
struct Memory {
    bytes: Vec<u8>,
    /// Of which nothing comes from here on, without an error.
    ends: Option<u64>,
    stalls: bool,
    changed: AtomicBool,
    asked: Mutex<Vec<(u64, u64)>>,
    verified: AtomicU64,
}

impl Source for Memory {
    fn path(&self) -> &Path {
        Path::new("mem://a")
    }

    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read(&self, offset: u64, into: &mut Unfilled<'_>) -> Result<(), Error> {
        self.asked.lock().unwrap().push((offset, into.missing() as u64));
        if self.stalls {
            while !into.is_cancelled() {
                std::thread::sleep(Duration::from_millis(5));
            }
            return Err(Error::Cancelled);
        }
        let end = self.ends.unwrap_or(u64::MAX).min(offset + into.missing() as u64);
        if offset < end {
            let bytes = &self.bytes[offset as usize..end as usize];
            bytes.chunks(1000).for_each(|piece| into.append(piece));
        }
        // Too much changes nothing.
        if into.missing() == 0 {
            into.append(&[255; 10]);
        }
        Ok(())
    }

    fn verify_unchanged(&self) -> Result<(), Error> {
        self.verified.fetch_add(1, Relaxed);
        let path = self.path().to_owned();
        match self.changed.load(Relaxed) {
            true => Err(Error::Changed { path, change: Change::Version }),
            false => Ok(()),
        }
    }

    fn identity(&self) -> Vec<u8> {
        Vec::new()
    }
}

fn bytes(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| ((i * 31 + seed) % 251) as u8).collect()
}

fn memory(len: usize) -> Memory {
    Memory { bytes: bytes(len, 0), ..Memory::default() }
}

/// Reads extents in place, and checks that what arrived is `expected`.
fn read(
    files: &[SourceFile],
    extents: &[Extent],
    options: &ReadOptions,
    control: &Control,
    expected: &[&[u8]],
) -> Result<ReadStats, Error> {
    let limits = Limits { block: 64 << 10, gap: 100, ..SourceFile::limits_of(files) };
    let plan = ReadPlan::new(extents.to_vec(), limits)?;
    let layout = Layout::new(&plan, 1 << 20);
    let landed = Mutex::new(Vec::new());
    let on_arena = |arena: usize, buffer: SharedBuffer| {
        landed.lock().unwrap().push((arena, buffer));
        Ok(())
    };
    let sink = InPlace::new(&plan, &layout, None, &on_arena);
    let stats = fst_io::read(files, &plan, &sink, options, control)?;
    for (number, extent) in extents.iter().enumerate() {
        let place = layout.extent(&plan, number as u32).unwrap();
        let arenas = landed.lock().unwrap();
        let (_, buffer) = arenas.iter().find(|(arena, _)| *arena == place.arena).unwrap();
        let at = place.offset as usize;
        // SAFETY: nobody writes to an arena that was handed over.
        let found = unsafe { buffer.clone().piece(at..at + extent.len as usize) };
        let all = expected[extent.file as usize];
        assert!(found[..] == all[extent.offset as usize..extent.end() as usize], "{number}");
    }
    Ok(stats)
}

#[test]
fn only_what_is_wanted_is_asked_for_and_arrives() {
    let source = Arc::new(memory(1_000_000));
    let files = [SourceFile::remote(source.clone())];
    let extents = [5..100, 150..70_000, 70_000..70_001, 300_001..999_999];
    let extents = extents.map(|range| Extent::new(0, range));
    let stats =
        read(&files, &extents, &ReadOptions::default(), &Control::new(), &[&source.bytes]).unwrap();
    assert_eq!(stats.engine.used, Engine::Object);
    let mut asked = source.asked.lock().unwrap().clone();
    asked.sort_unstable();
    assert_eq!(asked[0], (5, 65_531), "from the first wanted byte, over a short gap");
    assert_eq!(asked[1], (65_536, 4465));
    assert_eq!(asked[2].0, 300_001);
    assert_eq!(asked.last().map(|(at, len)| at + len), Some(999_999));
    let fetched: u64 = asked.iter().map(|(_, len)| len).sum();
    assert_eq!(fetched, 69_996 + 699_998);
    assert_eq!(source.verified.load(Relaxed), 1);
}

#[test]
fn local_files_and_others_are_read_together() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("b");
    let local = bytes(300_000, 7);
    std::fs::write(&path, &local).unwrap();
    let source = Arc::new(memory(300_000));
    let files = [SourceFile::remote(source.clone()), SourceFile::open(&path, None).unwrap()];
    let extents = [Extent::new(0, 1..200_000), Extent::new(1, 77..300_000)];
    let expected: [&[u8]; 2] = [&source.bytes, &local];
    read(&files, &extents, &ReadOptions::default(), &Control::new(), &expected).unwrap();
}

#[test]
fn ranges_into_memory_that_exists() {
    let source = Arc::new(memory(3_000_000));
    let files = [SourceFile::remote(source.clone())];
    let ranges = [(3u64, 10usize), (1000, 900_000), (2_000_001, 999_999)];
    let mut into: Vec<Vec<MaybeUninit<u8>>> =
        ranges.map(|(_, len)| vec![MaybeUninit::uninit(); len]).into();
    let places = ranges.iter().zip(&mut into);
    let places = places.map(|((start, _), into)| RangeInto { file: 0, start: *start, into });
    let ranges_into = Ranges::new(&files, places, 1000).unwrap();
    let slots = ranges_into.slots().unwrap();
    let follow = || Arc::new(Control::new());
    ranges_into.read(&files, &ReadOptions::default(), &slots, &follow, &|_, _| Ok(())).unwrap();
    for ((start, len), into) in ranges.into_iter().zip(into) {
        // SAFETY: the read succeeded, so that every byte was written.
        let found: Vec<u8> = into.iter().map(|byte| unsafe { byte.assume_init() }).collect();
        assert!(found == source.bytes[start as usize..start as usize + len]);
    }
}

#[test]
fn missing_bytes_and_changes_are_errors() {
    let one = [Extent::new(0, 0..500_000)];
    // One worker reads the block that has the end before those behind it.
    let mut options = ReadOptions::default();
    options.workers = Some(1);
    let source = Memory { ends: Some(300_000), ..memory(500_000) };
    let files = [SourceFile::remote(Arc::new(source))];
    let error = read(&files, &one, &options, &Control::new(), &[]).unwrap_err();
    assert!(matches!(error, Error::EarlyEnd { end: 300_000, .. }), "{error}");
    let error = files[0].read_exact_at(&mut [0; 20], 299_990).unwrap_err();
    assert!(matches!(error, Error::EarlyEnd { end: 300_000, needed: 300_010, .. }), "{error}");

    let source = Memory { changed: true.into(), ..memory(500_000) };
    let files = [SourceFile::remote(Arc::new(source))];
    let error = read(&files, &one, &options, &Control::new(), &[]).unwrap_err();
    assert!(matches!(error, Error::Changed { change: Change::Version, .. }), "{error}");
}

#[test]
fn a_source_that_stalls_is_left_when_the_read_is_cancelled() {
    let files = [SourceFile::remote(Arc::new(Memory { stalls: true, ..memory(500_000) }))];
    let one = [Extent::new(0, 0..500_000)];
    let control = Control::new();
    std::thread::scope(|scope| {
        let read =
            scope.spawn(|| read(&files, &one, &ReadOptions::default(), &control, &[]).map(drop));
        std::thread::sleep(Duration::from_millis(50));
        control.cancel();
        let began = Instant::now();
        assert!(matches!(read.join().unwrap(), Err(Error::Cancelled)));
        assert!(began.elapsed() < Duration::from_secs(5));
    });
}

#[test]
fn engines_for_local_files_are_refused() {
    let source = Arc::new(memory(1000));
    let files = [SourceFile::remote(source.clone())];
    for engine in [Engine::Uring, Engine::Pread, Engine::Mmap, Engine::Gds] {
        let mut options = ReadOptions::default();
        options.engine = engine;
        let one = [Extent::new(0, 0..1000)];
        let error = read(&files, &one, &options, &Control::new(), &[]).unwrap_err();
        assert!(matches!(error, Error::EngineUnavailable { .. }), "{error}");
    }
    // SAFETY: the mapping is not made.
    let error = unsafe { fst_io::Mapping::new(&files[0]) }.unwrap_err();
    assert!(error.to_string().contains("no local file"), "{error}");
}
