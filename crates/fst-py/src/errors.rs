//! Rust's errors as Python's: a class of `fst._errors`, which is also the built-in one that fits.

use std::io;
use std::path::Path;

use fst::{DeviceError, DistError, Error, ManifestError, SelectError, format, io as engines};
use pyo3::prelude::*;
use pyo3::types::PyAnyMethods;

/// The built-in class that an error is also an instance of.
enum Kind<'e> {
    /// Of the system, with its error, and the path.
    System(Option<&'e io::Error>, Option<&'e Path>),
    Missing(&'e Path),
    Key,
    Index,
    Memory,
    Type,
    Value,
    Runtime,
}

fn kind(error: &Error) -> Kind<'_> {
    match error {
        Error::Format(error) => kind_of_format(error),
        Error::Io { source, .. } => kind_of_io(source),
        Error::UnknownTensor { .. } => Kind::Key,
        Error::Select(SelectError::Slice(_)) => Kind::Index,
        Error::Memory { .. } => Kind::Memory,
        Error::Select(SelectError::Cast { .. }) | Error::WrongDtype { .. } => Kind::Type,
        Error::Device(DeviceError::Unknown { .. } | DeviceError::NoCounterpart { .. }) => {
            Kind::Value
        }
        Error::Device(DeviceError::TooLarge { .. }) => Kind::Memory,
        Error::Manifest { source: ManifestError::Read(source), path } => {
            Kind::System(Some(source), Some(path))
        }
        Error::Dist(DistError::Plan(_) | DistError::LoadOnly { .. }) => Kind::Value,
        Error::Failed(error) => kind(error),
        Error::Device(_)
        | Error::Dist(_)
        | Error::Panicked { .. }
        | Error::Stalled { .. }
        | Error::Cancelled => Kind::Runtime,
        _ => Kind::Value,
    }
}

fn kind_of_format(error: &format::Error) -> Kind<'_> {
    use format::Error as E;
    match error {
        E::Open { path, source } | E::Read { path, source, .. } => {
            Kind::System(Some(source), Some(path))
        }
        E::TooManyFiles { path } => Kind::System(None, Some(path)),
        E::DanglingLink { path, .. } | E::NoCheckpoint { folder: path, .. } => Kind::Missing(path),
        E::MissingShard { shard, .. } => Kind::Missing(shard),
        _ => Kind::Value,
    }
}

fn kind_of_io(error: &engines::Error) -> Kind<'_> {
    use engines::Error as E;
    match error {
        E::Open { path, source } | E::Map { path, source } | E::Read { path, source, .. } => {
            Kind::System(Some(source), Some(path))
        }
        E::TooManyFiles { path, .. } => Kind::System(None, Some(path)),
        _ => Kind::System(None, None),
    }
}

/// The exception for an error; `shown` is the path that stands for the descriptor that was read from.
pub(crate) fn raised_at(py: Python<'_>, error: &Error, shown: Option<(&str, &str)>) -> PyErr {
    let mut message = error.to_string();
    if let Some((read, shown)) = shown {
        message = message.replace(read, shown);
    }
    let path = |path: &Path| match shown {
        Some((read, shown)) if path == Path::new(read) => shown.to_owned(),
        _ => path.to_string_lossy().into_owned(),
    };
    let (class, errno, path) = match kind(error) {
        Kind::System(source, at) => {
            let class = match source.map(io::Error::kind) {
                Some(io::ErrorKind::NotFound) => "FstFileNotFoundError",
                Some(io::ErrorKind::PermissionDenied) => "FstPermissionError",
                Some(io::ErrorKind::IsADirectory) => "FstIsADirectoryError",
                _ => "FstOSError",
            };
            (class, source.and_then(io::Error::raw_os_error), at.map(path))
        }
        Kind::Missing(at) => ("FstFileNotFoundError", Some(libc::ENOENT), Some(path(at))),
        Kind::Key => ("FstKeyError", None, None),
        Kind::Index => ("FstIndexError", None, None),
        Kind::Memory => ("FstMemoryError", None, None),
        Kind::Type => ("FstTypeError", None, None),
        Kind::Value => ("FstValueError", None, None),
        Kind::Runtime => ("FstRuntimeError", None, None),
    };
    make(py, class, &message, errno, path)
}

/// As [`raised_at`], of an error of a path that was opened as it is.
pub(crate) fn raised(py: Python<'_>, error: &Error) -> PyErr {
    raised_at(py, error, None)
}

/// The exception for a failure of writing.
pub(crate) fn write_failed(py: Python<'_>, error: &format::WriteError, path: &Path) -> PyErr {
    let shown = path.to_string_lossy();
    let message = format!("{shown}: {error}");
    match error {
        format::WriteError::Io(source) | format::WriteError::Index { source, .. } => {
            let class = match source.kind() {
                io::ErrorKind::NotFound => "FstFileNotFoundError",
                io::ErrorKind::PermissionDenied => "FstPermissionError",
                io::ErrorKind::IsADirectory => "FstIsADirectoryError",
                _ => "FstOSError",
            };
            make(py, class, &message, source.raw_os_error(), Some(shown.into_owned()))
        }
        _ => make(py, "FstValueError", &message, None, None),
    }
}

/// A mistake in an argument.
pub(crate) fn invalid(py: Python<'_>, message: &str) -> PyErr {
    make(py, "FstValueError", message, None, None)
}

/// Something that went wrong and is neither the caller's nor the system's.
pub(crate) fn failed(py: Python<'_>, message: &str) -> PyErr {
    make(py, "FstRuntimeError", message, None, None)
}

/// A tensor whose elements the framework has no type for.
pub(crate) fn no_counterpart(py: Python<'_>, message: &str) -> PyErr {
    make(py, "FstTypeError", message, None, None)
}

/// A stream that cannot go on before some of what is held is gone.
pub(crate) fn stalled(py: Python<'_>, error: &Error) -> PyErr {
    make(py, "FstTimeoutError", &error.to_string(), None, None)
}

fn make(
    py: Python<'_>,
    class: &str,
    message: &str,
    errno: Option<i32>,
    path: Option<String>,
) -> PyErr {
    let made = py.import("fst._errors").and_then(|module| {
        let class = module.getattr(class)?;
        match class.getattr("_of_system")?.is_truthy()? {
            true => class.call1((errno, message, path)),
            false => class.call1((message,)),
        }
    });
    match made {
        Ok(error) => PyErr::from_value(error),
        Err(error) => error,
    }
}
