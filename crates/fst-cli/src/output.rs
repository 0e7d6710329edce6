//! Files that commands write: whole or not at all.

use std::io::{ErrorKind, Write};
use std::path::Path;

use crate::failure::Failure;

/// Writes `contents` to `path`. A regular file is written beside it under a temporary name first, so that
/// a full disk leaves what was there before; a pipe or a device is written to as it is.
pub(crate) fn write(path: &Path, contents: impl AsRef<[u8]>) -> Result<(), Failure> {
    write_whole(path, contents.as_ref()).map_err(|error| {
        // The name of a temporary file is nobody's business.
        let inner = error.get_ref().and_then(|inner| inner.source()).map(ToString::to_string);
        let hint = match error.kind() {
            ErrorKind::NotFound => "; make its folder first",
            _ => "",
        };
        Failure::at(path, format!("{}{hint}", inner.unwrap_or_else(|| error.to_string())))
    })
}

/// Links that are followed, as many as Linux follows.
const LINKS: usize = 40;

fn write_whole(path: &Path, contents: &[u8]) -> std::io::Result<()> {
    let there = path.metadata().ok();
    if there.as_ref().is_some_and(|there| !there.is_file()) {
        return std::fs::write(path, contents);
    }
    // A link stays one, also if it leads to nothing yet.
    let mut path = path.to_owned();
    for _ in 0..LINKS {
        let Ok(target) = path.read_link() else { break };
        path = path.parent().unwrap_or(Path::new("")).join(target);
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let mut builder = tempfile::Builder::new();
    builder.prefix(".fst-");
    // As an ordinary file is made, less what the process masks; one that was there keeps what it had.
    let ordinary = std::os::unix::fs::PermissionsExt::from_mode(0o666);
    let mut file = builder.permissions(ordinary).tempfile_in(folder.unwrap_or(Path::new(".")))?;
    file.write_all(contents)?;
    if let Some(there) = there {
        file.as_file().set_permissions(there.permissions())?;
    }
    file.persist(&path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_a_link_stays() {
        let folder = tempfile::tempdir().unwrap();
        let [file, link] = ["file", "link"].map(|name| folder.path().join(name));
        write(&file, "one").unwrap();
        std::os::unix::fs::symlink("file", &link).unwrap();
        write(&link, "two").unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "two");
        assert!(link.is_symlink());
        std::os::unix::fs::symlink("not yet", folder.path().join("dangling")).unwrap();
        write(&folder.path().join("dangling"), "three").unwrap();
        assert_eq!(std::fs::read_to_string(folder.path().join("not yet")).unwrap(), "three");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 4);
        assert!(write(Path::new("/dev/full"), "x").is_err());
        assert!(write(&folder.path().join("none/file"), "x").is_err());
    }
}
