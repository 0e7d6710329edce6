//! Reads files whole into fresh host memory, some rounds, and prints what bound each:
//!
//!     cargo run --release -p fst-io --example measure -- [--engine E] [--workers N] [--depth N]
//!         [--block BYTES] [--rounds N] [--rest SECONDS] [--warm] [--prefault] FILE...
//!
//! Before each round the files are put out of the page cache (with `--warm`: into it), which is
//! checked, and as much memory as is read is touched and freed: under a hypervisor that takes
//! free memory back, what the first touch of a page costs is chance otherwise. `--rest` waits
//! between the two, for that very case. `--prefault` reads into memory that is there already:
//! the most that this engine can do.

#![allow(clippy::unwrap_used, clippy::panic, clippy::field_reassign_with_default)]

use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use fst_io::place::{InPlace, Layout};
use fst_io::plan::{Block, Limits, ReadPlan};
use fst_io::sink::{Origin, Sink, SinkError, Target};
use fst_io::{Control, Extent, HostBuffer, ReadOptions, SharedBuffer, SourceFile};

fn main() {
    let (mut options, mut limits) = (ReadOptions::default(), Limits::default());
    let (mut rounds, mut rest, mut warm, mut prefault) = (1, 0, false, false);
    let mut paths = Vec::new();
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().unwrap_or_else(|| panic!("{arg} needs a value"));
        match arg.as_str() {
            "--engine" => options.engine = value().parse().unwrap(),
            "--workers" => options.workers = Some(value().parse().unwrap()),
            "--depth" => options.depth = Some(value().parse().unwrap()),
            "--block" => limits.block = value().parse().unwrap(),
            "--rounds" => rounds = value().parse().unwrap(),
            "--rest" => rest = value().parse().unwrap(),
            "--warm" => warm = true,
            "--prefault" => prefault = true,
            _ => paths.push(PathBuf::from(arg)),
        }
    }
    let files: Vec<_> = paths.iter().map(|p| SourceFile::open(p, None).unwrap()).collect();
    limits.align = files.iter().map(SourceFile::align).max().unwrap();
    let extents = (0..).zip(&files).map(|(i, f)| Extent::new(i, 0..f.len())).collect();
    let plan = ReadPlan::new(extents, limits).unwrap();
    let bytes = plan.bytes_asked();
    for _ in 0..rounds {
        for file in &files {
            prepare_cache(file, warm);
        }
        let settle = HostBuffer::new(bytes as usize + (1 << 30)).unwrap();
        settle.populate(0, settle.len());
        let there = prefault.then_some(settle);
        std::thread::sleep(Duration::from_secs(rest));

        let layout = Layout::new(&plan, u64::MAX);
        let arenas = std::sync::Mutex::new(Vec::new());
        let keep = |_, arena: SharedBuffer| {
            arenas.lock().unwrap().push(arena);
            Ok(())
        };
        let control = Control::new();
        let cpu = cpu_seconds();
        let began = Instant::now();
        let stats = if let Some(memory) = &there {
            let sink = There { memory, plan: &plan, layout: &layout, origin: Origin::new() };
            fst_io::read(&files, &plan, &sink, &options, &control).unwrap()
        } else {
            let sink = InPlace::new(&plan, &layout, None, &keep);
            fst_io::read(&files, &plan, &sink, &options, &control).unwrap()
        };
        let seconds = began.elapsed().as_secs_f64();
        let cpu = cpu_seconds() - cpu;
        let gb = bytes as f64 / 1e9;
        println!("{:.2} GB/s  cpu {:.2} s/GB  {seconds:.2} s  {stats:?}", gb / seconds, cpu / gb);
    }
}

fn prepare_cache(file: &SourceFile, warm: bool) {
    let (resident, whole) = (|| file.resident_bytes().unwrap(), file.len());
    if warm {
        let mut from = std::fs::File::open(file.path()).unwrap();
        std::io::copy(&mut from, &mut std::io::sink()).unwrap();
        assert!(resident() >= whole / 100 * 99, "{} of {whole} bytes cached", resident());
    } else {
        file.buffered().unwrap().sync_all().unwrap();
        // SAFETY: advice on an open file touches no memory of this process.
        unsafe {
            libc::posix_fadvise(
                file.buffered().unwrap().as_raw_fd(),
                0,
                0,
                libc::POSIX_FADV_DONTNEED,
            )
        };
        assert!(resident() <= whole / 100, "{} of {whole} bytes still cached", resident());
    }
}

fn cpu_seconds() -> f64 {
    // SAFETY: all-zero bytes are a valid `rusage`, which the call fills.
    let usage = unsafe {
        let mut usage = std::mem::zeroed::<libc::rusage>();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
        usage
    };
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// Memory that needs no first touch: one buffer for the arenas of a layout, one behind the other.
struct There<'a> {
    memory: &'a HostBuffer,
    plan: &'a ReadPlan,
    layout: &'a Layout,
    origin: Origin,
}

// SAFETY: a block's place is its own, as in `InPlace`, and each block is read once.
unsafe impl Sink for There<'_> {
    fn reserve(&self, block: &Block, _wait: bool) -> Result<Option<Target>, SinkError> {
        let segment = &self.plan.segments()[block.segment as usize];
        let place = self.layout.places()[block.segment as usize];
        let start = self.layout.arenas()[..place.arena].iter().sum::<u64>().next_multiple_of(4096);
        let at = (start + place.offset + block.offset - segment.start) as usize;
        assert!(at + block.len as usize <= self.memory.capacity());
        // SAFETY: the place lies in the buffer, as was just checked.
        let ptr = unsafe { self.memory.as_ptr().add(at) };
        // SAFETY: see the comment on the implementation.
        Ok(Some(unsafe { Target::new(&self.origin, block, ptr, block.len as usize, 0) }))
    }
    fn landed(&self, _block: &Block, _target: Target) -> Result<(), SinkError> {
        Ok(())
    }
    fn abandoned(&self, _block: &Block, _target: Target) {}
    fn reused(&self) -> Option<(std::ptr::NonNull<u8>, usize)> {
        Some((self.memory.as_ptr(), (self.plan.bytes_asked() as usize + 8192).min(1 << 30)))
    }
}
