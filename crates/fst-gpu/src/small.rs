//! Reads of small pieces by the thread that asks for them.

use std::cell::RefCell;

use fst_io::{Error, SourceFile};

use crate::cast;
use crate::piece::{Piece, Runs};

/// Up to this many bytes of a file, one thread's own reads cost less than a load does.
pub const SMALL_PIECE: u64 = 1 << 20;

thread_local! {
    /// What is converted, and what is cut, passes through here.
    static SCRATCH: RefCell<[Vec<u8>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
}

impl Piece {
    /// Reads all of it out of its file by the calling thread, through the page cache (`pread(2)`): for pieces of
    /// up to [`SMALL_PIECE`] bytes of the file.
    ///
    /// # Errors
    ///
    /// The read's; [`Error::Sink`] where `bytes` is not as long as the piece.
    pub fn read(&self, file: &SourceFile, bytes: &mut [u8]) -> Result<(), Error> {
        let (expected, found) = (self.len(), bytes.len());
        if expected != found as u64 {
            let error = format!("a piece of {expected} bytes was given {found} bytes of memory");
            return Err(Error::Sink(error.into()));
        }
        if let Some(range) = self.unchanged() {
            return file.read_exact_at(bytes, range.start);
        }
        SCRATCH.with_borrow_mut(|[rows, span]| match self.cast {
            None => self.gather(file, bytes, span),
            Some((from, to)) => {
                rows.resize(self.source_len() as usize, 0);
                self.gather(file, rows, span)?;
                cast::cast(rows, from, bytes, to).map_err(|error| Error::Sink(error.into()))
            }
        })
    }

    /// Reads its source bytes, one run behind the other. Runs that lie close are read together, gaps and all.
    fn gather(&self, file: &SourceFile, rows: &mut [u8], all: &mut Vec<u8>) -> Result<(), Error> {
        let start = self.runs().map(|runs| runs.start).min().unwrap_or(0);
        let span = self.runs().map(Runs::end).max().unwrap_or(0) - start;
        let together = self.range().is_none() && span <= SMALL_PIECE.max(2 * self.source_len());
        if together {
            all.resize(span as usize, 0);
            file.read_exact_at(all, start)?;
        }
        let mut rest = rows;
        for range in self.runs().flat_map(Runs::ranges) {
            let (row, behind) = rest.split_at_mut((range.end - range.start) as usize);
            match together {
                true => {
                    row.copy_from_slice(&all[(range.start - start) as usize..][..row.len()]);
                }
                false => file.read_exact_at(row, range.start)?,
            }
            rest = behind;
        }
        Ok(())
    }
}
