//! Opening regular files, and telling whether two are one.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

/// Opens a regular file; the metadata is that of the file that was opened. `None`: it is no such file.
///
/// A check of the name before opening would say nothing of what is opened then. So what it leads to is
/// opened without waiting (a named pipe would otherwise wait for a writer, perhaps for ever), and
/// looked at by its handle.
pub(crate) fn regular(path: &Path) -> io::Result<Option<(File, Metadata)>> {
    let open = |flags| OpenOptions::new().read(true).custom_flags(flags).open(path);
    let file = match open(libc::O_NONBLOCK) {
        Ok(file) => file,
        // Another process holds a lease on the file, which is waited for, but only if it is a file.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            let place = open(libc::O_PATH)?;
            if !place.metadata()?.is_file() {
                return Ok(None);
            }
            File::open(format!("/proc/thread-self/fd/{}", place.as_raw_fd()))?
        }
        // Sockets cannot be opened, nor can devices without a driver.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENODEV)) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let metadata = file.metadata()?;
    Ok(metadata.is_file().then_some((file, metadata)))
}

/// Whether the process may have no more files open.
pub(crate) fn is_too_many(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EMFILE)
}

/// Whether both are one file, by whatever names.
pub(crate) fn is_same(one: (&Path, &Metadata), other: (&Path, &Metadata)) -> bool {
    (one.1.dev(), one.1.ino()) == (other.1.dev(), other.1.ino())
}

/// Whether a file was not written to from one look to another: by length and times.
pub(crate) fn is_unchanged(one: &Metadata, other: &Metadata) -> bool {
    let of = |file: &Metadata| {
        let modified = (file.mtime(), file.mtime_nsec());
        (file.len(), modified, (file.ctime(), file.ctime_nsec()))
    };
    of(one) == of(other)
}

/// Reads at a position, once; that of the file stays as it is.
pub(crate) fn read_at(file: &File, bytes: &mut [u8], at: u64) -> io::Result<usize> {
    file.read_at(bytes, at)
}
