//! Writing files: tensors are declared, then their bytes are streamed in the same order.
//!
//! Tensors keep the order of their declaration (the official writer sorts by dtype and name), so
//! that a file can have the layout of one that exists. Between tensors there is no room for
//! padding: where every element is to be aligned, declare wide dtypes first.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::header::{MAX_HEADER_LEN, PREFIX_LEN};
use crate::names::NameTable;
use crate::{Dtype, SizeError};

/// Default alignment of the data in a file, in bytes: a page, which every direct-I/O block size in
/// use divides.
pub const DEFAULT_DATA_ALIGNMENT: u64 = 4096;

/// What a file will hold: the declarations before its bytes.
///
/// ```
/// use fst_format::{Dtype, Layout};
///
/// let mut layout = Layout::new();
/// layout.metadata("format", "pt");
/// layout.tensor("weight", Dtype::F32, &[2, 2])?;
/// layout.tensor("bias", Dtype::F32, &[2])?;
/// let mut writer = layout.write_to(Vec::new())?;
/// writer.write_tensor(&[0; 16])?;
/// writer.write_tensor(&[0; 8])?;
/// let file = writer.finish()?;
/// assert_eq!(file.len(), 4096 + 24);
/// # Ok::<(), fst_format::WriteError>(())
/// ```
#[derive(Clone)]
pub struct Layout {
    tensors: Vec<Declared>,
    names: NameTable,
    metadata: BTreeMap<String, String>,
    data_alignment: u64,
    data_len: u64,
}

#[derive(Clone, Debug)]
struct Declared {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    begin: u64,
    end: u64,
}

