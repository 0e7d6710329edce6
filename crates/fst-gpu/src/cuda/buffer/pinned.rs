//! Pinned host memory: blocks that storage reads into and that copy engines read from.
//!
//! A [`PinnedRing`] hands out blocks of one size. Its memory is pinned by a thread of its own,
//! segment by segment, so that the first reads run while the rest is still being pinned. Memory is
//! ordinary cached memory on huge pages where the system has them (write-combined memory would make
//! every read by the CPU slow), on the device's NUMA node where there are several.

use super::free::FreeList;
use crate::cuda::device::CudaDevice;
use crate::cuda::sys::code;
use crate::error::{Error, Result};
use cudarc::driver::sys;
use fst_io::HostBuffer;
use std::ffi::c_void;
use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Blocks are multiples of this, in bytes: direct I/O asks for no more than a page.
pub const BLOCK_ALIGN: usize = 4096;
/// Pinned at once, in bytes, where blocks are shorter: as long as a block of the default size, so that reads
/// into the first blocks go on while the others are pinned.
const SEGMENT: usize = 2 << 20;

/// What happens to a ring's memory when the ring is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Afterwards {
    /// It is unpinned and given back to the system.
    #[default]
    Release,
    /// It stays pinned for the next ring of the process, until [`release_kept`].
    Keep,
}

/// Size and fate of a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingOptions {
    /// Bytes of a block, a multiple of [`BLOCK_ALIGN`].
    pub block_bytes: usize,
    /// Number of blocks.
    pub blocks: usize,
    /// What happens to the memory in the end.
    pub afterwards: Afterwards,
}

impl Default for RingOptions {
    /// 48 blocks of 2 MiB, released in the end: few enough that those in use stay in the processor's last
    /// cache, where neither reads into them nor the copies out of them wait for memory.
    fn default() -> Self {
        Self { block_bytes: 2 << 20, blocks: 48, afterwards: Afterwards::Release }
    }
}

impl RingOptions {
    /// No more blocks than a load of `blocks` blocks can use, rounded up to what is pinned at once,
    /// so that rings of the same blocks can use each other's memory.
    #[must_use]
    pub fn for_blocks(self, blocks: usize) -> Self {
        let at_once = (SEGMENT / self.block_bytes.max(1)).max(1);
        Self { blocks: self.blocks.min(blocks.max(1).next_multiple_of(at_once)), ..self }
    }
}

/// Segments kept for later rings.
static KEPT: Mutex<Vec<PinnedMemory>> = Mutex::new(Vec::new());

/// The most that is kept, in bytes: more than two rings of the default size. Loads that ran at once may have
/// had more.
const MOST_KEPT: usize = 256 << 20;

/// Unpins and frees what finished rings kept ([`Afterwards::Keep`]). Returns the bytes freed.
pub fn release_kept() -> usize {
    let kept = std::mem::take(&mut *KEPT.lock().unwrap_or_else(PoisonError::into_inner));
    kept.iter().map(|m| m.len).sum()
}

/// Bytes that finished rings kept, for later ones of the process.
pub fn kept_bytes() -> usize {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner).iter().map(|m| m.len).sum()
}

/// One pinned allocation.
pub(crate) struct PinnedMemory {
    device: CudaDevice,
    /// `len` bytes, initialised, ours alone.
    start: NonNull<u8>,
    len: usize,
    /// Our mapping, which is registered with the driver; without, the driver allocated the bytes.
    mapped: Option<HostBuffer>,
}

// SAFETY: owned memory; the driver calls on it may come from any thread.
unsafe impl Send for PinnedMemory {}
// SAFETY: no access through a shared reference here; blocks are handed out one owner at a time.
unsafe impl Sync for PinnedMemory {}

impl PinnedMemory {
    fn new(device: &CudaDevice, len: usize) -> Result<Self> {
        if let Some(memory) = Self::take_kept(device, len) {
            return Ok(memory);
        }
        let _current = device.make_current()?;
        if let Ok(buffer) = HostBuffer::new(len) {
            let (start, flags) = (buffer.as_ptr(), sys::CU_MEMHOSTREGISTER_PORTABLE);
            if let Some(node) = device.numa_node().filter(|_| several_nodes()) {
                // SAFETY: our own fresh mapping of `len` bytes.
                unsafe { prefer_node(start.as_ptr(), len, node) };
            }
            // Faults the pages in one go; registration does it page by page where this is unknown.
            buffer.populate(0, len);
            // SAFETY: as above.
            let result = unsafe { sys::cuMemHostRegister_v2(start.as_ptr().cast(), len, flags) };
            if result == sys::CUresult::CUDA_SUCCESS {
                return Ok(Self { device: device.clone(), start, len, mapped: Some(buffer) });
            }
        }
        Self::allocate(device, len)
    }

