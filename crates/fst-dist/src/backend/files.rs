//! The files that a rank reads from, and what a batch of reads asks of them.

use std::sync::Mutex;

use fst_io::watch::Watch;
use fst_io::{ReadOptions, ReadStats, SourceFile};

use super::{Cause, ReadAt};

/// Files that a rank reads from, and how.
#[derive(Debug)]
pub struct RankFiles<'a> {
    /// Those that are open.
    pub files: &'a [SourceFile],
    /// For each file of the plan, which of `files` it is.
    pub number: &'a [Option<u32>],
    /// How they are read.
    pub options: ReadOptions,
    /// Follows the reads, and may end them.
    pub watch: &'a Watch,
}

/// A part of a file and the address of its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) file: u32,
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) addr: u64,
    /// The range asked for that it is.
    pub(super) range: usize,
}

/// Reads out of [`RankFiles`], one batch after the other.
#[derive(Debug)]
pub(super) struct Reads<'a> {
    pub(super) of: RankFiles<'a>,
    /// Unwanted bytes that are read over.
    pub(super) gap: u64,
    stats: Mutex<Vec<ReadStats>>,
}

impl<'a> Reads<'a> {
    pub(super) fn new(of: RankFiles<'a>, gap: u64) -> Self {
        Self { of, gap, stats: Mutex::default() }
    }

    /// What the reads did.
    pub(super) fn into_stats(self) -> Vec<ReadStats> {
        self.stats.into_inner().unwrap_or_else(|e| e.into_inner())
    }

    /// The alignment of direct reads.
    pub(super) fn align(&self) -> u64 {
        SourceFile::align_of(self.of.files)
    }

    /// The ranges as parts of files, sorted.
    pub(super) fn parts(&self, ranges: &[ReadAt]) -> Result<Vec<Part>, (usize, Cause)> {
        let mut parts = Vec::with_capacity(ranges.len());
        for (range, &ReadAt { shard, offset, len, addr, .. }) in ranges.iter().enumerate() {
            let Some(file) = self.of.number.get(shard as usize).copied().flatten() else {
                return Err((range, format!("file {shard} is not open").into()));
            };
            if len > 0 {
                parts.push(Part { file, start: offset, end: offset + len, addr, range });
            }
        }
        parts.sort_unstable_by_key(|part| (part.file, part.start));
        Ok(parts)
    }

    /// Takes note of what reads of `parts` did; an error names the first range that it hit.
    pub(super) fn done(
        &self,
        parts: &[Part],
        reads: Result<Vec<ReadStats>, fst_io::Error>,
    ) -> Result<(), (usize, Cause)> {
        let reads = reads.map_err(|error| (self.blame(&error, parts), error.into()))?;
        self.stats.lock().unwrap_or_else(|e| e.into_inner()).extend(reads);
        Ok(())
    }

    /// Which range an error of reading parts is about: that of the first that it touches.
    fn blame(&self, error: &fst_io::Error, parts: &[Part]) -> usize {
        let hit = match error {
            fst_io::Error::Read { path, offset, len, .. } => {
                Some((path, *offset, offset + len.max(&1)))
            }
            fst_io::Error::EarlyEnd { path, end, .. } => Some((path, *end, u64::MAX)),
            _ => None,
        };
        let touches = |part: &&Part| {
            hit.is_some_and(|(path, start, end)| {
                let file = self.of.files.get(part.file as usize);
                let same = file.is_some_and(|file| file.path() == path);
                same && part.start < end && start < part.end
            })
        };
        parts.iter().find(touches).or(parts.first()).map_or(0, |part| part.range)
    }
}
