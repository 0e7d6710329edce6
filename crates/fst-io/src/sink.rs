//! The contract between readers and memory: where blocks land and who is told.
//!
//! A reader asks the sink for memory just before it issues a block, owns that memory until the
//! read has completed, and then gives it back together with the news. Host loads hand out places
//! in the final arena; device loads hand out pinned staging blocks and start a copy when they come
//! back; a sink whose staging is exhausted answers "none now" and so holds the reader back.

use std::error::Error as StdError;
use std::ptr::NonNull;

use crate::plan::Block;

/// Why a sink could not take a block: its own error, passed through the reader unchanged.
pub type SinkError = Box<dyn StdError + Send + Sync + 'static>;

/// Memory that a sink lends for one block.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// First byte. A multiple of [`crate::plan::Limits::align`].
    pub ptr: NonNull<u8>,
    /// Writable bytes from `ptr`; at least the block's length.
    pub capacity: usize,
    /// For the sink's own use, such as a slot number.
    pub token: u64,
}

// SAFETY: a target is an address on loan; the sink's contract (see `Sink`) makes the memory behind
// it exclusively the reader's until it is handed back, whichever thread does so.
unsafe impl Send for Target {}
// SAFETY: `Target` has no interior mutability: sharing a reference to it shares plain numbers.
unsafe impl Sync for Target {}

/// Takes the blocks of a plan. Called from several reader threads at once.
///
/// # Safety
///
/// The memory of every [`Target`] returned by [`reserve`](Self::reserve) must stay valid for writes
/// of `capacity` bytes, and must not be read, written or freed by anybody else, until the same
/// target comes back through [`landed`](Self::landed) or [`abandoned`](Self::abandoned). The
/// kernel may be writing to it all that time.
pub unsafe trait Sink: Send + Sync {
    /// Lends memory for `block`.
    ///
    /// With `wait` false the answer is immediate, and `Ok(None)` means that nothing is free now.
    /// With `wait` true the call blocks until memory is free; `Ok(None)` then means that the sink
    /// was closed by its consumer, and the reader stops.
    ///
    /// # Errors
    ///
    /// The sink's own error ends the read.
    fn reserve(&self, block: &Block, wait: bool) -> Result<Option<Target>, SinkError>;

    /// The bytes of `block` are in `target`: at least [`Block::need`] of them from its start.
    ///
    /// # Errors
    ///
    /// The sink's own error ends the read; the target counts as given back.
    fn landed(&self, block: &Block, target: Target) -> Result<(), SinkError>;

    /// The read of `block` failed or was cancelled; its memory holds nothing of use.
    fn abandoned(&self, block: &Block, target: Target);
}
