//! Byte ranges of files: the words in which readers are told what is wanted.

use std::ops::Range;

/// A byte range of one file of a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent {
    /// Index of the file in the list of sources handed to the reader.
    pub file: u32,
    /// First byte, from the start of the file.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

impl Extent {
    /// The extent that covers `range` of file number `file`.
    pub fn new(file: u32, range: Range<u64>) -> Self {
        Self { file, offset: range.start, len: range.end.saturating_sub(range.start) }
    }

    /// One past the last byte, from the start of the file.
    pub fn end(&self) -> u64 {
        self.offset + self.len
    }

    /// The extent as a range of its file.
    pub fn range(&self) -> Range<u64> {
        self.offset..self.end()
    }
}
