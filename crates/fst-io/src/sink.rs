//! The contract between readers and memory: where blocks land and who is told.
//!
//! A reader asks the sink for memory just before it issues a block, owns that memory until the
//! read has completed, and then gives it back together with the news. Host loads hand out places
//! in the final arena; device loads hand out pinned staging blocks and start a copy when they come
//! back; a sink whose staging is exhausted answers "none now" and so holds the reader back.

use std::any::Any;
use std::error::Error as StdError;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::plan::Block;

/// How long [`Sink::reserve`] waits at most before it says that nothing is free yet.
pub const WAIT: Duration = Duration::from_millis(50);

/// Why a sink could not take a block: its own error, passed through the reader unchanged.
pub type SinkError = Box<dyn StdError + Send + Sync + 'static>;

/// The identity of a sink, by which it knows its own targets: anybody can hand it those of another.
#[derive(Debug)]
pub struct Origin(u64);

impl Origin {
    /// An identity that nobody else in this process has.
    #[expect(clippy::new_without_default, reason = "two of them are never equal")]
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Relaxed))
    }

    /// Whether `target` was made with this identity, for `block`.
    #[must_use]
    pub fn made(&self, block: &Block, target: &Target) -> bool {
        target.origin == self.0 && target.block == block.index
    }

    /// As [`made`](Self::made), with an error for "no".
    ///
    /// # Errors
    ///
    /// [`ForeignTarget`].
    pub fn check(&self, block: &Block, target: &Target) -> Result<(), ForeignTarget> {
        if self.made(block, target) { Ok(()) } else { Err(ForeignTarget { block: block.index }) }
    }
}

/// A sink was given a target that it did not make for the block.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the memory given back for block {block} is not what this sink lent for it")]
pub struct ForeignTarget {
    /// Index of the block.
    pub block: u32,
}

/// Memory that a sink lends for one block. There is one of it for each loan: it moves from the
/// sink to the reader and back.
#[derive(Debug)]
pub struct Target {
    ptr: NonNull<u8>,
    capacity: usize,
    /// The number of the [`Origin`].
    origin: u64,
    /// Index of the block.
    block: u32,
    token: u64,
    fresh: bool,
    /// Keeps the memory, where the sink shares it.
    owner: Option<Arc<dyn Any + Send + Sync>>,
}

// SAFETY: a target is memory on loan; the sink's contract (see `Sink`) makes it exclusively the
// holder's, whichever thread that is. Its owner may be sent.
unsafe impl Send for Target {}
// SAFETY: sharing a reference to it shares plain numbers: there is no interior mutability, and its
// owner is not reachable.
unsafe impl Sync for Target {}

impl Target {
    /// Lends `capacity` bytes at `ptr` for `block`. The token is for the sink's own use, such as a slot
    /// number. When the target comes back, the sink asks `origin` whether it is its own.
    ///
    /// # Safety
    ///
    /// What [`Sink`] demands of its targets: until this value is given back, the memory stays valid
    /// for writes and nobody but its holder touches it.
    pub unsafe fn new(
        origin: &Origin,
        block: &Block,
        ptr: NonNull<u8>,
        capacity: usize,
        token: u64,
    ) -> Self {
        let (origin, block) = (origin.0, block.index);
        Self { ptr, capacity, origin, block, token, fresh: false, owner: None }
    }

    /// Gives the target a share of its memory: `owner` keeps it allocated.
    pub fn owned_by(self, owner: Arc<dyn Any + Send + Sync>) -> Self {
        Self { owner: Some(owner), ..self }
    }

    /// Keeps the memory allocated for as long as the process lives. Returns the target if it has no
    /// [share](Self::owned_by) in it.
    pub fn forget(mut self) -> Option<Self> {
        match self.owner.take() {
            Some(owner) => {
                std::mem::forget(owner);
                None
            }
            None => Some(self),
        }
    }

    /// Says that no page of this memory was touched before, so that whoever writes first pays for
    /// the faults. Readers then fault it in themselves, while other reads are under way.
    pub fn fresh(self) -> Self {
        Self { fresh: true, ..self }
    }

    /// Whether this memory is untouched, as far as the sink knows.
    pub fn is_fresh(&self) -> bool {
        self.fresh
    }

