//! Memory of tensors of the caller's.

use std::mem::MaybeUninit;

use fst::Dtype;
use pyo3::prelude::*;

use crate::{dtypes, errors};

/// A tensor of the caller's: its name, type, shape as the file has it, and its memory.
#[derive(FromPyObject)]
pub(crate) struct Spec {
    pub(crate) name: String,
    pub(crate) dtype: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) address: usize,
    pub(crate) len: usize,
}

impl Spec {
    /// The format's type of its elements.
    pub(crate) fn dtype(&self, py: Python<'_>) -> PyResult<Dtype> {
        let unknown =
            || errors::invalid(py, &format!("{:?}: unknown dtype {:?}", self.name, self.dtype));
        dtypes::parse(&self.dtype).ok_or_else(unknown)
    }
}

/// Memory for a tensor, which whoever asks for the load has for it alone.
pub(crate) struct Memory {
    /// The tensor's name in the checkpoint.
    pub(crate) name: String,
    pub(crate) address: usize,
    pub(crate) len: usize,
}

/// Refuses memory that overlaps.
pub(crate) fn check_apart(py: Python<'_>, memory: &[Memory]) -> PyResult<()> {
    let mut sorted: Vec<&Memory> = memory.iter().filter(|one| one.len > 0).collect();
    sorted.sort_by_key(|one| one.address);
    let overlapping = sorted.windows(2).find(|pair| {
        // An address space ends before `usize` does.
        pair[0].address.saturating_add(pair[0].len) > pair[1].address
    });
    match overlapping {
        None => Ok(()),
        Some(pair) => {
            let (one, other) = (&pair[0].name, &pair[1].name);
            Err(errors::invalid(py, &format!("tensors {one:?} and {other:?} share memory")))
        }
    }
}

/// # Safety
///
/// `len` bytes at `address` are the caller's for `'a`; where there are none, the address may be anything.
pub(crate) unsafe fn host_memory<'a>(address: usize, len: usize) -> &'a mut [MaybeUninit<u8>] {
    if len == 0 {
        return &mut [];
    }
    // SAFETY: passed on from the caller.
    unsafe { std::slice::from_raw_parts_mut(address as *mut MaybeUninit<u8>, len) }
}
