//! What readers need of a source that is no local file: its length, ranges of its bytes, and at the end
//! whether it is still the same.

use std::fmt;
use std::mem::MaybeUninit;
use std::path::Path;
use std::time::Duration;

use crate::error::Error;
use crate::plan::Limits;

/// How long [`Source::read`] may go on after [`Unfilled::is_cancelled`] says that nobody wants the bytes.
pub const CANCEL_WITHIN: Duration = Duration::from_millis(200);

/// Bytes that are read by range, from wherever they are: an object of a store, say.
///
/// Each call blocks the thread of the engine that makes it; several are under way at once.
#[expect(clippy::len_without_is_empty, reason = "nobody asks")]
pub trait Source: fmt::Debug + Send + Sync {
    /// What it is called in errors: a path, or a URL without credentials.
    fn path(&self) -> &Path;

    /// Length in bytes.
    fn len(&self) -> u64;

    /// Appends the bytes from `offset` on to `into` until that is full, or
    /// [cancelled](Unfilled::is_cancelled), at the latest after [`CANCEL_WITHIN`].
    ///
    /// # Errors
    ///
    /// [`Error::Read`], [`Error::Changed`] or [`Error::Cancelled`]. Readers refuse an `Ok` that leaves bytes
    /// missing.
    fn read(&self, offset: u64, into: &mut Unfilled<'_>) -> Result<(), Error>;

    /// Asks whether the source is what it was when it was opened.
    ///
    /// # Errors
    ///
    /// [`Error::Changed`], or [`Error::Open`] where that cannot be told.
    fn verify_unchanged(&self) -> Result<(), Error>;

    /// Bytes that differ where the versions of the source do, such as an ETag: ranks compare them.
    fn identity(&self) -> Vec<u8>;

    /// The shape of requests that suits this source. Those of the default are long, for a round trip is long.
    fn limits(&self) -> Limits {
        Limits { block: 8 << 20, gap: 1 << 20, ..Limits::default() }
    }
}

/// Memory that is filled from its start, and of which only the filled part counts.
pub struct Unfilled<'a> {
    memory: &'a mut [MaybeUninit<u8>],
    filled: usize,
    cancelled: &'a dyn Fn() -> bool,
}

impl fmt::Debug for Unfilled<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unfilled")
            .field("len", &self.memory.len())
            .field("filled", &self.filled)
            .finish_non_exhaustive()
    }
}

impl<'a> Unfilled<'a> {
    /// `memory`, to be filled unless `cancelled` says that it is not wanted any more.
    pub fn new(memory: &'a mut [MaybeUninit<u8>], cancelled: &'a dyn Fn() -> bool) -> Self {
        Self { memory, filled: 0, cancelled }
    }

    /// Bytes that are still missing.
    pub fn missing(&self) -> usize {
        self.memory.len() - self.filled
    }

    /// Bytes that were appended.
    pub fn filled(&self) -> usize {
        self.filled
    }

    /// Appends `bytes`. Those that find no room are left out.
    pub fn append(&mut self, bytes: &[u8]) {
        let len = bytes.len().min(self.missing());
        let room = &mut self.memory[self.filled..][..len];
        room.iter_mut().zip(bytes).for_each(|(to, from)| {
            to.write(*from);
        });
        self.filled += len;
    }

    /// Whether the read has ended meanwhile.
    pub fn is_cancelled(&self) -> bool {
        (self.cancelled)()
    }

    /// What [`is_cancelled`](Self::is_cancelled) asks, to be kept beside a borrow of this value.
    pub fn cancelled(&self) -> &'a dyn Fn() -> bool {
        self.cancelled
    }
}
