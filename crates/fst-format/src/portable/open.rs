//! Opening regular files, and telling whether two are one, by the standard library alone: for systems other than
//! Linux. On Linux it is compiled and tested under `--cfg fst_portable`.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::path::Path;

/// Opens a regular file; the metadata is that of the file that was opened. `None`: it is no such file.
///
/// The look at the name comes first: opening something else may wait for ever. Where a named pipe may take the
/// name meanwhile, it is opened without waiting.
pub(crate) fn regular(path: &Path) -> io::Result<Option<(File, Metadata)>> {
    if !std::fs::metadata(path)?.is_file() {
        return Ok(None);
    }
    let mut options = OpenOptions::new();
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NONBLOCK);
    let file = options.read(true).open(path)?;
    let metadata = file.metadata()?;
    Ok(metadata.is_file().then_some((file, metadata)))
}

/// Whether the process may have no more files open.
pub(crate) fn is_too_many(error: &io::Error) -> bool {
    // ERROR_TOO_MANY_OPEN_FILES, and EMFILE.
    error.raw_os_error() == Some(if cfg!(windows) { 4 } else { 24 })
}

/// Whether both are one file, by whatever names.
#[cfg(unix)]
pub(crate) fn is_same((_, one): (&Path, &Metadata), (_, other): (&Path, &Metadata)) -> bool {
    use std::os::unix::fs::MetadataExt;
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

/// Whether both are one file, by whatever names but hard links. Not run on Linux.
#[cfg(not(unix))]
pub(crate) fn is_same(one: (&Path, &Metadata), other: (&Path, &Metadata)) -> bool {
    let place = |path: &Path| path.canonicalize().ok();
    one.1.len() == other.1.len() && place(one.0).is_some_and(|one| Some(one) == place(other.0))
}

/// Whether a file was not written to from one look to another: nobody can tell.
pub(crate) fn is_unchanged(_one: &Metadata, _other: &Metadata) -> bool {
    false
}

/// Reads at a position, once; the file's own position moves.
pub(crate) fn read_at(mut file: &File, bytes: &mut [u8], at: u64) -> io::Result<usize> {
    use std::io::{Read, Seek, SeekFrom};
    file.seek(SeekFrom::Start(at))?;
    file.read(bytes)
}
