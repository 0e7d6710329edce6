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

/// Files relative to the index, sorted, each with the first tensor that the map puts there.
type Files = Vec<(PathBuf, String)>;

/// A checked weight map.
#[derive(Debug)]
pub(crate) struct Index {
    pub(crate) files: Files,
    /// The names of all tensors, for tens of thousands of strings of their own would take longer to make
    /// than to look up.
    names: String,
    /// The tensors, in the order of the text, with their places in `files`.
    tensors: Vec<Named>,
}

/// A tensor of a weight map.
#[derive(Clone, Copy, Debug)]
struct Named {
    /// Start of its name in the text of names, and the length.
    start: u32,
    len: u32,
    /// Place of its file.
    file: u32,
}

impl Named {
    fn name<'n>(&self, names: &'n str) -> &'n str {
        let start = self.start as usize;
        names.get(start..start + self.len as usize).unwrap_or_default()
    }
}

impl Index {
    /// Tensors with their place in `files`, in the order of the text. A name may be there twice.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (&str, usize)> {
        self.tensors.iter().map(|tensor| (tensor.name(&self.names), tensor.file as usize))
    }

    /// Parses the contents of the index at `path`, which is used for messages only.
    pub(crate) fn parse(bytes: Vec<u8>, path: &Path) -> Result<Index, Error> {
        let text = String::from_utf8(bytes).map_err(|error| Error::IndexNotUtf8 {
            index: path.to_owned(),
            offset: error.utf8_error().valid_up_to() as u64,
        })?;
        // A byte order mark is no part of the text.
        let text = with_json_numbers(text.strip_prefix('\u{feff}').unwrap_or(&text));
        let mut map = WeightMap::default();
        let mut json = serde_json::Deserializer::from_str(&text);
        let read = json.deserialize_map(TopLevel(&mut map)).and_then(|()| json.end());
        read.map_err(|error| {
            let source = JsonError::new(error);
            let offset = source.offset_in(&text);
            Error::IndexJson { index: path.to_owned(), offset, source }
        })?;
        let WeightMap { names, mut tensors, files } = map;
        let (files, places) = resolve(&names, &tensors, &files.entries, path)?;
        for tensor in &mut tensors {
            tensor.file = places[tensor.file as usize];
        }
        Ok(Index { files, names, tensors })
    }
}

/// The text with a number for each `NaN` and `Infinity` outside of strings, which Python writes though JSON
/// has none. Nothing else moves.
fn with_json_numbers(text: &str) -> Cow<'_, str> {
    const NUMBERS: [(&str, &str); 2] = [("NaN", "0  "), ("Infinity", "0       ")];
    if !NUMBERS.iter().any(|(word, _)| text.contains(word)) {
        return Cow::Borrowed(text);
    }
    let mut json = String::with_capacity(text.len());
    // Every other part is within quotes; an escaped quote ends none.
    let (mut in_string, mut rest) = (false, text);
    while !rest.is_empty() {
        let mut escaped = false;
        let quote = rest.bytes().position(|byte| {
            let is_end = byte == b'"' && !escaped;
            escaped = in_string && byte == b'\\' && !escaped;
            is_end
        });
        let (part, after) = rest.split_at(quote.map_or(rest.len(), |at| at + 1));
        match in_string {
            true => json.push_str(part),
            false => json += &NUMBERS.iter().fold(part.to_owned(), |p, (a, b)| p.replace(a, b)),
        }
        (in_string, rest) = (!in_string, after);
    }
    Cow::Owned(json)
}

/// The key of the map.
const WEIGHT_MAP: &str = "weight_map";

/// The files as the map has them, each once.
#[derive(Default)]
struct FileEntries<'t> {
    entries: Vec<Cow<'t, str>>,
    places: BTreeMap<Cow<'t, str>, u32>,
    /// The one that was asked for last.
    last: u32,
}

