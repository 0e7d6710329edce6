//! A file's header, in a form that exists only if it is sound.
//!
//! Rules, which are those of the official parser 0.8.0 plus the last one: tensors sorted by their
//! offsets cover the data from its first byte to the file's last without hole, overlap or rest;
//! each range is as long as shape and dtype ask for, in whole bytes; no size overflows; no name
//! appears twice.

use std::fmt;
use std::ops::Range;

use crate::json::{self, Entries, Entry};
use crate::names::NameTable;
use crate::{Dtype, HeaderError, Metadata};

/// Longest header that the format allows, in bytes.
pub const MAX_HEADER_LEN: u64 = 100_000_000;

/// Bytes before the header: its length as a little-endian `u64`.
pub(crate) const PREFIX_LEN: u64 = 8;

/// The header of one safetensors file.
///
/// Holding one means that the rules above hold, so no later step checks them again. Tensors are in
/// the order of their bytes; those without bytes come in the order of the header's text.
#[derive(Clone)]
pub struct Header {
    entries: Entries,
    table: NameTable,
    data_start: u64,
    data_len: u64,
}

impl Header {
    /// Parses the JSON of a header, `json`, of a file that has `data_len` bytes after it.
    ///
    /// # Errors
    ///
    /// The first rule that does not hold. Byte ranges in errors count from the start of the file,
    /// eight bytes before `json`.
    pub fn parse(json: &[u8], data_len: u64) -> Result<Header, HeaderError> {
        if json.len() as u64 > MAX_HEADER_LEN {
            return Err(HeaderError::TooLarge { len: json.len() as u64, max: MAX_HEADER_LEN });
        }
        let data_start = PREFIX_LEN + json.len() as u64;
        let text = str::from_utf8(json).map_err(|error| HeaderError::NotUtf8 {
            offset: PREFIX_LEN + error.valid_up_to() as u64,
        })?;
        let mut entries = json::parse(text, PREFIX_LEN)?;
        let by_offset = |entry: &Entry| (entry.begin, entry.end);
        if !entries.tensors.is_sorted_by_key(by_offset) {
            entries.tensors.sort_by_key(by_offset);
        }
        // First the names: an entry that is there twice also overlaps itself.
        let table = index_names(&entries)?;
        check_coverage(&entries, data_start, data_len)?;
        entries.names.shrink_to_fit();
        entries.dims.shrink_to_fit();
        entries.tensors.shrink_to_fit();
        Ok(Header { entries, table, data_start, data_len })
    }

    /// The tensors in the order of their bytes.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = HeaderTensor<'_>> + Clone {
        self.entries.tensors.iter().map(|entry| HeaderTensor { header: self, entry })
    }

    /// The tensor of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<HeaderTensor<'_>> {
        self.position(name).and_then(|index| self.tensor(index))
    }

    /// The tensor at this place in [`Header::tensors`].
    #[must_use]
    pub fn tensor(&self, index: usize) -> Option<HeaderTensor<'_>> {
        self.entries.tensors.get(index).map(|entry| HeaderTensor { header: self, entry })
    }

    /// The place in [`Header::tensors`] of the tensor of this name.
    pub(crate) fn position(&self, name: &str) -> Option<usize> {
        let name_of = |index: u32| self.name_at(index as usize);
        self.table.get(name, name_of).map(|index| index as usize)
    }

    /// Name of the tensor at `index`, which must be below [`Header::len`].
    pub(crate) fn name_at(&self, index: usize) -> &str {
        self.entries.name(&self.entries.tensors[index])
    }

    pub(crate) fn entry_at(&self, index: usize) -> HeaderTensor<'_> {
        HeaderTensor { header: self, entry: &self.entries.tensors[index] }
    }

    /// Number of tensors.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.tensors.len()
    }

    /// Whether the file holds no tensor.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The file's own metadata; empty where `__metadata__` is absent or null.
    #[must_use]
    pub fn metadata(&self) -> &Metadata {
        &self.entries.metadata
    }

    /// Offset in the file of the first byte of data.
    #[must_use]
    pub fn data_start(&self) -> u64 {
        self.data_start
    }

    /// Bytes of data.
    #[must_use]
    pub fn data_len(&self) -> u64 {
        self.data_len
    }
}

