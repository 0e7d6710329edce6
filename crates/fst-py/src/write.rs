//! Writing files from memory of the caller's.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use fst::format::{Layout, WriteError};
use fst::{CancelToken, Dtype};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::errors;
use crate::spec::Spec;
use crate::wait::{Attention, interruptible};

/// A tensor's memory, which Python keeps for as long as this is used.
#[derive(Clone, Copy)]
struct Bytes {
    address: usize,
    len: usize,
}

impl Bytes {
    fn get(&self) -> &[u8] {
        if self.len == 0 {
            return &[];
        }
        // SAFETY: the callers of this module's functions hold the tensors until these return, and say their lengths
        // as the framework has them. That nobody writes to them meanwhile is asked of the user, as by any function
        // that reads tensors without the interpreter's lock.
        unsafe { std::slice::from_raw_parts(self.address as *const u8, self.len) }
    }
}

/// Declares tensors in the order of the official writer: by alignment of their elements, then by name.
fn layout(
    py: Python<'_>,
    tensors: Vec<Spec>,
    metadata: Option<Vec<(String, String)>>,
    align: u64,
) -> PyResult<(Layout, Vec<Bytes>)> {
    let parsed = |tensor: Spec| Ok((tensor.dtype(py)?, tensor));
    let mut tensors: Vec<(Dtype, Spec)> =
        tensors.into_iter().map(parsed).collect::<PyResult<_>>()?;
    tensors.sort_by(|(a, one), (b, other)| b.cmp(a).then_with(|| one.name.cmp(&other.name)));
    let mut layout = Layout::new();
    layout.align_data(align);
    for (key, value) in metadata.into_iter().flatten() {
        layout.metadata(key, value);
    }
    let mut bytes = Vec::with_capacity(tensors.len());
    for (dtype, Spec { name, shape, address, len, .. }) in tensors {
        let declared = layout.tensor(name, dtype, &shape).map(drop);
        declared.map_err(|error| errors::invalid(py, &error.to_string()))?;
        bytes.push(Bytes { address, len });
    }
    Ok((layout, bytes))
}

/// A file's content.
#[pyfunction]
pub(crate) fn file_bytes<'py>(
    py: Python<'py>,
    tensors: Vec<Spec>,
    metadata: Option<Vec<(String, String)>>,
    align: u64,
) -> PyResult<Bound<'py, PyBytes>> {
    let (layout, bytes) = layout(py, tensors, metadata, align)?;
    let written = py.detach(|| {
        let mut out = Vec::new();
        out.try_reserve(layout.header_bytes()?.len() + layout.data_len() as usize)
            .map_err(|error| WriteError::Io(io::Error::new(io::ErrorKind::OutOfMemory, error)))?;
        write(layout, &bytes, out)
    });
    let written = written.map_err(|error| errors::write_failed(py, &error, Path::new("bytes")))?;
    Ok(PyBytes::new(py, &written))
}

fn write<W: Write>(layout: Layout, bytes: &[Bytes], out: W) -> Result<W, WriteError> {
    let mut writer = layout.write_to(out)?;
    for one in bytes {
        writer.write_tensor(one.get())?;
    }
    writer.finish()
}

/// Writes a file, beside the one that has its name, which it then replaces: nobody sees half of it, and what was
/// mapped or opened before stays as it is.
#[pyfunction]
pub(crate) fn write_file(
    py: Python<'_>,
    path: PathBuf,
    tensors: Vec<Spec>,
    metadata: Option<Vec<(String, String)>>,
    align: u64,
) -> PyResult<()> {
    let (layout, bytes) = layout(py, tensors, metadata, align)?;
    let cancel = CancelToken::new();
    let written = interruptible(py, &cancel, Attention::to_signals(), || {
        replace(&path, |file| {
            let out = io::BufWriter::with_capacity(1 << 20, Interrupted { file, cancel: &cancel });
            write(layout, &bytes, out).map(drop)
        })
    })?;
    written.map_err(|error| errors::write_failed(py, &error, &path))
}

/// Has a file written that takes the place of the one at `path`; what is no regular file is written to as it is.
fn replace(
    path: &Path,
    fill: impl FnOnce(&File) -> Result<(), WriteError>,
) -> Result<(), WriteError> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    // Of a link, the file that it leads to.
    let target = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let found = std::fs::metadata(&target).ok();
    if found.as_ref().is_some_and(|found| !found.is_file()) {
        return fill(&OpenOptions::new().write(true).open(&target)?);
    }
    let Some(name) = target.file_name() else {
        return Err(io::Error::from(io::ErrorKind::InvalidInput).into());
    };
    let mut beside = std::ffi::OsString::from(".");
    beside.push(name);
    beside.push(format!(".{}-{}", std::process::id(), COUNT.fetch_add(1, Relaxed)));
    let beside = target.with_file_name(beside);
    let made = OpenOptions::new().write(true).create_new(true).mode(0o666).open(&beside)?;
    let filled = fill(&made).and_then(|()| {
        if let Some(found) = found {
            made.set_permissions(found.permissions())?;
        }
        Ok(std::fs::rename(&beside, &target)?)
    });
    if filled.is_err() {
        // The first failure is what is told.
        let _ = std::fs::remove_file(&beside);
    }
    filled
}

/// A file that refuses more once its token is used.
struct Interrupted<'f> {
    file: &'f File,
    cancel: &'f CancelToken,
}

/// Bytes that are written between two looks at the token.
const AT_ONCE: usize = 16 << 20;

impl Write for Interrupted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.cancel.is_cancelled() {
            return Err(io::Error::other("cancelled"));
        }
        self.file.write(&bytes[..bytes.len().min(AT_ONCE)])
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
