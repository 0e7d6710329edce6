//! Contenders that move whole files and know no tensors until the end: a plain read, and the bounds.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Mutex;

use anyhow::{Context, Result};
use memmap2::Mmap;
use safetensors::SafeTensors;

use super::official::map;
use super::{Job, Loaded, Visit};
use crate::huge::HugeBuffer;

/// Size of one copy or buffered read.
const BLOCK: usize = 4 << 20;
/// Size of one direct read, and how many are in flight. Of 128 KiB to 16 MiB and 1 to 64 this was the
/// fastest on the machine of RESULTS.md; 4 MiB x 16 gave a sixth less.
const READ: usize = 512 << 10;
const IN_FLIGHT: usize = 32;
/// Direct reads are a multiple of this; no device in use asks for more.
const DIRECT_ALIGNMENT: usize = 4096;

/// Whole files in memory, header included.
struct WholeFiles<B>(Vec<B>);

/// File contents of any storage.
trait Bytes {
    fn bytes(&self) -> &[u8];
}

impl Bytes for Vec<u8> {
    fn bytes(&self) -> &[u8] {
        self
    }
}

/// A buffer whose first `len` bytes are the file.
struct HugeFile {
    buffer: HugeBuffer,
    len: usize,
}

impl Bytes for HugeFile {
    fn bytes(&self) -> &[u8] {
        &self.buffer.as_slice()[..self.len]
    }
}

impl<B: Bytes> Loaded for WholeFiles<B> {
    fn bytes(&self) -> u64 {
        let header = |b: &[u8]| SafeTensors::read_metadata(b).map_or(0, |(n, _)| n + 8);
        self.0.iter().map(|b| (b.bytes().len() - header(b.bytes())) as u64).sum()
    }

    fn for_each(&self, visit: &mut Visit<'_>) -> Result<()> {
        for file in &self.0 {
            for (name, view) in SafeTensors::deserialize(file.bytes())?.iter() {
                visit(name, view.shape(), view.data());
            }
        }
        Ok(())
    }
}

/// `std::fs::read` of each file and a parse of its header.
pub(super) fn fs_read(files: &[PathBuf]) -> Result<Box<dyn Loaded>> {
    let mut whole = Vec::new();
    for path in files {
        let bytes = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
        SafeTensors::deserialize(&bytes)?;
        whole.push(bytes);
    }
    Ok(Box::new(WholeFiles(whole)))
}

fn file_len(path: &PathBuf) -> Result<usize> {
    let len = std::fs::metadata(path).with_context(|| format!("stat {}", path.display()))?.len();
    Ok(usize::try_from(len)?)
}

/// Calls `copy` for each block of each file from one thread per core.
fn in_parallel(
    targets: &mut [HugeFile],
    copy: impl Fn(usize, usize, &mut [u8]) -> io::Result<()> + Sync,
) -> io::Result<()> {
    let blocks: Vec<(usize, usize, &mut [u8])> = targets
        .iter_mut()
        .enumerate()
        .flat_map(|(file, target)| {
            let len = target.len;
            let blocks = target.buffer.as_mut_slice()[..len].chunks_mut(BLOCK);
            blocks.enumerate().map(move |(i, block)| (file, i * BLOCK, block))
        })
        .collect();
    let queue = Mutex::new(blocks.into_iter());
    let next = || match queue.lock() {
        Ok(mut queue) => queue.next(),
        Err(_) => None,
    };
    let worker = || -> io::Result<()> {
        while let Some((file, offset, block)) = next() {
            copy(file, offset, block)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        for handle in handles {
            handle.join().map_err(|_| io::Error::other("a copying thread panicked"))??;
        }
        Ok(())
    })
}

fn fresh(files: &[PathBuf]) -> Result<Vec<HugeFile>> {
    let mut targets = Vec::new();
    for path in files {
        let len = file_len(path)?;
        targets.push(HugeFile { buffer: HugeBuffer::fresh(len)?, len });
    }
    Ok(targets)
}

