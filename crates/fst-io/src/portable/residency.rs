//! What the page cache holds of a file: unknown.

use std::fs::File;
use std::io;

/// Bytes of `offset..offset + len` that are in the page cache.
///
/// # Errors
///
/// Always: there is no portable call that tells.
pub fn resident_bytes(_file: &File, _offset: u64, _len: u64) -> io::Result<u64> {
    Err(io::ErrorKind::Unsupported.into())
}

/// An estimate of the bytes of a file in the page cache.
///
/// # Errors
///
/// Always.
pub fn resident_estimate(_file: &File, _len: u64) -> io::Result<u64> {
    Err(io::ErrorKind::Unsupported.into())
}