impl<'t> FileEntries<'t> {
    /// The place of this entry in `entries`, where it is put if it is new.
    fn place(&mut self, entry: Cow<'t, str>) -> u32 {
        if self.entries.get(self.last as usize) != Some(&entry) {
            let new = self.entries.len() as u32;
            self.last = match self.places.get(&entry) {
                Some(&place) => place,
                None => {
                    self.entries.push(entry.clone());
                    self.places.insert(entry, new);
                    new
                }
            };
        }
        self.last
    }
}

/// The map as written: tensors with the place of their entry in `files`.
#[derive(Default)]
struct WeightMap<'t> {
    names: String,
    tensors: Vec<Named>,
    files: FileEntries<'t>,
}

/// The files of the entries, and for each entry its place among them.
fn resolve(
    names: &str,
    tensors: &[Named],
    entries: &[Cow<'_, str>],
    index: &Path,
) -> Result<(Files, Vec<u32>), Error> {
    let index = || index.to_owned();
    if tensors.is_empty() {
        return Err(Error::EmptyIndex { index: index() });
    }
    let mut first_tensor = vec![None; entries.len()];
    for tensor in tensors {
        first_tensor[tensor.file as usize].get_or_insert(tensor);
    }
    // Entries such as `a` and `./a` are one file.
    let mut files: BTreeMap<PathBuf, String> = BTreeMap::new();
    let mut paths = Vec::with_capacity(entries.len());
    for (entry, tensor) in entries.iter().zip(first_tensor) {
        let tensor = || tensor.map_or("", |tensor| tensor.name(names)).to_owned();
        let file = plain_path(entry).ok_or_else(|| Error::OutsideFolder {
            index: index(),
            tensor: tensor(),
            entry: entry.clone().into_owned(),
        })?;
        files.entry(file.clone()).or_insert_with(tensor);
        paths.push(file);
    }
    let order: BTreeMap<&Path, u32> =
        (0..).zip(files.keys()).map(|(i, file)| (file.as_path(), i)).collect();
    let places = paths.iter().map(|file| order.get(file.as_path()).copied().unwrap_or(0)).collect();
    Ok((files.into_iter().collect(), places))
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
            if key == WEIGHT_MAP {
                if std::mem::replace(&mut seen, true) {
                    return Err(de::Error::duplicate_field(WEIGHT_MAP));
                }
                map.next_value_seed(Weights(self.0))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        if seen { Ok(()) } else { Err(de::Error::missing_field(WEIGHT_MAP)) }
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
            let file = out.files.place(file);
            let (start, len) = (out.names.len() as u32, tensor.len() as u32);
            out.names.push_str(&tensor);
            out.tensors.push(Named { start, len, file });
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
    fn numbers_that_json_lacks_do_no_harm() {
        let text = r#"{"a": [NaN, -Infinity], "N\"aN NaN": "Infinity\\", "b": NaN}"#;
        let json = with_json_numbers(text);
        assert_eq!(json, r#"{"a": [0  , -0       ], "N\"aN NaN": "Infinity\\", "b": 0  }"#);
        let json = br#"{"metadata": {"total_size": NaN}, "weight_map": {"NaN": "b"}}"#;
        let index = Index::parse(json.to_vec(), Path::new("i")).unwrap();
        assert_eq!(index.tensors().collect::<Vec<_>>(), [("NaN", 0)]);
    }

    #[test]
    fn files_are_sorted_and_counted_once() {
        let json = br#"{"weight_map": {"x": "b", "y": "./a", "z": "b", "w": "a"}, "other": [1]}"#;
        let escaped = br#"{"weight_map": {"\u0078": "b", "y": ".\/a", "z": "b", "w": "a"}}"#;
        for json in [&json[..], escaped] {
            let index = Index::parse(json.to_vec(), Path::new("i")).unwrap();
            assert_eq!(index.files, [("a".into(), "y".to_owned()), ("b".into(), "x".to_owned())]);
            let tensors: Vec<_> = index.tensors().collect();
            assert_eq!(tensors, [("x", 1), ("y", 0), ("z", 1), ("w", 0)]);
        }
    }
}
