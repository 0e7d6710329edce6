//! What files do that test folders do not: errors in mid-file, reads that end early, direct reads
//! that are refused only when they are tried.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Mutex;

use memmap2::MmapOptions;

use super::*;
use crate::SharedBuffer;
use crate::extent::Extent;
use crate::place::{InPlace, Layout};
use crate::plan::{Block, Limits};
use crate::scratch::Scratch;

const KIB: u64 = 1 << 10;
const ENGINES: [Engine; 3] = [Engine::Uring, Engine::Pread, Engine::Mmap];

fn noise(len: u64) -> Vec<u8> {
    (0..len).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

/// Reads a range of a source; the bytes from `start` on.
fn load(
    file: &SourceFile,
    (start, end): (u64, u64),
    limits: Limits,
    options: &ReadOptions,
) -> Result<Vec<u8>, Error> {
    let plan = ReadPlan::new(vec![Extent::new(0, start..end)], limits)?;
    let layout = Layout::new(&plan, u64::MAX);
    let arena = Mutex::new(SharedBuffer::empty());
    let keep = |_, full: SharedBuffer| {
        *arena.lock().unwrap() = full;
        Ok(())
    };
    let sink = InPlace::new(&plan, &layout, None, &keep);
    super::read(std::slice::from_ref(file), &plan, &sink, options, &Control::new())?;
    let at = layout.extent(&plan, 0).unwrap().offset as usize;
    Ok(arena.lock().unwrap()[at..at + (end - start) as usize].to_vec())
}

/// All blocks once, those that are wanted first before the others.
#[test]
fn preferred_blocks_come_first_and_each_comes_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    let bytes = noise(640 * KIB);
    fs::write(&path, &bytes).unwrap();
    let files = [SourceFile::open(&path, None).unwrap()];
    let limits = Limits { block: 64 * KIB, align: files[0].align(), ..Limits::default() };
    let extents = (0..10).map(|i| Extent::new(0, i * 64 * KIB..(i + 1) * 64 * KIB));
    let plan = ReadPlan::new(extents.collect(), limits).unwrap();
    assert_eq!(plan.blocks().len(), 10);
    // Numbers of extents, which are those of the whole plan's blocks, and stay in its parts.
    let part = plan.only(|block| block.index % 2 == 1);
    let options = ReadOptions { engine: Engine::Pread, workers: Some(1), ..ReadOptions::default() };
    let order = |plan: &ReadPlan, first: &[u32], then: &[u32]| {
        let control = Control::new();
        first.iter().for_each(|block| control.prefer(*block..block + 1));
        let seen = Mutex::new(Vec::new());
        let take = |block: &Block, _: &[u8]| {
            let mut seen = seen.lock().unwrap();
            // Wanted in the midst of it.
            if seen.is_empty() {
                then.iter().for_each(|block| control.prefer(*block..block + 2));
            }
            seen.push(block.extents.start);
            Ok(())
        };
        let sink = Scratch::new(plan, 1, &|_, _| Ok(true), &take).unwrap();
        super::read(&files, plan, &sink, &options, &control).unwrap();
        seen.into_inner().unwrap()
    };
    assert_eq!(order(&plan, &[], &[]), (0..10).collect::<Vec<_>>());
    assert_eq!(order(&plan, &[4, 7], &[7, 8]), [7, 8, 9, 4, 0, 1, 2, 3, 5, 6]);
    assert_eq!(order(&plan, &[99, 3, u32::MAX - 1], &[3]), [3, 4, 0, 1, 2, 5, 6, 7, 8, 9]);
    assert_eq!(order(&part, &[4, 7], &[]), [7, 1, 3, 5, 9]);
}