    /// Memory of the driver's own: for little of it, and where it registers none.
    pub(crate) fn allocate(device: &CudaDevice, len: usize) -> Result<Self> {
        let _current = device.make_current()?;
        let mut start: *mut c_void = std::ptr::null_mut();
        // SAFETY: a context is current; a valid out pointer.
        let result = unsafe { sys::cuMemHostAlloc(&mut start, len, sys::CU_MEMHOSTALLOC_PORTABLE) };
        match NonNull::new(start.cast::<u8>()) {
            Some(start) if result == sys::CUresult::CUDA_SUCCESS => {
                // SAFETY: `len` bytes, just allocated; written so that they count as initialised.
                unsafe { start.write_bytes(0, len) };
                Ok(Self { device: device.clone(), start, len, mapped: None })
            }
            _ => Err(Error::NoPinnedMemory { needed: len as u64, code: code(result) }),
        }
    }

    fn take_kept(device: &CudaDevice, len: usize) -> Option<Self> {
        let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        let at =
            kept.iter().position(|m| m.len == len && m.device.numa_node() == device.numa_node())?;
        Some(kept.swap_remove(at))
    }

    /// Address of the first byte.
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// Gives up the memory without freeing it: a copy engine may still use it.
    pub(crate) fn leak(self) {
        let mut memory = std::mem::ManuallyDrop::new(self);
        // SAFETY: the device reference alone is dropped, once; the rest is never touched again.
        unsafe { std::ptr::drop_in_place(&mut memory.device) };
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        let pointer = self.start.as_ptr().cast::<c_void>();
        // Without a context the driver is shutting down and nothing copies any more.
        if let Ok(_current) = self.device.make_current() {
            // SAFETY: registered or allocated when this was made, undone once.
            let _ = unsafe {
                match self.mapped {
                    Some(_) => sys::cuMemHostUnregister(pointer),
                    None => sys::cuMemFreeHost(pointer),
                }
            };
        }
    }
}

fn several_nodes() -> bool {
    static SEVERAL: OnceLock<bool> = OnceLock::new();
    *SEVERAL.get_or_init(|| {
        std::fs::read_to_string("/sys/devices/system/node/online")
            .is_ok_and(|text| text.contains([',', '-']))
    })
}

/// Asks for pages of `node` first; a refusal changes nothing but speed.
///
/// # Safety
///
/// The range is a mapping of ours.
unsafe fn prefer_node(start: *mut u8, len: usize, node: u32) {
    const MPOL_PREFERRED: libc::c_long = 1;
    let mut mask = [0u64; 16];
    let Some(word) = mask.get_mut(node as usize / 64) else {
        return;
    };
    *word |= 1 << (node % 64);
    // SAFETY: mbind(2) reads the mask and sets the policy of our mapping.
    unsafe {
        libc::syscall(
            libc::SYS_mbind,
            start,
            len,
            MPOL_PREFERRED,
            mask.as_ptr(),
            mask.len() * 64 + 1,
            0,
        )
    };
}

