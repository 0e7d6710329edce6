//! The folder a checkpoint is written into: nothing is overwritten, nothing half-written stays.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use fst::format::{Layout, WriteError, Writer, write_index};

use super::SynthError;
use crate::models::{ShardSpec, TensorSpec};

/// Takes the bytes of a file's tensors.
pub(super) type FileWriter = Writer<BufWriter<File>>;

const INDEX: &str = "model.safetensors.index.json";

/// The end of the name of a file that is not complete.
const TEMPORARY: &str = ".partial";

/// A folder that is being filled. Removed on drop if it was made for this and is empty.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    made: bool,
}

/// A file under its temporary name. Removed on drop.
#[derive(Debug)]
pub(super) struct Unfinished {
    temporary: PathBuf,
    path: PathBuf,
}

impl Folder {
    /// Makes the folder, or checks that it holds no checkpoint.
    pub(super) fn prepare(path: &Path) -> Result<Self, SynthError> {
        let failed = |doing| move |source| SynthError::Io { path: path.to_owned(), doing, source };
        let made = !path.exists();
        fs::create_dir_all(path).map_err(failed("cannot make folder"))?;
        let folder = Self { path: path.to_owned(), made };
        for entry in fs::read_dir(path).map_err(failed("cannot read folder"))? {
            let entry = entry.map_err(failed("cannot read folder"))?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            // A file under its temporary name is what a killed run leaves, or another's work.
            let in_the_way = [".safetensors", ".safetensors.index.json", TEMPORARY];
            if in_the_way.iter().any(|end| name.ends_with(end)) {
                return Err(SynthError::Exists { path: entry.path() });
            }
        }
        Ok(folder)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Refuses what the file system has no room for. One that does not tell is tried.
    pub(super) fn check_space(&self, needed: u64) -> Result<(), SynthError> {
        let Ok(space) = rustix::fs::statvfs(&self.path) else { return Ok(()) };
        let free = space.f_bavail.saturating_mul(space.f_frsize);
        // Of file systems without blocks, such as a tmpfs without a limit, nothing is known.
        if space.f_blocks == 0 || needed <= free {
            return Ok(());
        }
        Err(SynthError::NoSpace { path: self.path.clone(), needed, free })
    }

    /// A file of this name, to be written under a temporary one.
    pub(super) fn file(&self, name: &str) -> Unfinished {
        let path = self.path.join(name);
        Unfinished { temporary: self.path.join(format!("{name}{TEMPORARY}")), path }
    }

    /// Gives all files their names, adds the index that several files need, and returns the files'
    /// paths. From here on they stay.
    pub(super) fn finish(
        self,
        plan: &[ShardSpec],
        files: &[Unfinished],
    ) -> Result<Vec<PathBuf>, SynthError> {
        let paths: Vec<PathBuf> = files.iter().map(|file| file.path.clone()).collect();
        let named = files.iter().try_for_each(Unfinished::rename);
        let result = named.and_then(|()| if plan.len() > 1 { self.index(plan) } else { Ok(()) });
        if let Err(error) = result {
            for path in &paths {
                // Some do not have this name yet.
                let _ = fs::remove_file(path);
            }
            return Err(error);
        }
        Ok(paths)
    }

    fn index(&self, plan: &[ShardSpec]) -> Result<(), SynthError> {
        let map = plan.iter().flat_map(|shard| {
            shard.tensors.iter().map(|tensor| (tensor.name.as_str(), shard.file_name.as_str()))
        });
        let total = plan.iter().map(ShardSpec::bytes).sum();
        write_index(&self.path, map, total).map(drop).map_err(|source| {
            let _ = fs::remove_file(self.path.join(INDEX));
            SynthError::Index { source }
        })
    }
}

impl Unfinished {
    /// Creates the file, which must not exist, and writes its header.
    pub(super) fn create(&self, shard: &ShardSpec) -> Result<FileWriter, SynthError> {
        let mut layout = Layout::new();
        layout.metadata("format", "pt");
        for TensorSpec { name, dtype, shape } in &shard.tensors {
            layout.tensor(name, *dtype, shape).map_err(|source| self.failed(source))?;
        }
        let file = File::create_new(&self.temporary).map_err(|source| self.failed(source))?;
        let out = BufWriter::with_capacity(1 << 20, file);
        layout.write_to(out).map_err(|source| self.failed(source))
    }

    /// An error that says which file could not be written.
    pub(super) fn failed(&self, source: impl Into<WriteError>) -> SynthError {
        SynthError::Write { path: self.path.clone(), source: source.into() }
    }

    fn rename(&self) -> Result<(), SynthError> {
        fs::rename(&self.temporary, &self.path).map_err(|source| SynthError::Io {
            path: self.path.clone(),
            doing: "cannot rename the finished file",
            source,
        })
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if self.made {
            // Fails where the folder is not empty, which is what is wanted.
            let _ = fs::remove_dir(&self.path);
        }
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Fails where the file has its final name by now, or was never made.
        let _ = fs::remove_file(&self.temporary);
    }
}