/// On a ring this is memory that the kernel keeps hold of.
#[test]
fn bytes_pass_through_scratch_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    let bytes = noise(700 * KIB + 5);
    fs::write(&path, &bytes).unwrap();
    let files = [SourceFile::open(&path, None).unwrap()];
    let limits = Limits { block: 64 * KIB, align: files[0].align(), ..Limits::default() };
    let plan = ReadPlan::new(vec![Extent::new(0, 3..bytes.len() as u64)], limits).unwrap();
    for engine in ENGINES {
        if ResolvedEngine::resolve(engine).is_err() {
            continue;
        }
        let seen = Mutex::new(vec![0; bytes.len()]);
        let take = |block: &Block, bytes: &[u8]| {
            let start = block.offset as usize;
            seen.lock().unwrap()[start..start + bytes.len()].copy_from_slice(bytes);
            Ok(())
        };
        let sink = Scratch::new(&plan, 3, &|_, _| Ok(true), &take).unwrap();
        let options = ReadOptions { engine, cache: CachePolicy::Direct, ..ReadOptions::default() };
        super::read(&files, &plan, &sink, &options, &Control::new()).unwrap();
        assert!(seen.lock().unwrap()[3..] == bytes[3..], "{engine:?}");
    }
}

#[test]
fn only_files_that_are_read_from_must_not_change() {
    let folder = tempfile::tempdir().unwrap();
    let paths = ["a", "b"].map(|name| folder.path().join(name));
    paths.iter().for_each(|path| fs::write(path, noise(100 * KIB)).unwrap());
    let files = paths.each_ref().map(|path| SourceFile::open(path, None).unwrap());
    OpenOptions::new().append(true).open(&paths[1]).unwrap().set_len(200 * KIB).unwrap();
    for engine in ENGINES {
        if ResolvedEngine::resolve(engine).is_err() {
            continue;
        }
        let read = |file: u32| {
            let extents = vec![Extent::new(file, 0..50 * KIB)];
            let plan = ReadPlan::new(extents, Limits::default()).unwrap();
            let layout = Layout::new(&plan, u64::MAX);
            let sink = InPlace::new(&plan, &layout, None, &|_, _| Ok(()));
            let options = ReadOptions { engine, ..ReadOptions::default() };
            super::read(&files, &plan, &sink, &options, &Control::new()).map(drop)
        };
        read(0).unwrap();
        assert!(matches!(read(1), Err(Error::Changed { path, .. }) if path == paths[1]));
    }
}

#[test]
fn an_error_in_mid_file_names_the_byte_where_it_is() {
    // This process's memory as a file: a mapping reaches past its file's end, and what lies there
    // cannot be read. The read that meets the border is short; the next one fails with EIO.
    let good = 300 * KIB;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mapped");
    fs::write(&path, noise(good)).unwrap();
    let mapped = File::open(&path).unwrap();
    // SAFETY: the file is this test's own.
    let map = unsafe { MmapOptions::new().len(512 * KIB as usize).map(&mapped).unwrap() };
    let start = map.as_ptr() as u64;
    let page = crate::sys::page_size() as u64;
    let border = start + good.next_multiple_of(page);
    for engine in ENGINES {
        if ResolvedEngine::resolve(engine).is_err() {
            continue;
        }
        let memory = Path::new("/proc/self/mem");
        let file = SourceFile::faked(memory, None, i64::MAX as u64).unwrap();
        let limits = Limits { block: 64 * KIB, ..Limits::default() };
        let options = ReadOptions { engine, workers: Some(2), ..ReadOptions::default() };
        let error = load(&file, (start, start + 512 * KIB), limits, &options).unwrap_err();
        let Error::Read { path, offset, source, .. } = &error else { panic!("{engine}: {error}") };
        assert_eq!(path.to_str(), Some("/proc/self/mem"));
        if engine == Engine::Mmap {
            assert_eq!(source.raw_os_error(), Some(libc::ENODEV), "it cannot be mapped");
            continue;
        }
        assert_eq!(source.raw_os_error(), Some(libc::EIO), "{engine}: {error}");
        // Blocks past the border fail, too, and any of them may be the first.
        let blocks = border..start + 512 * KIB;
        assert!(blocks.contains(offset), "{engine}: {offset:#x} not in {blocks:#x?}");

        // One block, so that the read goes over the border: the short part counts.
        let limits = Limits { block: 1 << 40, ..limits };
        let error = load(&file, (start, start + 512 * KIB), limits, &options).unwrap_err();
        let Error::Read { offset, .. } = error else { panic!("{engine}: {error}") };
        assert_eq!(offset, border, "{engine}");

        let whole = load(&file, (start + 5, start + good), limits, &options).unwrap();
        assert!(whole == noise(good)[5..], "{engine}");
    }
    drop(map);
}

