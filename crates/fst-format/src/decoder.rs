//! A decoder that asks for bytes and never reads any: the caller owns the I/O.

use std::ops::Range;

use crate::header::{MAX_HEADER_LEN, PREFIX_LEN};
use crate::{Header, HeaderError};

/// Decodes the header of a file of known length from its first bytes.
///
/// ```
/// use fst_format::{Decoded, HeaderDecoder};
///
/// let file = b"\x02\0\0\0\0\0\0\0{}";
/// let decoder = HeaderDecoder::new(file.len() as u64)?;
/// let mut have = 0;
/// let header = loop {
///     match decoder.decode(&file[..have])? {
///         Decoded::Need(range) => have = range.end as usize, // read these bytes too
///         Decoded::Header(header) => break header,
///     }
/// };
/// assert!(header.is_empty());
/// # Ok::<(), fst_format::HeaderError>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct HeaderDecoder {
    file_len: u64,
}

/// What a decoder has to say to the bytes it was given.
#[derive(Clone, Debug)]
pub enum Decoded {
    /// The header goes on: these bytes of the file are still missing. They follow directly on
    /// those given. At most two such answers come before the header.
    Need(Range<u64>),
    /// The header, complete and sound.
    Header(Header),
}

impl HeaderDecoder {
    /// A decoder for a file of `file_len` bytes.
    ///
    /// # Errors
    ///
    /// [`HeaderError::TooShort`] where no header fits.
    pub fn new(file_len: u64) -> Result<Self, HeaderError> {
        if file_len < PREFIX_LEN {
            return Err(HeaderError::TooShort { file_len });
        }
        Ok(Self { file_len })
    }

    /// Decodes `prefix`, the file's bytes from its first on, as many as the caller has. Bytes
    /// behind the header do no harm.
    ///
    /// Nothing is copied and nothing kept: the decoder asks for more, the caller appends, and asks
    /// again. A header that lies about its length is refused before anything of that size has to
    /// be read or allocated.
    ///
    /// # Errors
    ///
    /// Any [`HeaderError`]; never for want of bytes.
    pub fn decode(&self, prefix: &[u8]) -> Result<Decoded, HeaderError> {
        let have = prefix.len() as u64;
        let Some((len_bytes, rest)) = prefix.split_first_chunk::<8>() else {
            return Ok(Decoded::Need(have..PREFIX_LEN));
        };
        let len = u64::from_le_bytes(*len_bytes);
        if len > MAX_HEADER_LEN {
            return Err(HeaderError::TooLarge { len, max: MAX_HEADER_LEN });
        }
        let end = PREFIX_LEN + len;
        let Some(data_len) = self.file_len.checked_sub(end) else {
            return Err(HeaderError::PastEnd { range: PREFIX_LEN..end, file_len: self.file_len });
        };
        match rest.get(..len as usize) {
            Some(json) => Header::parse(json, data_len).map(Decoded::Header),
            None => Ok(Decoded::Need(have..end)),
        }
    }
}
