//! `model.safetensors.index.json`: which shard holds which tensor.
//!
//! `{"metadata": {...}, "weight_map": {"tensor": "file", ...}}`, where files are relative to the
//! index. The text is not to be trusted: a file entry may only go down from the index's folder.
//! The text is checked, not what links resolve to, for the Hugging Face cache is made of links that
//! leave their folder.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Component, Path, PathBuf};

use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};

use crate::Error;
use crate::error::JsonError;

/// Longest index that is read, in bytes; that of a 671B mixture of experts has 8 MB.
pub(crate) const MAX_INDEX_LEN: u64 = 200_000_000;

/// A checked weight map.
#[derive(Debug)]
pub(crate) struct Index {
    /// Files relative to the index, sorted, each with the first tensor that the map puts there.
    pub(crate) files: Vec<(PathBuf, String)>,
    /// The tensors' names, one behind the other: tens of thousands of strings of their own would
    /// take longer to make than to look up.
    names: String,
    /// For each tensor, in the order of the text, where its name ends and its place in `files`.
    tensors: Vec<(usize, u32)>,
}

impl Index {
    /// Tensors with their place in `files`, in the order of the text. A name may be there twice.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (&str, usize)> {
        let mut start = 0;
        self.tensors.iter().map(move |&(end, file)| {
            let name = self.names.get(start..end).unwrap_or_default();
            start = end;
            (name, file as usize)
        })
    }

    /// Parses the contents of the index at `path`, which is used for messages only.
    pub(crate) fn parse(bytes: &[u8], path: &Path) -> Result<Index, Error> {
        let index = || path.to_owned();
        let text = str::from_utf8(bytes).map_err(|error| Error::IndexNotUtf8 {
            index: index(),
            offset: error.valid_up_to() as u64,
        })?;
        let mut map = WeightMap::default();
        let mut json = serde_json::Deserializer::from_str(text);
        json.deserialize_map(TopLevel(&mut map)).and_then(|()| json.end()).map_err(|error| {
            let source = JsonError::new(error);
            Error::IndexJson { index: index(), offset: source.offset_in(text), source }
        })?;
        map.resolve(path)
    }
}

/// The map as written: tensors with the place of their entry in `entries`.
#[derive(Default)]
struct WeightMap<'t> {
    tensors: Vec<(Cow<'t, str>, usize)>,
    entries: Vec<Cow<'t, str>>,
    places: BTreeMap<Cow<'t, str>, usize>,
}

impl WeightMap<'_> {
    fn resolve(self, path: &Path) -> Result<Index, Error> {
        let index = || path.to_owned();
        if self.tensors.is_empty() {
            return Err(Error::EmptyIndex { index: index() });
        }
        let mut first_tensor = vec![None; self.entries.len()];
        for (name, entry) in &self.tensors {
            first_tensor[*entry].get_or_insert(name);
        }
        // Entries such as `a` and `./a` are one file.
        let mut files: BTreeMap<PathBuf, String> = BTreeMap::new();
        let mut paths = Vec::with_capacity(self.entries.len());
        for (entry, tensor) in self.entries.iter().zip(first_tensor) {
            let tensor: &str = tensor.map_or("", |name| name);
            let file = plain_path(entry).ok_or_else(|| Error::OutsideFolder {
                index: index(),
                tensor: tensor.to_owned(),
                entry: entry.clone().into_owned(),
            })?;
            files.entry(file.clone()).or_insert_with(|| tensor.to_owned());
            paths.push(file);
        }
        let order: BTreeMap<&Path, u32> =
            (0..).zip(files.keys()).map(|(i, file)| (file.as_path(), i)).collect();
        let places: Vec<u32> =
            paths.iter().map(|file| order.get(file.as_path()).copied().unwrap_or(0)).collect();
        drop(order);
        let mut names =
            String::with_capacity(self.tensors.iter().map(|(name, _)| name.len()).sum());
        let tensors = self.tensors.iter().map(|(name, entry)| {
            names.push_str(name);
            (names.len(), places[*entry])
        });
        let tensors = tensors.collect();
        Ok(Index { files: files.into_iter().collect(), names, tensors })
    }
}

/// `entry` as a path that only goes down, or `None`.
///
/// Refused: the empty path, absolute ones, any `..` even if it stays inside, and backslashes and
/// drive colons in front, with which an index made for another system would leave.
fn plain_path(entry: &str) -> Option<PathBuf> {
    if entry.contains(['\\', '\0']) {
        return None;
    }
    let mut path = PathBuf::new();
    for component in Path::new(entry).components() {
        match component {
            Component::Normal(name) => path.push(name),
            Component::CurDir => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    (!path.as_os_str().is_empty()).then_some(path)
}

/// The object of an index.
struct TopLevel<'m, 't>(&'m mut WeightMap<'t>);

impl<'de> Visitor<'de> for TopLevel<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with a weight_map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen = false;
        while let Some(Text(key)) = map.next_key::<Text<'de>>()? {
            if key == "weight_map" {
                if std::mem::replace(&mut seen, true) {
                    return Err(de::Error::duplicate_field("weight_map"));
                }
                map.next_value_seed(Weights(self.0))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        if seen { Ok(()) } else { Err(de::Error::missing_field("weight_map")) }
    }
}

/// The object of tensors and files.
struct Weights<'m, 't>(&'m mut WeightMap<'t>);

impl<'de> DeserializeSeed<'de> for Weights<'_, 'de> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Weights<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors and their files")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let out = self.0;
        while let Some((Text(tensor), Text(file))) = map.next_entry::<Text<'de>, Text<'de>>()? {
            let place = match out.tensors.last() {
                Some(&(_, last)) if out.entries[last] == file => last,
                _ => match out.places.get(&file) {
                    Some(&place) => place,
                    None => {
                        out.entries.push(file.clone());
                        out.places.insert(file, out.entries.len() - 1);
                        out.entries.len() - 1
                    }
                },
            };
            out.tensors.push((tensor, place));
        }
        Ok(())
    }
}

/// A string, borrowed from the text where it has no escapes.
struct Text<'t>(Cow<'t, str>);

impl<'de> de::Deserialize<'de> for Text<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;

        impl<'de> Visitor<'de> for TextVisitor {
            type Value = Text<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }
        }

        deserializer.deserialize_str(TextVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_paths_only_go_down() {
        for (entry, path) in [
            ("a.safetensors", Some("a.safetensors")),
            ("./a", Some("a")),
            ("sub/./a", Some("sub/a")),
            ("sub//a", Some("sub/a")),
            ("..a", Some("..a")),
            ("a..", Some("a..")),
            ("...", Some("...")),
            ("", None),
            (".", None),
            ("/", None),
            ("/etc/passwd", None),
            ("//a", None),
            ("..", None),
            ("../a", None),
            ("sub/../a", None),
            ("sub/../../a", None),
            ("./../a", None),
            ("sub/..", None),
            ("..\\a", None),
            ("C:\\a", None),
            ("a\0b", None),
        ] {
            assert_eq!(plain_path(entry), path.map(PathBuf::from), "{entry:?}");
        }
    }

    #[test]
    fn files_are_sorted_and_counted_once() {
        let json = br#"{"weight_map": {"x": "b", "y": "./a", "z": "b", "w": "a"}, "other": [1]}"#;
        let index = Index::parse(json, Path::new("i")).unwrap();
        assert_eq!(index.files, [("a".into(), "y".to_owned()), ("b".into(), "x".to_owned())]);
        let tensors: Vec<_> = index.tensors().collect();
        assert_eq!(tensors, [("x", 1), ("y", 0), ("z", 1), ("w", 0)]);
    }
}