/// A ring of pinned blocks.
pub struct PinnedRing {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

pub(crate) struct Shared {
    options: RingOptions,
    per_segment: usize,
    /// One per segment, set by the pinning thread before it offers the segment's blocks.
    segments: Vec<OnceLock<PinnedMemory>>,
    /// Numbers of the blocks that nobody holds.
    free: FreeList,
    /// Blocks pinned so far.
    pinned: AtomicUsize,
    /// When pinning began, and when the thread that does it ended.
    began: Instant,
    ended: OnceLock<Instant>,
    cancelled: AtomicBool,
    /// Memory may still be in use by a copy engine or the kernel: never free it, never keep it.
    stuck: AtomicBool,
    /// Why not even one segment could be pinned.
    failure: OnceLock<Error>,
    /// Threads in `sleep`.
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    bell: Condvar,
}

impl PinnedRing {
    /// Starts pinning and returns at once.
    ///
    /// # Errors
    ///
    /// [`Error::BadSetting`], or [`Error::Thread`] if the pinning thread cannot start. A refusal to
    /// pin comes from the first [`try_acquire`](Self::try_acquire).
    pub fn new(device: &CudaDevice, options: RingOptions) -> Result<Self> {
        let most = 1u64 << 30;
        let setting = |what, value, least| Error::BadSetting { what, value, least, most };
        let block = options.block_bytes;
        if block == 0 || !block.is_multiple_of(BLOCK_ALIGN) || block as u64 > most {
            return Err(setting("bytes of a pinned block", block as u64, BLOCK_ALIGN as u64));
        }
        if options.blocks == 0 || options.blocks as u64 > most / BLOCK_ALIGN as u64 {
            return Err(setting("number of pinned blocks", options.blocks as u64, 1));
        }
        let per_segment = (SEGMENT / block).clamp(1, options.blocks);
        let shared = Arc::new(Shared {
            options,
            per_segment,
            segments: (0..options.blocks.div_ceil(per_segment)).map(|_| OnceLock::new()).collect(),
            free: FreeList::new(options.blocks),
            pinned: AtomicUsize::new(0),
            began: Instant::now(),
            ended: OnceLock::new(),
            cancelled: AtomicBool::new(false),
            stuck: AtomicBool::new(false),
            failure: OnceLock::new(),
            sleepers: AtomicUsize::new(0),
            lock: Mutex::new(()),
            bell: Condvar::new(),
        });
        let (worker, device) = (Arc::clone(&shared), device.clone());
        let thread = std::thread::Builder::new()
            .name("fst-pin".into())
            .spawn(move || worker.pin(&device))
            .map_err(|e| Error::Thread { reason: e.to_string() })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Bytes pinned so far.
    pub fn pinned_bytes(&self) -> usize {
        self.shared.pinned.load(Ordering::Relaxed) * self.shared.options.block_bytes
    }

    /// Waits until all of the ring is pinned, or as much as could be.
    pub fn wait_until_pinned(&self) {
        while self.shared.ended.get().is_none() {
            self.shared.sleep(|| self.shared.ended.get().is_some());
        }
    }

    /// When pinning began and ended; now, where it goes on.
    pub(crate) fn pinning(&self) -> (Instant, Instant) {
        (self.shared.began, self.shared.ended.get().copied().unwrap_or_else(Instant::now))
    }

    /// Size and fate of the ring.
    pub fn options(&self) -> RingOptions {
        self.shared.options
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// A free block, or `None` when there is none at the moment.
    ///
    /// # Errors
    ///
    /// [`Error::NoPinnedMemory`] when nothing could be pinned.
    pub fn try_acquire(&self) -> Result<Option<PinnedBlock>> {
        Shared::try_acquire(&self.shared)
    }
}

impl Drop for PinnedRing {
    fn drop(&mut self) {
        self.shared.cancelled.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // The thread does not panic, and there is nothing to do here if it did.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for PinnedRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PinnedRing")
            .field("options", &self.shared.options)
            .field("pinned_bytes", &self.pinned_bytes())
            .field("has_free", &self.shared.has_free())
            .finish_non_exhaustive()
    }
}

impl Shared {
    /// The pinning thread.
    fn pin(&self, device: &CudaDevice) {
        for (index, slot) in self.segments.iter().enumerate() {
            if self.cancelled.load(Ordering::Relaxed) {
                break;
            }
            let first = index * self.per_segment;
            let count = self.per_segment.min(self.options.blocks - first);
            match PinnedMemory::new(device, count * self.options.block_bytes) {
                Ok(memory) => {
                    let _ = slot.set(memory);
                    self.pinned.fetch_add(count, Ordering::Relaxed);
                    for block in first..first + count {
                        self.free.push(block as u32);
                    }
                    self.ring();
                }
                // With some memory pinned the load goes on with a smaller ring.
                Err(_) if index > 0 => break,
                Err(error) => {
                    let _ = self.failure.set(error);
                    break;
                }
            }
        }
        let _ = self.ended.set(Instant::now());
        self.ring();
    }

    fn address(&self, block: u32) -> Option<NonNull<u8>> {
        let block = block as usize;
        let memory = self.segments.get(block / self.per_segment)?.get()?;
        // SAFETY: the segment holds the block, which starts within it.
        Some(unsafe { memory.start.add(block % self.per_segment * self.options.block_bytes) })
    }

    pub(crate) fn try_acquire(this: &Arc<Self>) -> Result<Option<PinnedBlock>> {
        let Some(index) = this.free.pop() else {
            return this.failure.get().map_or(Ok(None), |e| Err(e.clone()));
        };
        Ok(this.address(index).map(|start| PinnedBlock { ring: Arc::clone(this), index, start }))
    }

    /// Sleeps until something may have changed, unless `ready` says that it has.
    pub(crate) fn sleep(&self, ready: impl Fn() -> bool) {
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        // Pairs with the fence in `ring`: either it sees this sleeper, or `ready` sees its change.
        fence(Ordering::SeqCst);
        {
            let guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            if !ready() {
                // The bound only guards against a change that rings no bell.
                let _ = self.bell.wait_timeout(guard, Duration::from_millis(50));
            }
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    /// Wakes sleepers after a change.
    pub(crate) fn ring(&self) {
        fence(Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
            self.bell.notify_all();
        }
    }

    pub(crate) fn has_free(&self) -> bool {
        !self.free.is_empty() || self.failure.get().is_some()
    }

    /// Marks the memory as possibly in use, by a copy engine or by the kernel, for ever.
    pub(crate) fn set_stuck(&self) {
        self.stuck.store(true, Ordering::Release);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let segments = self.segments.iter_mut().filter_map(OnceLock::take);
        if self.stuck.load(Ordering::Acquire) {
            segments.for_each(PinnedMemory::leak);
        } else if self.options.afterwards == Afterwards::Keep {
            let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
            let mut room = MOST_KEPT.saturating_sub(kept.iter().map(|m| m.len).sum());
            let mut surplus = Vec::new();
            for memory in segments {
                match room.checked_sub(memory.len) {
                    Some(less) => {
                        room = less;
                        kept.push(memory);
                    }
                    None => surplus.push(memory),
                }
            }
            // To unpin takes a while.
            drop(kept);
            drop(surplus);
        } else {
            segments.for_each(drop);
        }
    }
}

/// One block of a ring, back in the ring when dropped.
pub struct PinnedBlock {
    ring: Arc<Shared>,
    index: u32,
    /// The block's bytes: within a segment of `ring`, in nobody else's hands.
    start: NonNull<u8>,
}

// SAFETY: the block is owned; its memory is not tied to a thread.
unsafe impl Send for PinnedBlock {}
// SAFETY: shared references only read.
unsafe impl Sync for PinnedBlock {}

impl PinnedBlock {
    /// Address of the first byte, aligned to [`BLOCK_ALIGN`].
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.start
    }

    /// Bytes that fit.
    pub fn capacity(&self) -> usize {
        self.ring.options.block_bytes
    }

    /// The block's number in its ring.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// All of the block; what is not written yet holds anything.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `start` and `capacity` describe initialised memory that this value owns.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.capacity()) }
    }

    /// All of the block, to write.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`; the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.capacity()) }
    }

    /// Gives the block up for its number, to carry it through an interface that knows only
    /// numbers. [`Pipeline::block`](crate::Pipeline::block) takes it back; until then it is lost
    /// to the ring.
    pub fn into_index(self) -> u32 {
        let block = std::mem::ManuallyDrop::new(self);
        // SAFETY: the reference to the ring is dropped once; the ring stays with its owner.
        unsafe { std::ptr::drop_in_place(std::ptr::from_ref(&block.ring).cast_mut()) };
        block.index
    }

    /// # Safety
    ///
    /// `index` came from [`into_index`](Self::into_index) of a block of this ring, and nobody
    /// took it back before.
    pub(crate) unsafe fn from_index(ring: &Arc<Shared>, index: u32) -> Option<Self> {
        let start = ring.address(index)?;
        Some(Self { ring: Arc::clone(ring), index, start })
    }

    pub(crate) fn is_of(&self, ring: &Arc<Shared>) -> bool {
        Arc::ptr_eq(&self.ring, ring)
    }
}

impl Drop for PinnedBlock {
    fn drop(&mut self) {
        self.ring.free.push(self.index);
        self.ring.ring();
    }
}

impl fmt::Debug for PinnedBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PinnedBlock({}, {:?}, {} bytes)", self.index, self.start, self.capacity())
    }
}