/// Why a file could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// Two tensors have one name.
    #[error("tensor {tensor:?} is declared twice")]
    RepeatedTensor {
        /// The name.
        tensor: String,
    },
    /// The name is taken by the format.
    #[error("no tensor can be named {tensor:?}")]
    ReservedName {
        /// The name.
        tensor: String,
    },
    /// Shape and dtype ask for no size that there is, or one that passes `u64` with those before.
    #[error("tensor {tensor:?}: {source}")]
    Size {
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        source: SizeError,
    },
    /// The header would be longer than readers accept.
    #[error("header of {len} bytes is longer than the format's limit of {max} bytes")]
    HeaderTooLarge {
        /// Length of the header with its padding, in bytes.
        len: u64,
        /// The limit.
        max: u64,
    },
    /// A whole tensor was written with the wrong number of bytes.
    #[error("tensor {tensor:?}: {found} bytes written, {expected} declared")]
    WrongLength {
        /// The tensor.
        tensor: String,
        /// Its declared length in bytes.
        expected: u64,
        /// The bytes given.
        found: u64,
    },
    /// A whole tensor was written where a part of it had been written before.
    #[error("tensor {tensor:?}: {written} bytes of it are written already")]
    Begun {
        /// The tensor.
        tensor: String,
        /// Its bytes that are written.
        written: u64,
    },
    /// The file was finished before its last tensor.
    #[error(
        "tensor {tensor:?} is unfinished: {written} bytes of data written, {declared} declared"
    )]
    Unfinished {
        /// The first tensor that lacks bytes.
        tensor: String,
        /// Bytes of data written.
        written: u64,
        /// Bytes of data declared.
        declared: u64,
    },
    /// More was written than declared.
    #[error("bytes after the last tensor: only {declared} bytes of data declared")]
    Excess {
        /// Bytes of data declared.
        declared: u64,
    },
    /// The index could not be written.
    #[error("{}: cannot write: {source}", path.display())]
    Index {
        /// The index.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The output failed.
    #[error("cannot write: {0}")]
    Io(#[from] io::Error),
}

impl Default for Layout {
    fn default() -> Self {
        Self::new()
    }
}

impl Layout {
    /// No tensors, no metadata, data aligned to [`DEFAULT_DATA_ALIGNMENT`].
    #[must_use]
    pub fn new() -> Self {
        Self {
            tensors: Vec::new(),
            names: NameTable::default(),
            metadata: BTreeMap::new(),
            data_alignment: DEFAULT_DATA_ALIGNMENT,
            data_len: 0,
        }
    }

    /// Adds an entry to the file's metadata, or replaces it.
    pub fn metadata(&mut self, key: impl Into<String>, value: impl Into<String>) -> &mut Self {
        self.metadata.insert(key.into(), value.into());
        self
    }

    /// Pads the header so that the data starts at a multiple of `bytes`; 0 is read as 1. The
    /// official writer uses 8.
    pub fn align_data(&mut self, bytes: u64) -> &mut Self {
        self.data_alignment = bytes.max(1);
        self
    }

    /// Declares the next tensor.
    ///
    /// # Errors
    ///
    /// A name that is taken or reserved, and sizes that overflow or do not fill whole bytes. The
    /// layout is as before then.
    pub fn tensor(
        &mut self,
        name: impl Into<String>,
        dtype: Dtype,
        shape: &[usize],
    ) -> Result<&mut Self, WriteError> {
        let (name, shape) = (name.into(), shape.to_vec());
        if name == "__metadata__" {
            return Err(WriteError::ReservedName { tensor: name });
        }
        let begin = self.data_len;
        let end = dtype.byte_len(&shape).and_then(|len| {
            begin
                .checked_add(len)
                .ok_or_else(|| SizeError::Overflow { dtype, shape: shape.clone() })
        });
        let end = match end {
            Ok(end) => end,
            Err(source) => return Err(WriteError::Size { tensor: name, source }),
        };
        self.tensors.push(Declared { name, dtype, shape, begin, end });
        let position = self.tensors.len() as u32 - 1;
        let tensors = &self.tensors;
        let taken = self.names.insert(position, |i| &tensors[i as usize].name).is_err();
        if taken && let Some(Declared { name, .. }) = self.tensors.pop() {
            return Err(WriteError::RepeatedTensor { tensor: name });
        }
        self.data_len = end;
        Ok(self)
    }

    /// Bytes of all tensors declared so far.
    #[must_use]
    pub fn data_len(&self) -> u64 {
        self.data_len
    }

    /// Everything before the data: the header's length, its JSON and the padding.
    ///
    /// # Errors
    ///
    /// [`WriteError::HeaderTooLarge`].
    pub fn header_bytes(&self) -> Result<Vec<u8>, WriteError> {
        let mut bytes = vec![0; PREFIX_LEN as usize];
        let mut separator = b'{';
        if !self.metadata.is_empty() {
            bytes.extend_from_slice(b"{\"__metadata__\":");
            to_json(&mut bytes, &self.metadata)?;
            separator = b',';
        }
        for Declared { name, dtype, shape, begin, end } in &self.tensors {
            bytes.push(separator);
            separator = b',';
            to_json(&mut bytes, name)?;
            write!(bytes, ":{{\"dtype\":\"{dtype}\",\"shape\":")?;
            to_json(&mut bytes, shape)?;
            write!(bytes, ",\"data_offsets\":[{begin},{end}]}}")?;
        }
        bytes.extend_from_slice(if separator == b'{' { b"{}" } else { b"}" });

        let max = MAX_HEADER_LEN;
        let len = (bytes.len() as u64)
            .checked_next_multiple_of(self.data_alignment)
            .map_or(u64::MAX, |end| end - PREFIX_LEN);
        if len > max {
            return Err(WriteError::HeaderTooLarge { len, max });
        }
        bytes.resize((PREFIX_LEN + len) as usize, b' ');
        bytes[..PREFIX_LEN as usize].copy_from_slice(&len.to_le_bytes());
        Ok(bytes)
    }

    /// Writes the header to `out`, and returns what takes the tensors' bytes.
    ///
    /// # Errors
    ///
    /// [`WriteError::HeaderTooLarge`] and failures of `out`.
    pub fn write_to<W: Write>(self, mut out: W) -> Result<Writer<W>, WriteError> {
        out.write_all(&self.header_bytes()?)?;
        Ok(Writer { out, tensors: self.tensors, data_len: self.data_len, written: 0, current: 0 })
    }
}

impl std::fmt::Debug for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Layout")
            .field("tensors", &self.tensors.len())
            .field("data_len", &self.data_len)
            .field("data_alignment", &self.data_alignment)
            .finish_non_exhaustive()
    }
}

fn to_json(bytes: &mut Vec<u8>, value: &impl Serialize) -> Result<(), WriteError> {
    serde_json::to_writer(bytes, value).map_err(|error| WriteError::Io(error.into()))
}

