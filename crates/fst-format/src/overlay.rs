//! Checkpoints made of others: one over another, as adapters and patches are used, and by other names.

use std::collections::HashMap;
use std::sync::Arc;

use crate::checkpoint::{Files, Inner};
use crate::names::NameTable;
use crate::{Checkpoint, Error, Metadata, Shard, TensorInfo};

impl Checkpoint {
    /// The tensors of both; of two by one name, that of `other`. Neither is changed, and nothing is read.
    ///
    /// ```no_run
    /// use fst_format::Checkpoint;
    ///
    /// let patched = Checkpoint::open("model")?.overlay(&Checkpoint::open("patch.safetensors")?);
    /// # Ok::<(), fst_format::Error>(())
    /// ```
    #[must_use]
    pub fn overlay(&self, other: &Checkpoint) -> Checkpoint {
        let (below, above) = (&self.inner, &other.inner);
        let behind = below.files.shards.len() as u32;
        let shards = below.files.shards.iter().chain(&above.files.shards).cloned().collect();
        let mut names = below.files.names.clone();
        for (&(shard, index), name) in &above.files.names {
            names.insert((shard + behind, index), name.clone());
        }
        let left = below.tensors.iter().filter(|tensor| other.get(tensor.name()).is_none());
        let places = left
            .map(|tensor| (tensor.shard, tensor.index))
            .chain(above.tensors.iter().map(|tensor| (tensor.shard + behind, tensor.index)))
            .collect();
        let (mut inner, _) = made_of(self, Files { shards, names }, places);
        inner.metadata = Metadata::merged([&above.metadata, &below.metadata]);
        inner.open_time = below.open_time + above.open_time;
        inner.notices.extend(above.notices.iter().cloned());
        Checkpoint { inner: Arc::new(inner) }
    }

    /// The same tensors, those by other names for which `rename` gives one.
    ///
    /// ```no_run
    /// use fst_format::Checkpoint;
    ///
    /// let plain = Checkpoint::open("model")?
    ///     .renamed(|tensor| tensor.name().strip_prefix("model.").map(str::to_owned))?;
    /// # Ok::<(), fst_format::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::RepeatedName`] where two would have one name.
    pub fn renamed(
        &self,
        mut rename: impl FnMut(&TensorInfo) -> Option<String>,
    ) -> Result<Checkpoint, Error> {
        let inner = &self.inner;
        let mut names: HashMap<(u32, u32), Box<str>> = inner.files.names.clone();
        for tensor in &inner.tensors {
            if let Some(name) = rename(tensor) {
                names.insert((tensor.shard, tensor.index), name.into());
            }
        }
        let files = Files { shards: inner.files.shards.clone(), names };
        let places = inner.tensors.iter().map(|tensor| (tensor.shard, tensor.index)).collect();
        match made_of(self, files, places) {
            (_, Some(name)) => Err(Error::RepeatedName { name }),
            (inner, None) => Ok(Checkpoint { inner: Arc::new(inner) }),
        }
    }
}

/// What a checkpoint of these tensors consists of, by shard and place in its header, which otherwise is
/// like `base`; and a name that two of them have, if there is one.
fn made_of(base: &Checkpoint, files: Files, places: Vec<(u32, u32)>) -> (Inner, Option<String>) {
    let files = Arc::new(files);
    let tensor = |(shard, index)| TensorInfo { files: files.clone(), shard, index };
    let tensors: Vec<TensorInfo> = places.into_iter().map(tensor).collect();
    let mut by_name = NameTable::with_capacity(tensors.len());
    let name_of = |position: u32| tensors[position as usize].name();
    let repeated = (0..tensors.len() as u32).find(|at| by_name.insert(*at, name_of).is_err());
    let repeated = repeated.map(|position| name_of(position).to_owned());
    let metadata = Metadata::merged(files.shards.iter().map(Shard::metadata));
    let byte_len = tensors.iter().fold(0u64, |sum, tensor| sum.saturating_add(tensor.byte_len()));
    let (open_time, notices) = (base.inner.open_time, base.inner.notices.clone());
    let by_name = Some(by_name);
    (
        Inner { files: files.clone(), tensors, by_name, metadata, byte_len, open_time, notices },
        repeated,
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use crate::{Dtype, Layout};

    /// A file of tensors of one byte, which is `value`.
    fn checkpoint(folder: &std::path::Path, file: &str, names: &[&str], value: u8) -> Checkpoint {
        let mut layout = Layout::new();
        layout.metadata("from", file);
        for name in names {
            layout.tensor(*name, Dtype::U8, &[1]).unwrap();
        }
        let mut writer = layout.write_to(Vec::new()).unwrap();
        names.iter().for_each(|_| writer.write_tensor(&[value]).unwrap());
        std::fs::write(folder.join(file), writer.finish().unwrap()).unwrap();
        Checkpoint::open(folder.join(file)).unwrap()
    }

    #[test]
    #[cfg_attr(miri, ignore = "miri's isolation knows no files")]
    fn of_two_tensors_by_one_name_the_upper_one_counts() {
        let folder = tempfile::tempdir().unwrap();
        let below = checkpoint(folder.path(), "below", &["a", "b", "c"], 1);
        let above = checkpoint(folder.path(), "above", &["b", "d"], 2);
        let names =
            |c: &Checkpoint| c.tensors().iter().map(|t| t.name().to_owned()).collect::<Vec<_>>();
        let file = |c: &Checkpoint, name: &str| {
            c.get(name).unwrap().path().file_name().unwrap().to_owned().into_string().unwrap()
        };
        let both = below.overlay(&above);
        assert_eq!(names(&both), ["a", "c", "b", "d"]);
        assert_eq!(
            [file(&both, "a"), file(&both, "b"), file(&both, "d")],
            ["below", "above", "above"]
        );
        assert_eq!((both.byte_len(), both.shards().len()), (4, 2));
        assert_eq!(both.metadata().get("from"), Some("above"));
        assert!(both.get("e").is_none());
        // Over itself, it is itself; and what was laid over can be laid over again.
        assert_eq!(names(&below.overlay(&below)), ["a", "b", "c"]);
        let again = both.overlay(&below);
        assert_eq!((names(&again).len(), file(&again, "b")), (4, "below".to_owned()));
    }

    #[test]
    #[cfg_attr(miri, ignore = "miri's isolation knows no files")]
    fn tensors_go_by_their_new_names_only() {
        let folder = tempfile::tempdir().unwrap();
        let plain = checkpoint(folder.path(), "x", &["m.a", "m.b", "c"], 1);
        let stripped = |t: &TensorInfo| t.name().strip_prefix("m.").map(str::to_owned);
        let renamed = plain.renamed(stripped).unwrap();
        assert!(renamed.get("m.a").is_none());
        assert_eq!(renamed.get("b").unwrap().file_range(), plain.get("m.b").unwrap().file_range());
        assert_eq!(renamed.get("c").unwrap().name(), "c");
        let back = renamed.renamed(|t| Some(format!("m.{}", t.name()))).unwrap();
        assert!(["m.a", "m.b", "m.c"].iter().all(|name| back.get(name).is_some()));
        // Renamed tensors lie over others by their new names.
        let over = checkpoint(folder.path(), "y", &["a"], 2).overlay(&renamed);
        assert_eq!(over.tensors().len(), 3);
        let error = plain.renamed(|_| Some("x".to_owned())).unwrap_err();
        assert!(matches!(&error, Error::RepeatedName { name } if name == "x"), "{error}");
    }
}