    /// First byte; aligned as direct I/O on the file demands of memory.
    pub fn ptr(&self) -> NonNull<u8> {
        self.ptr
    }

    /// Writable bytes from [`ptr`](Self::ptr); at least the block's length.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The sink's own number.
    pub fn token(&self) -> u64 {
        self.token
    }
}

/// Takes the blocks of a plan. Called from several reader threads at once.
///
/// # Safety
///
/// The memory of every [`Target`] returned by [`reserve`](Self::reserve) must hold the block's whole
/// length, stay valid for writes, and must not be read, written or freed by
/// anybody else until the same target comes back through [`landed`](Self::landed) or
/// [`abandoned`](Self::abandoned), or is dropped. The kernel may be writing to it all that time.
///
/// Everybody can call these functions: a target that comes back is used only if the sink made it
/// itself for that very block ([`Origin`]). Others are refused.
///
/// What [`reused`](Self::reused) returns stays mapped, with the same pages, as long as the sink lives or
/// after a target of it was [forgotten](Target::forget).
///
/// Memory that is aligned as the plan's blocks are suits direct reads; memory that is not makes them
/// fail (EINVAL), and the file is then read through the page cache.
///
/// Readers in turn give a target back only when no write to it is outstanding any more.
pub unsafe trait Sink: Send + Sync {
    /// Lends memory for `block`.
    ///
    /// With `wait` false the answer is immediate, and `Ok(None)` means that nothing is free now.
    /// With `wait` true the call waits for some, but only for a short while ([`WAIT`]); `Ok(None)`
    /// then means that nothing is free yet. The reader asks again, unless the read has ended
    /// meanwhile: by an error or a panic on another thread, or because its owner cancelled it. A
    /// sink therefore need not know of any of these.
    ///
    /// # Errors
    ///
    /// The sink's own error ends the read. [`Error::Cancelled`](crate::Error::Cancelled) says that
    /// the consumer wants no more.
    fn reserve(&self, block: &Block, wait: bool) -> Result<Option<Target>, SinkError>;

    /// Whether a block that is [preferred](crate::Control::prefer) can have memory before its turn. A sink
    /// whose memory comes in the order of the blocks sets some aside for it now if it can, and says
    /// no if it cannot: the block is then asked for again. Yes unless implemented.
    ///
    /// After a yes, [`reserve`](Self::reserve) lacks only what comes back without any other block being
    /// read. Blocks that have memory, or had it, may be asked for, too.
    ///
    /// # Errors
    ///
    /// As for [`reserve`](Self::reserve).
    fn prefer(&self, block: &Block) -> Result<bool, SinkError> {
        let _ = block;
        Ok(true)
    }

    /// Memory that targets come out of again and again, all in one range that stays allocated as long
    /// as the sink. Readers may have the kernel keep hold of its pages (`IORING_REGISTER_BUFFERS`)
    /// instead of looking them up for each read. None unless implemented: it takes time that only
    /// memory which is lent often repays.
    fn reused(&self) -> Option<(NonNull<u8>, usize)> {
        None
    }

    /// The bytes of `block` are in `target`: at least [`Block::need`] of them from its start, but for those
    /// before its first extent where the file is not a local one.
    ///
    /// # Errors
    ///
    /// The sink's own error ends the read; the target counts as given back.
    fn landed(&self, block: &Block, target: Target) -> Result<(), SinkError>;

    /// The read of `block` failed or was cancelled; its memory holds nothing of use.
    fn abandoned(&self, block: &Block, target: Target);

    /// The read has ended early. Wakes those who wait in [`reserve`](Self::reserve), so that they
    /// need not sit out the rest of their while. Readers call this by themselves, at the first
    /// error, and when a sink or one of its callbacks panics. Does nothing unless implemented.
    fn end(&self) {}

    /// The kernel does not tell any more whether it is done with the memory of `target`, and may
    /// write to it at any time from here on. It is never freed, nor lent again: unless implemented,
    /// the target [forgets](Target::forget) its share of it. A target without a share comes back; the
    /// reader then waits, for ever if need be, until the kernel is done.
    ///
    /// Happens when `io_uring_enter(2)` fails in mid-read, as under a system call filter that is
    /// put in place meanwhile.
    fn lost(&self, block: &Block, target: Target) -> Option<Target> {
        let _ = block;
        target.forget()
    }
}
