//! Whether GPUDirect Storage works here, and how.

use super::CuFile;
use crate::cufile::{CuFileError, GdsMode, GdsStatus};
use std::path::Path;

impl GdsStatus {
    /// Looks. Opens cuFile and its driver if there is one.
    pub fn probe() -> Self {
        Self::with(CuFile::open(), Path::new("/"))
    }

    /// [`probe`](Self::probe) with a cuFile opened before and another root folder, for tests.
    #[doc(hidden)]
    pub fn with(cufile: Result<&'static CuFile, CuFileError>, root: &Path) -> Self {
        let proc = root.join("proc/driver/nvidia-fs");
        let nvidia_fs = proc.is_dir() || root.join("dev/nvidia-fs0").exists();
        let nvidia_fs_version = std::fs::read_to_string(proc.join("version"))
            .ok()
            .and_then(|text| text.split_once(':').map(|(_, v)| v.trim().to_owned()));
        let (library, version) = match cufile {
            Ok(cufile) => (Some(cufile.library().to_owned()), cufile.version()),
            Err(_) => (None, None),
        };
        let direct = |cufile: &'static CuFile| {
            cufile.driver_properties().map(|properties| nvidia_fs || cufile.has_p2p(&properties))
        };
        let mode = match cufile.and_then(direct) {
            Err(error) => GdsMode::Unavailable(error),
            Ok(true) => GdsMode::Direct,
            Ok(false) => GdsMode::Compatibility,
        };
        Self { nvidia_fs, nvidia_fs_version, library, version, mode }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_module_is_found() {
        let absent = || CuFileError::NotFound { looked_for: vec![], reason: String::new() };
        let root = std::env::temp_dir().join(format!("fst-gds-{}", std::process::id()));
        // What a process with this id left when it was killed.
        let _ = std::fs::remove_dir_all(&root);
        let proc = root.join("proc/driver/nvidia-fs");
        let status = GdsStatus::with(Err(absent()), &root);
        assert!(!status.nvidia_fs);
        assert_eq!(status.mode, GdsMode::Unavailable(absent()));
        std::fs::create_dir_all(&proc).unwrap();
        std::fs::write(proc.join("version"), "version: 2.24.2\n").unwrap();
        let status = GdsStatus::with(Err(absent()), &root);
        std::fs::remove_dir_all(&root).unwrap();
        assert!(status.nvidia_fs);
        assert_eq!(status.nvidia_fs_version.as_deref(), Some("2.24.2"));
    }
}