#[test]
fn direct_reads_refused_when_tried_go_through_the_cache() {
    let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let path = folder.path().join("data");
    let len = 700 * KIB + 77;
    fs::write(&path, noise(len)).unwrap();
    for engine in [Engine::Uring, Engine::Pread] {
        if ResolvedEngine::resolve(engine).is_err() {
            continue;
        }
        let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path);
        let Ok(direct) = direct else { return };
        let opened = SourceFile::open(&path, None).unwrap();
        let file = SourceFile::faked(&path, Some(direct), len).unwrap();
        // Offsets at multiples of 64 bytes: too little for direct reads of a disk.
        let limits = Limits { align: 64, block: 64 * KIB, ..Limits::default() };
        let options = ReadOptions {
            engine,
            cache: CachePolicy::Direct,
            workers: Some(2),
            ..ReadOptions::default()
        };
        let got = load(&file, (64, len), limits, &options).unwrap();
        assert!(got == noise(len)[64..], "{engine}");
        if matches!(opened.direct_io(), crate::DirectIo::Available { offset_align: 128.., .. }) {
            assert!(file.direct().is_none(), "{engine}: it was refused, and that is kept");
        }
    }
}

/// Has `io_uring_enter(2)` fail for the calling thread from here on.
fn refuse_enter(errno: i32) {
    let code = |code: u32, jf, k| libc::sock_filter { code: code as u16, jt: 0, jf, k };
    let mut program = [
        code(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        code(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, libc::SYS_io_uring_enter as u32),
        code(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
        code(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the kernel copies the program, which lives until the call returns.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let mode = libc::SECCOMP_MODE_FILTER;
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const filter), 0);
    }
}

#[test]
fn a_kernel_that_stays_short_of_resources_ends_the_read() {
    if uring_refusal().is_some() {
        return;
    }
    let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let path = folder.path().join("data");
    fs::write(&path, noise(2048 * KIB)).unwrap();
    for errno in [libc::EAGAIN, libc::EBUSY, libc::EBADF] {
        let file = SourceFile::open(&path, None).unwrap();
        let limits = Limits { block: 64 * KIB, align: file.align(), ..Limits::default() };
        let plan = ReadPlan::new(vec![Extent::new(0, 0..2048 * KIB)], limits).unwrap();
        let layout = Layout::new(&plan, u64::MAX);
        let options = ReadOptions {
            engine: Engine::Uring,
            cache: CachePolicy::Direct,
            workers: Some(1),
            // Most blocks are still to be asked for when the kernel refuses, however quick it was.
            depth: Some(4),
            ..ReadOptions::default()
        };
        let landed = AtomicU64::new(0);
        let hook = |_: &crate::plan::Block| {
            if landed.fetch_add(1, Relaxed) == 2 {
                refuse_enter(errno);
            }
        };
        let sink = InPlace::new(&plan, &layout, None, &|_, _| Ok(())).on_landed(&hook);
        // On a thread of its own, which the filter ends with.
        let read = || super::read(&[file], &plan, &sink, &options, &Control::new());
        let result = thread::scope(|scope| scope.spawn(read).join().unwrap());
        let Err(Error::Ring { source }) = result else { panic!("{result:?}") };
        assert_eq!(source.raw_os_error(), Some(errno));
    }
}
