//! Headers of files whose bytes are in memory.

use fst::format::{Decoded, HeaderDecoder};
use pyo3::prelude::*;

use crate::errors;

/// A tensor's name, type, shape, and the first byte and the end of its bytes.
type Entry = (String, &'static str, Vec<usize>, u64, u64);

/// Keys and values.
type Metadata = Vec<(String, String)>;

/// The tensors of a file, by place in it, and its metadata.
#[pyfunction]
pub(crate) fn parse(py: Python<'_>, data: &[u8]) -> PyResult<(Vec<Entry>, Metadata)> {
    let header = HeaderDecoder::new(data.len() as u64).and_then(|decoder| decoder.decode(data));
    let header = match header {
        Ok(Decoded::Header(header)) => header,
        Ok(Decoded::Need(_)) => return Err(errors::invalid(py, "the header is incomplete")),
        Err(error) => return Err(errors::invalid(py, &error.to_string())),
    };
    let entries = header.tensors().map(|tensor| {
        let range = tensor.file_range();
        let (name, shape) = (tensor.name().to_owned(), tensor.shape().to_vec());
        (name, tensor.dtype().as_str(), shape, range.start, range.end)
    });
    let metadata = header.metadata().iter().map(|(key, value)| (key.to_owned(), value.to_owned()));
    Ok((entries.collect(), metadata.collect()))
}