/// Takes the bytes of a [`Layout`]'s tensors, one after another.
///
/// Bytes come in pieces of any size through [`Write`], or a tensor at a time. [`Writer::finish`]
/// tells whether all came; a writer that is only dropped leaves a file that readers refuse.
/// Writes go to the output as they are: wrap a file in [`io::BufWriter`] where pieces are small.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
    tensors: Vec<Declared>,
    data_len: u64,
    written: u64,
    /// No tensor before this one lacks bytes.
    current: usize,
}

impl<W: Write> Writer<W> {
    /// Writes the bytes of the next tensor, all of them.
    ///
    /// # Errors
    ///
    /// [`WriteError::WrongLength`] where the length is not the declared one;
    /// [`WriteError::Begun`] where part of the tensor is written; [`WriteError::Excess`] behind the last tensor; failures of the
    /// output.
    pub fn write_tensor(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        let Some(tensor) = self.tensors.get(self.current) else {
            return Err(WriteError::Excess { declared: self.data_len });
        };
        let name = || tensor.name.clone();
        let (expected, written) = (tensor.end - tensor.begin, self.written - tensor.begin);
        if written > 0 {
            return Err(WriteError::Begun { tensor: name(), written });
        }
        let found = bytes.len() as u64;
        if found != expected {
            return Err(WriteError::WrongLength { tensor: name(), expected, found });
        }
        self.out.write_all(bytes)?;
        self.written += expected;
        self.current += 1;
        Ok(())
    }

    /// Bytes of data written so far.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Ends the file: flushes and returns the output.
    ///
    /// # Errors
    ///
    /// [`WriteError::Unfinished`] where bytes are missing, and failures of the output.
    pub fn finish(mut self) -> Result<W, WriteError> {
        if self.written < self.data_len {
            let unfinished = self.tensors.iter().find(|tensor| tensor.end > self.written);
            let tensor = unfinished.map_or_else(String::new, |tensor| tensor.name.clone());
            let (written, declared) = (self.written, self.data_len);
            return Err(WriteError::Unfinished { tensor, written, declared });
        }
        self.out.flush()?;
        Ok(self.out)
    }
}

