//! Writing tensors: one file, or a folder of shards with their index, tensor by tensor.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::{Device, Error, Result, Storage, Tensor};
use fst::format::{Layout, WriteError, shard_file_name, write_index};

use crate::dtype::of_candle;
use crate::memory::with_vec;

/// Bytes of a shard's tensors: the customary 5 GB.
const SHARD: u64 = 5_000_000_000;

/// Writes tensors: into one file where `path` ends in `.safetensors`, else into a folder, which is made if
/// it is not there, as shards of 5 GB with their index. [`Save`] has other sizes.
///
/// ```no_run
/// use std::collections::HashMap;
///
/// use candle_core::{DType, Device, Tensor};
///
/// let weight = Tensor::zeros((2, 3), DType::F32, &Device::Cpu)?;
/// fst_candle::save(&HashMap::from([("weight", weight)]), "model.safetensors")?;
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
///
/// As for [`Save::write`].
pub fn save<N: AsRef<str>>(tensors: &HashMap<N, Tensor>, path: impl AsRef<Path>) -> Result<()> {
    Save::new().write(tensors, path)
}

/// How tensors are written.
#[derive(Debug, Clone)]
pub struct Save {
    shard: u64,
    metadata: Vec<(String, String)>,
}

impl Default for Save {
    fn default() -> Self {
        Self::new()
    }
}

/// A tensor to write.
struct One<'t> {
    name: &'t str,
    tensor: &'t Tensor,
    dtype: fst::Dtype,
    bytes: u64,
}

impl Save {
    /// Shards of 5 GB, and no metadata but `format: pt`, which some readers ask for.
    pub fn new() -> Self {
        Self { shard: SHARD, metadata: vec![("format".to_owned(), "pt".to_owned())] }
    }

    /// The most bytes of tensors in one shard of a folder; a tensor that is larger has a shard of its own.
    #[must_use]
    pub fn shard_bytes(mut self, bytes: u64) -> Self {
        self.shard = bytes;
        self
    }

    /// Adds an entry to the metadata of each file.
    #[must_use]
    pub fn metadata(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.metadata.push((key.into(), value.into()));
        self
    }

    /// Writes tensors, as [`save`] does: one after the other, each straight from where it is if it is
    /// contiguous and in host memory. Files take their names when all are complete; the index is the last.
    ///
    /// # Errors
    ///
    /// What is wrong with a name or the disk, and a folder that has other `.safetensors` files, which would
    /// be taken for a part of the checkpoint.
    pub fn write<N: AsRef<str>>(
        &self,
        tensors: &HashMap<N, Tensor>,
        path: impl AsRef<Path>,
    ) -> Result<()> {
        let path = path.as_ref();
        let mut all = Vec::with_capacity(tensors.len());
        for (name, tensor) in tensors {
            let dtype = of_candle(tensor.dtype());
            let dtype =
                dtype.ok_or_else(|| Error::UnsupportedDTypeForOp(tensor.dtype(), "save").bt())?;
            let bytes = tensor.elem_count() as u64 * u64::from(dtype.bits()) / 8;
            all.push(One { name: name.as_ref(), tensor, dtype, bytes });
        }
        // Large elements first, so that all are aligned.
        all.sort_by(|a, b| (b.dtype, a.name).cmp(&(a.dtype, b.name)));
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            return self.file(path, &all)?.publish();
        }
        let shards = shards(&all, self.shard);
        let file = |index| match shards.len() {
            1 => "model.safetensors".to_owned(),
            of => shard_file_name(index, of),
        };
        let names: Vec<String> = (0..shards.len()).map(file).collect();
        std::fs::create_dir_all(path).map_err(|e| Error::from(e).with_path(path))?;
        check_folder(path, &names)?;
        let files =
            names.iter().zip(&shards).map(|(name, shard)| self.file(&path.join(name), shard));
        let files = files.collect::<Result<Vec<_>>>()?;
        files.into_iter().try_for_each(Partial::publish)?;
        if shards.len() > 1 {
            let listed = shards.iter().zip(&names);
            let map =
                listed.flat_map(|(shard, name)| shard.iter().map(move |one| (one.name, &**name)));
            write_index(path, map, all.iter().map(|one| one.bytes).sum()).map_err(Error::wrap)?;
        }
        Ok(())
    }

    /// Writes one file, by another name for now.
    fn file(&self, path: &Path, tensors: &[One<'_>]) -> Result<Partial> {
        let at_path = |error: Error| error.with_path(path);
        let format = |error: WriteError| Error::wrap(error).with_path(path);
        let mut layout = Layout::new();
        for (key, value) in &self.metadata {
            layout.metadata(key, value);
        }
        for One { name, tensor, dtype, .. } in tensors {
            layout.tensor(*name, *dtype, tensor.dims()).map_err(format)?;
        }
        let (file, partial) = Partial::new(path).map_err(|e| at_path(e.into()))?;
        let mut writer = layout.write_to(file).map_err(format)?;
        for one in tensors {
            write_tensor(one.tensor, &mut |bytes| writer.write_all(bytes)).map_err(at_path)?;
        }
        writer.finish().map_err(format)?;
        Ok(partial)
    }
}