impl fmt::Debug for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Header")
            .field("tensors", &self.len())
            .field("data_start", &self.data_start)
            .field("data_len", &self.data_len)
            .finish_non_exhaustive()
    }
}

/// One tensor of a [`Header`].
#[derive(Clone, Copy)]
pub struct HeaderTensor<'h> {
    header: &'h Header,
    entry: &'h Entry,
}

impl<'h> HeaderTensor<'h> {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &'h str {
        self.header.entries.name(self.entry)
    }

    /// Type of its elements.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.entry.dtype
    }

    /// Its dimensions, outermost first; empty for a scalar.
    #[must_use]
    pub fn shape(&self) -> &'h [usize] {
        self.header.entries.shape(self.entry)
    }

    /// Its bytes, from the start of the data.
    #[must_use]
    pub fn data_range(&self) -> Range<u64> {
        self.entry.begin..self.entry.end
    }

    /// Its bytes, from the start of the file.
    #[must_use]
    pub fn file_range(&self) -> Range<u64> {
        let start = self.header.data_start;
        start + self.entry.begin..start + self.entry.end
    }
}

impl fmt::Debug for HeaderTensor<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeaderTensor")
            .field("name", &self.name())
            .field("dtype", &self.dtype())
            .field("shape", &self.shape())
            .field("file_range", &self.file_range())
            .finish()
    }
}

/// Checks that the sorted tensors cover `data_len` bytes exactly, each with the size it needs.
fn check_coverage(entries: &Entries, data_start: u64, data_len: u64) -> Result<(), HeaderError> {
    let name = |entry: &Entry| entries.name(entry).to_owned();
    // Offsets are anything that `u64` holds until they are known to be inside the file.
    let in_file =
        |begin: u64, end: u64| data_start.saturating_add(begin)..data_start.saturating_add(end);
    let Some(file_len) = data_start.checked_add(data_len) else {
        return Err(HeaderError::FileTooLong { data_len });
    };
    let mut covered = 0;
    for (index, entry) in entries.tensors.iter().enumerate() {
        let &Entry { begin, end, dtype, .. } = entry;
        if end < begin {
            return Err(HeaderError::NegativeRange { tensor: name(entry), begin, end });
        }
        let range = in_file(begin, end);
        if begin > covered {
            let hole = in_file(covered, begin);
            return Err(HeaderError::Hole { tensor: name(entry), range, hole });
        }
        if begin < covered {
            // `covered` is above zero only behind another tensor.
            let other = &entries.tensors[index.saturating_sub(1)];
            return Err(HeaderError::Overlap {
                tensor: name(entry),
                range,
                other: name(other),
                other_range: in_file(other.begin, other.end),
            });
        }
        covered = end;

        let shape = entries.shape(entry);
        let expected = dtype
            .byte_len(shape)
            .map_err(|source| HeaderError::Size { tensor: name(entry), source })?;
        if end - begin != expected {
            let (tensor, shape) = (name(entry), shape.to_vec());
            return Err(HeaderError::WrongSize { tensor, dtype, shape, range, expected });
        }
        if end > data_len {
            let end = entries.tensors.last().map_or(end, |last| last.end);
            let needed = data_start.saturating_add(end);
            return Err(HeaderError::Truncated { tensor: name(entry), range, file_len, needed });
        }
    }
    if covered != data_len {
        return Err(HeaderError::TrailingBytes { range: in_file(covered, data_len) });
    }
    Ok(())
}

/// Builds the table of names, in which a repeated one shows.
fn index_names(entries: &Entries) -> Result<NameTable, HeaderError> {
    let mut table = NameTable::with_capacity(entries.tensors.len());
    let name_of = |index: u32| entries.name(&entries.tensors[index as usize]);
    for index in 0..entries.tensors.len() as u32 {
        table
            .insert(index, name_of)
            .map_err(|_| HeaderError::RepeatedTensor { tensor: name_of(index).to_owned() })?;
    }
    Ok(table)
}
