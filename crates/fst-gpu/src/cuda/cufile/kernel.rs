//! What must hold before the cuFile driver may be opened.
//!
//! `cuFileDriverOpen` reads `/proc/modules` and retries without end where there is none (seen with
//! 1.16 to 1.20), and closes descriptors that it never opened where `nvidia-fs` is loaded and its
//! device nodes are missing.

use super::CuFileError;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

/// Why the cuFile driver must not be opened on the system whose root folder is `root`.
pub(super) fn check(root: &Path) -> Result<(), CuFileError> {
    let modules = root.join("proc/modules");
    let modules = std::fs::read(&modules)
        .map_err(|error| CuFileError::NoModuleList { path: modules, reason: error.to_string() })?;
    let mut names = modules.split(|byte| *byte == b'\n').map(|line| line.split(|b| *b == b' '));
    if names.any(|mut words| words.next() == Some(b"nvidia_fs")) && !has_node(&root.join("dev")) {
        return Err(CuFileError::NoDeviceNode { path: root.join("dev/nvidia-fs0") });
    }
    Ok(())
}

/// Whether `dev` holds a node of nvidia-fs: `nvidia-fs`, or one with a number.
fn has_node(dev: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(dev) else { return false };
    let mut names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.any(|name| {
        name.strip_prefix("nvidia-fs").is_some_and(|rest| rest.bytes().all(|b| b.is_ascii_digit()))
    })
}

/// Calls a function that may close descriptor 0 by mistake. Descriptor 0 is open afterwards: what it
/// was, or `/dev/null` where it was closed before. Files opened later would get its number
/// otherwise, and be closed by the next such call.
pub(super) fn keeping_descriptor_0<T>(call: impl FnOnce() -> T) -> T {
    // A duplicate is numbered from 3 on.
    let kept = std::io::stdin().as_fd().try_clone_to_owned();
    let kept = kept.or_else(|_| OwnedFd::from(File::open("/dev/null")?).try_clone()).ok();
    let restore = || kept.as_ref().into_iter().for_each(|kept| open_0(kept.as_fd()));
    restore();
    let result = call();
    restore();
    result
}

/// Makes descriptor 0 a duplicate of `kept` if it is closed. What another thread has opened there is
/// left alone.
fn open_0(kept: BorrowedFd<'_>) {
    // SAFETY: no memory is involved; the call takes the lowest number that is free.
    let number = unsafe { libc::fcntl(kept.as_raw_fd(), libc::F_DUPFD, 0) };
    if number > 0 {
        // SAFETY: just made, and nobody else's.
        drop(unsafe { OwnedFd::from_raw_fd(number) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use std::process::Command;

    #[test]
    fn the_driver_is_opened_where_the_kernel_has_what_it_looks_for() {
        let root = std::env::temp_dir().join(format!("fst-cufile-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&root);
        let missing = check(&root).unwrap_err();
        assert!(matches!(missing, CuFileError::NoModuleList { .. }), "{missing}");
        assert!(missing.to_string().contains("proc/modules"), "{missing}");

        std::fs::create_dir_all(root.join("proc")).unwrap();
        std::fs::create_dir_all(root.join("dev/nvidia-fs-other")).unwrap();
        let modules = |text: &str| std::fs::write(root.join("proc/modules"), text).unwrap();
        modules("");
        assert_eq!(check(&root), Ok(()));
        modules("nvidia 1 2 nvidia_fs, Live 0x0\nnvidia_fs_other 1 0 - Live 0x0\n");
        assert_eq!(check(&root), Ok(()));
        modules("nvidia 1 2 nvidia_fs, Live 0x0\nnvidia_fs 1 0 - Live 0x0\n");
        let missing = check(&root).unwrap_err();
        assert!(matches!(missing, CuFileError::NoDeviceNode { .. }), "{missing}");
        std::fs::write(root.join("dev/nvidia-fs3"), "").unwrap();
        assert_eq!(check(&root), Ok(()));
        std::fs::remove_dir_all(&root).unwrap();
    }

    /// What descriptor 0 is open on.
    fn descriptor_0() -> Option<(u64, u64)> {
        let there = std::io::stdin().as_fd().try_clone_to_owned().ok()?;
        let metadata = File::from(there).metadata().unwrap();
        Some((metadata.dev(), metadata.ino()))
    }

    fn close_0() {
        // SAFETY: nobody in this process uses it but this test.
        assert_eq!(unsafe { libc::close(0) }, 0);
    }

    /// In a process of its own: descriptors are those of a whole process.
    #[test]
    fn descriptor_0_outlives_a_call_that_closes_it() {
        const CHILD: &str = "FST_TEST_DESCRIPTOR_0";
        if std::env::var_os(CHILD).is_none() {
            let name = "cufile::kernel::tests::descriptor_0_outlives_a_call_that_closes_it";
            let mut child = Command::new(std::env::current_exe().unwrap());
            child.args(["--exact", name, "--test-threads", "1"]).env(CHILD, "1");
            let manifest = File::open(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")).unwrap();
            let output = child.stdin(manifest).output().unwrap();
            assert!(output.status.success(), "{output:?}");
            return;
        }
        let before = descriptor_0();
        assert!(before.is_some());
        keeping_descriptor_0(close_0);
        assert_eq!(descriptor_0(), before);
        close_0();
        keeping_descriptor_0(|| assert!(descriptor_0().is_some()));
        assert!(descriptor_0().is_some_and(|now| Some(now) != before));
    }
}