/// Tensors in their order, as many together as a shard has room for. At least one shard.
fn shards<'s, 't>(all: &'s [One<'t>], most: u64) -> Vec<&'s [One<'t>]> {
    let (mut shards, mut start, mut bytes) = (Vec::new(), 0, 0u64);
    for (index, one) in all.iter().enumerate() {
        if index > start && bytes.saturating_add(one.bytes) > most {
            shards.push(&all[start..index]);
            (start, bytes) = (index, 0);
        }
        bytes = bytes.saturating_add(one.bytes);
    }
    shards.push(&all[start..]);
    shards
}

/// Refuses a folder whose other files would be read as a part of what is written.
fn check_folder(folder: &Path, names: &[String]) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(|e| Error::from(e).with_path(folder))? {
        let name = entry.map_err(|e| Error::from(e).with_path(folder))?.file_name();
        let Some(name) = name.to_str() else { continue };
        let other = name.ends_with(".safetensors") && !names.iter().any(|own| own == name);
        let index = name.ends_with(".safetensors.index.json")
            && (names.len() == 1 || name != "model.safetensors.index.json");
        if other || index {
            let folder = folder.display();
            candle_core::bail!(
                "{folder}: has {name}, which would be read as a part of this checkpoint"
            );
        }
    }
    Ok(())
}

/// A file that has not got its name yet; removed if it never gets it.
struct Partial {
    partial: PathBuf,
    path: PathBuf,
}

impl Partial {
    fn new(path: &Path) -> std::io::Result<(File, Self)> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.partial", std::process::id()));
        let partial = path.with_file_name(name);
        let file = File::create(&partial)?;
        Ok((file, Self { partial, path: path.to_owned() }))
    }

    fn publish(mut self) -> Result<()> {
        let renamed = std::fs::rename(&self.partial, &self.path);
        renamed.map_err(|e| Error::from(e).with_path(&self.path))?;
        self.partial = PathBuf::new();
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.partial.as_os_str().is_empty() {
            let _ = std::fs::remove_file(&self.partial);
        }
    }
}

/// Gives the bytes of a tensor's elements, in row-major order.
fn write_tensor(
    tensor: &Tensor,
    write: &mut dyn FnMut(&[u8]) -> std::io::Result<()>,
) -> Result<()> {
    let tensor = tensor.to_device(&Device::Cpu)?.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        candle_core::bail!("a tensor that was copied to the host is not there");
    };
    let packed = tensor.dtype().size_in_bytes() == 0;
    with_vec!(storage, vec => {
        let (start, count) = (layout.start_offset(), tensor.elem_count());
        // Packed elements are kept as bytes, all of them one tensor's.
        let elements = if packed { Some(&vec[..]) } else { vec.get(start..start + count) };
        let elements = elements.ok_or_else(|| Error::msg("a tensor is longer than its storage"))?;
        // SAFETY: numbers and bits of floats, which have no padding, as the bytes that they are.
        let bytes = unsafe {
            std::slice::from_raw_parts(elements.as_ptr().cast::<u8>(), size_of_val(elements))
        };
        Ok(write(bytes)?)
    })
}
