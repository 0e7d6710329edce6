//! The checkpoints that workloads run on: synthesized once, reused while complete, evicted to bound the disk.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use fst_cli::models::{ShardSpec, TensorSpec};
use fst_cli::synth::Content;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

/// What the files of a data set are filled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// Pseudo-random bytes.
    Random,
    /// Nothing: the data is a hole of the right length. For workloads that read headers only.
    Hole,
}

/// A checkpoint to synthesize.
#[derive(Debug, Clone)]
pub struct DataSet {
    /// Name of its folder.
    pub name: &'static str,
    /// Its files and their tensors.
    pub files: Vec<ShardSpec>,
    /// What the data is.
    pub fill: Fill,
}

/// Present when the folder holds everything it should.
const COMPLETE: &str = "complete";

impl DataSet {
    /// All tensors, file by file.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorSpec> {
        self.files.iter().flat_map(|file| &file.tensors)
    }

    /// Bytes of tensor data.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.tensors().map(TensorSpec::bytes).sum()
    }

    /// Identifies names, shapes, files and fill, so that a changed definition is made anew.
    fn fingerprint(&self) -> String {
        let text = format!("2 {:?} {:?}", self.files, self.fill);
        Sha256::digest(text).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
    }

    /// The checkpoint's folder under `root`, made now unless it is there and complete.
    ///
    /// # Errors
    /// Files that cannot be written.
    pub fn make(&self, root: &Path) -> Result<PathBuf> {
        let folder = root.join(self.name);
        let complete = folder.join(COMPLETE);
        if fs::read_to_string(&complete).is_ok_and(|found| found == self.fingerprint()) {
            return Ok(folder);
        }
        if folder.exists() {
            fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))?;
        }
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        self.write(&folder).with_context(|| format!("synthesize into {}", folder.display()))?;
        fs::write(&complete, self.fingerprint())?;
        Ok(folder)
    }

    fn write(&self, folder: &Path) -> Result<()> {
        let mut weight_map = Map::new();
        for file in &self.files {
            self.write_file(&folder.join(&file.file_name), file)?;
            for tensor in &file.tensors {
                weight_map.insert(tensor.name.clone(), Value::String(file.file_name.clone()));
            }
        }
        if self.files.len() > 1 {
            let index = json!({"metadata": {"total_size": self.bytes()}, "weight_map": weight_map});
            fs::write(folder.join("model.safetensors.index.json"), index.to_string())?;
        }
        Ok(())
    }

    /// Writes one file by the format's description alone, so that no loader under test had a hand in it.
    fn write_file(&self, path: &Path, shard: &ShardSpec) -> Result<()> {
        let mut header = String::from(r#"{"__metadata__":{"format":"pt"}"#);
        let mut offset = 0;
        for tensor in &shard.tensors {
            let end = offset + tensor.bytes();
            let entry = json!({
                "dtype": tensor.dtype.to_string(),
                "shape": tensor.shape,
                "data_offsets": [offset, end],
            });
            header += &format!(",{}:{entry}", Value::String(tensor.name.clone()));
            offset = end;
        }
        header.push('}');
        let mut header = header.into_bytes();
        // As the official writer does: padded with spaces to a multiple of 8.
        header.resize(header.len().next_multiple_of(8), b' ');
        let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        if self.fill == Fill::Random {
            let mut block = vec![0u8; 1 << 20];
            for tensor in &shard.tensors {
                let content = Content::new(0, &tensor.name, tensor.dtype);
                let mut written = 0;
                while written < tensor.bytes() {
                    let len = (tensor.bytes() - written).min(block.len() as u64) as usize;
                    content.fill(written, &mut block[..len]);
                    out.write_all(&block[..len])?;
                    written += len as u64;
                }
            }
        }
        let file = out.into_inner().map_err(|e| e.into_error())?;
        file.set_len(8 + header.len() as u64 + offset)?;
        file.sync_all()?;
        Ok(())
    }
}

/// Removes other data sets under `root`, oldest first, until `next` fits into `limit` bytes with the rest.
///
/// # Errors
/// A data set larger than the limit, or a folder that cannot be removed.
pub fn make_room(root: &Path, next: &DataSet, limit: u64) -> Result<()> {
    let wanted = if next.fill == Fill::Hole { 0 } else { next.bytes() };
    if wanted > limit {
        bail!("{} needs {wanted} bytes, the limit is {limit} (--disk-limit-gb)", next.name);
    }
    let mut others = Vec::new();
    for entry in fs::read_dir(root).into_iter().flatten() {
        let path = entry?.path();
        if path.is_dir() && path.file_name().is_some_and(|name| name != next.name) {
            others.push((path.metadata()?.modified()?, allocated(&path)?, path));
        }
    }
    others.sort();
    let mut used: u64 = others.iter().map(|other| other.1).sum();
    for (_, bytes, path) in others {
        if used + wanted <= limit {
            break;
        }
        fs::remove_dir_all(&path).with_context(|| format!("remove {}", path.display()))?;
        used -= bytes;
    }
    Ok(())
}

/// Bytes that the files of a folder take on the disk.
fn allocated(folder: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let mut total = 0;
    for entry in fs::read_dir(folder)? {
        total += entry?.metadata()?.blocks() * 512;
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::{cut, odd};
    use safetensors::SafeTensors;

    fn set(name: &'static str, files: Vec<ShardSpec>) -> DataSet {
        DataSet { name, files, fill: Fill::Random }
    }

    #[test]
    fn the_official_reader_accepts_every_file() {
        let root = tempfile::tempdir().unwrap();
        for fill in [Fill::Random, Fill::Hole] {
            let set = DataSet { name: "a", files: cut("llama-2-7b", 2, 64, 3), fill };
            let folder = set.make(root.path()).unwrap();
            let files = crate::contender::safetensors_files(&folder).unwrap();
            assert_eq!(files.len(), 3);
            let mut found = Vec::new();
            for file in files {
                let bytes = fs::read(file).unwrap();
                for (name, view) in SafeTensors::deserialize(&bytes).unwrap().iter() {
                    found.push((name.to_owned(), view.shape().to_vec()));
                }
            }
            let mut wanted: Vec<_> =
                set.tensors().map(|t| (t.name.clone(), t.shape.clone())).collect();
            found.sort();
            wanted.sort();
            assert_eq!(found, wanted);
        }
    }

    #[test]
    fn complete_data_is_reused_and_changed_definitions_are_not() {
        let root = tempfile::tempdir().unwrap();
        let folder = set("a", odd()).make(root.path()).unwrap();
        let mark = folder.join("mark");
        fs::write(&mark, "").unwrap();
        set("a", odd()).make(root.path()).unwrap();
        assert!(mark.exists());
        let mut changed = odd();
        changed[0].tensors.pop();
        set("a", changed).make(root.path()).unwrap();
        assert!(!mark.exists());
    }

    #[test]
    fn old_data_makes_room_for_new() {
        let root = tempfile::tempdir().unwrap();
        let (a, b) = (set("a", odd()), set("b", odd()));
        let folder = a.make(root.path()).unwrap();
        make_room(root.path(), &b, 4 * b.bytes()).unwrap();
        assert!(folder.exists());
        make_room(root.path(), &b, b.bytes() + 1).unwrap();
        assert!(!folder.exists());
        assert!(make_room(root.path(), &b, b.bytes() - 1).is_err());
    }
}