/// Parallel copy out of mappings whose page tables are filled beforehand.
pub(super) fn memcpy(files: Vec<PathBuf>) -> Result<Job> {
    let mut maps: Vec<Mmap> = Vec::new();
    for path in &files {
        let map = map(path)?;
        super::official::touch_pages(&map);
        maps.push(map);
    }
    Ok(Box::new(move || {
        let mut targets = fresh(&files)?;
        in_parallel(&mut targets, |file, offset, block| {
            block.copy_from_slice(&maps[file][offset..offset + block.len()]);
            Ok(())
        })?;
        Ok(Box::new(WholeFiles(targets)))
    }))
}

/// Parallel buffered reads.
pub(super) fn pread_copy(files: &[PathBuf]) -> Result<Box<dyn Loaded>> {
    let mut targets = fresh(files)?;
    let opened = files.iter().map(File::open).collect::<io::Result<Vec<_>>>()?;
    in_parallel(&mut targets, |file, offset, block| {
        opened[file].read_exact_at(block, offset as u64)
    })?;
    Ok(Box::new(WholeFiles(targets)))
}

/// What the disk can give: direct reads into memory that is there already.
#[cfg(target_os = "linux")]
pub(super) fn raw_ceiling(files: Vec<PathBuf>) -> Result<Job> {
    use anyhow::{bail, ensure};
    use io_uring::{IoUring, opcode, types};
    use std::os::fd::AsRawFd;

    let mut targets = Vec::new();
    for path in &files {
        let len = file_len(path)?;
        // The last read may ask for the whole block that the file ends in.
        let buffer = HugeBuffer::prefaulted(len.next_multiple_of(DIRECT_ALIGNMENT))?;
        targets.push(HugeFile { buffer, len });
    }
    Ok(Box::new(move || {
        let mut ring = IoUring::new(IN_FLIGHT as u32)?;
        let mut opened = Vec::new();
        for path in &files {
            let file = File::options()
                .read(true)
                .custom_flags(libc::O_DIRECT)
                .open(path)
                .with_context(|| format!("open {} with O_DIRECT", path.display()))?;
            opened.push(file);
        }
        // Reads that land in `targets`: file, offset, bytes wanted, bytes asked for.
        let mut reads = Vec::new();
        for (file, target) in targets.iter_mut().enumerate() {
            let len = target.len;
            let memory = target.buffer.as_mut_slice();
            for (i, block) in memory.chunks_mut(READ).enumerate() {
                let wanted = block.len().min(len - i * READ);
                let entry = opcode::Read::new(
                    types::Fd(opened[file].as_raw_fd()),
                    block.as_mut_ptr(),
                    block.len() as u32,
                )
                .offset((i * READ) as u64)
                .build()
                .user_data(reads.len() as u64);
                reads.push((file, i, wanted, entry));
            }
        }
        let (mut next, mut pending, mut failure) = (0, 0, None);
        while next < reads.len() || pending > 0 {
            while failure.is_none() && next < reads.len() && pending < IN_FLIGHT {
                // SAFETY: each entry has a block of its own in `targets` and a file in `opened`; both
                // outlive this loop, which only ends (also on failure) when nothing is pending.
                if unsafe { ring.submission().push(&reads[next].3) }.is_err() {
                    break;
                }
                next += 1;
                pending += 1;
            }
            if failure.is_some() && pending == 0 {
                break;
            }
            if let Err(error) = ring.submit_and_wait(1)
                && error.kind() != io::ErrorKind::Interrupted
            {
                // The kernel may still write into the blocks: give them up rather than free them.
                std::mem::forget(targets);
                return Err(error).context("io_uring_enter");
            }
            for done in ring.completion() {
                pending -= 1;
                let (file, block, wanted, _) = &reads[done.user_data() as usize];
                if done.result() < *wanted as i32 {
                    failure = Some((*file, *block, done.result()));
                }
            }
        }
        if let Some((file, block, result)) = failure {
            let path = files[file].display();
            ensure!(result < 0, "{path}: short direct read of block {block}: {result} bytes");
            bail!("{path}: block {block}: {}", io::Error::from_raw_os_error(-result));
        }
        Ok(Box::new(WholeFiles(targets)))
    }))
}