impl<W: Write> Write for Writer<W> {
    /// Writes bytes of the current tensor and those after it; an error where more come than
    /// declared.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() as u64 > self.data_len - self.written {
            let error = WriteError::Excess { declared: self.data_len };
            return Err(io::Error::new(io::ErrorKind::InvalidInput, error));
        }
        let n = self.out.write(bytes)?;
        self.written += n as u64;
        // An empty tensor at the very place reached is still to come, for `write_tensor`.
        let is_past =
            |t: &Declared| t.end < self.written || (t.begin < t.end && t.end == self.written);
        while self.tensors.get(self.current).is_some_and(is_past) {
            self.current += 1;
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// The usual name of a shard's file: that of shard 0 of 3 is `model-00001-of-00003.safetensors`.
#[must_use]
pub fn shard_file_name(shard: usize, of: usize) -> String {
    format!("model-{:05}-of-{of:05}.safetensors", shard + 1)
}

/// Writes `model.safetensors.index.json` into `folder` and returns its path.
///
/// `weight_map` has each tensor's name and its file's, in any order; `total_size` is the bytes of
/// all tensors. The text is laid out as transformers does it.
///
/// # Errors
///
/// [`WriteError::RepeatedTensor`], and [`WriteError::Index`] where the file cannot be written.
pub fn write_index<T, F>(
    folder: impl AsRef<Path>,
    weight_map: impl IntoIterator<Item = (T, F)>,
    total_size: u64,
) -> Result<PathBuf, WriteError>
where
    T: Into<String>,
    F: Into<String>,
{
    #[derive(Serialize)]
    struct Metadata {
        total_size: u64,
    }
    #[derive(Serialize)]
    struct Index {
        metadata: Metadata,
        weight_map: BTreeMap<String, String>,
    }

    let mut sorted = BTreeMap::new();
    for (tensor, file) in weight_map {
        let tensor = tensor.into();
        if sorted.contains_key(&tensor) {
            return Err(WriteError::RepeatedTensor { tensor });
        }
        sorted.insert(tensor, file.into());
    }
    let index = Index { metadata: Metadata { total_size }, weight_map: sorted };
    let path = folder.as_ref().join("model.safetensors.index.json");
    let written =
        serde_json::to_vec_pretty(&index).map_err(io::Error::from).and_then(|mut text| {
            text.push(b'\n');
            fs::write(&path, text)
        });
    match written {
        Ok(()) => Ok(path),
        Err(source) => Err(WriteError::Index { path, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two() -> Layout {
        let mut layout = Layout::new();
        layout.tensor("a", Dtype::U8, &[3]).unwrap();
        layout.tensor("empty", Dtype::F32, &[0]).unwrap();
        layout.tensor("b", Dtype::U16, &[2]).unwrap();
        layout
    }

    #[test]
    fn data_starts_at_the_alignment() {
        for alignment in [0, 1, 8, 512, 4096, 1 << 20] {
            let mut layout = two();
            layout.align_data(alignment);
            let bytes = layout.header_bytes().unwrap();
            assert_eq!(bytes.len() as u64 % alignment.max(1), 0);
            let header = crate::Header::parse(&bytes[8..], layout.data_len()).unwrap();
            assert_eq!(header.data_start(), bytes.len() as u64);
            assert_eq!(header.get("b").unwrap().data_range(), 3..7);
        }
        let mut layout = two();
        for alignment in [100_000_009, u64::MAX] {
            layout.align_data(alignment);
            assert!(matches!(layout.header_bytes(), Err(WriteError::HeaderTooLarge { .. })));
        }
        layout.align_data(100_000_008);
        assert!(layout.header_bytes().is_ok());
    }

    #[test]
    fn bytes_must_be_those_declared() {
        let mut writer = two().write_to(Vec::new()).unwrap();
        assert!(matches!(
            writer.write_tensor(&[0; 4]),
            Err(WriteError::WrongLength { expected: 3, found: 4, .. })
        ));
        writer.write_all(&[1]).unwrap();
        assert!(matches!(writer.write_tensor(&[0; 2]), Err(WriteError::Begun { .. })));
        writer.write_all(&[2, 3]).unwrap();
        assert_eq!(writer.written(), 3);
        // The empty tensor is a tensor too.
        assert!(matches!(
            writer.write_tensor(&[4, 5, 6, 7]),
            Err(WriteError::WrongLength { expected: 0, found: 4, .. })
        ));
        writer.write_tensor(&[]).unwrap();
        writer.write_tensor(&[4, 5, 6, 7]).unwrap();
        assert!(matches!(writer.write_tensor(&[]), Err(WriteError::Excess { declared: 7 })));
        let error = writer.write_all(&[0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        let file = writer.finish().unwrap();
        assert_eq!(file[4096..], [1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn pieces_may_pass_tensors() {
        let mut writer = two().write_to(Vec::new()).unwrap();
        writer.write_all(&[1, 2, 3, 4]).unwrap();
        assert!(matches!(
            writer.write_tensor(&[4, 5, 6, 7]),
            Err(WriteError::Begun { written: 1, .. })
        ));
        writer.write_all(&[5, 6, 7]).unwrap();
        assert_eq!(writer.finish().unwrap()[4096..], [1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn unfinished_files_name_the_tensor() {
        let mut writer = two().write_to(Vec::new()).unwrap();
        writer.write_all(&[0; 5]).unwrap();
        match writer.finish() {
            Err(WriteError::Unfinished { tensor, written: 5, declared: 7 }) => {
                assert_eq!(tensor, "b");
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn bad_declarations_change_nothing() {
        let mut layout = two();
        let huge = usize::MAX;
        assert!(matches!(
            layout.tensor("a", Dtype::U8, &[1]),
            Err(WriteError::RepeatedTensor { .. })
        ));
        assert!(matches!(
            layout.tensor("__metadata__", Dtype::U8, &[1]),
            Err(WriteError::ReservedName { .. })
        ));
        assert!(matches!(
            layout.tensor("c", Dtype::U8, &[huge, 2]),
            Err(WriteError::Size { source: SizeError::Overflow { .. }, .. })
        ));
        assert!(matches!(
            layout.tensor("c", Dtype::F4, &[3]),
            Err(WriteError::Size { source: SizeError::PartialByte { bits: 12, .. }, .. })
        ));
        assert_eq!(layout.data_len(), 7);
        layout.tensor("c", Dtype::U8, &[1]).unwrap();
        let bytes = layout.header_bytes().unwrap();
        assert_eq!(crate::Header::parse(&bytes[8..], 8).unwrap().len(), 4);
    }
}
