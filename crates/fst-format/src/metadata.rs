//! The metadata of a file: text by key, in one piece.
//!
//! A header of 100 MB may consist of metadata alone, of very short keys. A map of strings needs some 80
//! bytes for each entry; this needs 16 besides its text.

use std::fmt;
use std::sync::Arc;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, MapAccess, Visitor};
use serde::ser::{Serialize, Serializer};

/// The `__metadata__` of a file or of a checkpoint: values by key, both text, sorted by key. Cheap to
/// clone.
#[derive(Clone, Default)]
pub struct Metadata {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    /// Each key, and its value behind it.
    text: String,
    /// Sorted by key.
    entries: Vec<Entry>,
}

/// Lengths fit, for a header has at most 100 MB; a checkpoint's text may be longer than that.
#[derive(Clone, Copy)]
struct Entry {
    start: usize,
    key_len: u32,
    value_len: u32,
}

impl Inner {
    fn entry(&self, entry: Entry) -> (&str, &str) {
        let value = entry.start + entry.key_len as usize;
        (&self.text[entry.start..value], &self.text[value..value + entry.value_len as usize])
    }

    /// Sorts by key. Of several values for one key, the one added last stays.
    fn finish(mut self) -> Metadata {
        let mut entries = std::mem::take(&mut self.entries);
        let key = |entry: &Entry| self.entry(*entry).0;
        if !entries.is_sorted_by(|a, b| key(a) < key(b)) {
            entries.sort_by(|a, b| key(a).cmp(key(b)));
            // Of neighbours the first is kept: give it what the second has.
            entries.dedup_by(|second, first| {
                let same = key(first) == key(second);
                if same {
                    *first = *second;
                }
                same
            });
        }
        self.text.shrink_to_fit();
        entries.shrink_to_fit();
        self.entries = entries;
        Metadata { inner: Arc::new(self) }
    }
}

impl Metadata {
    /// The metadata of several files together; of two values for one key, the earlier file's.
    pub(crate) fn merged<'m>(files: impl IntoIterator<Item = &'m Metadata>) -> Metadata {
        let mut files: Vec<&Metadata> =
            files.into_iter().filter(|metadata| !metadata.is_empty()).collect();
        let Some((first, others)) = files.split_first() else { return Metadata::default() };
        // As a rule, all files of a checkpoint say the same.
        if others.iter().flat_map(|file| file.iter()).all(|(key, _)| first.get(key).is_some()) {
            return (*first).clone();
        }
        // What is added last stays.
        files.reverse();
        let mut inner = Inner::default();
        for (key, value) in files.into_iter().flat_map(Metadata::iter) {
            let start = inner.text.len();
            inner.text.extend([key, value]);
            let (key_len, value_len) = (key.len() as u32, value.len() as u32);
            inner.entries.push(Entry { start, key_len, value_len });
        }
        inner.finish()
    }

    /// The value of `key`.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        let inner = &*self.inner;
        let at = inner.entries.binary_search_by(|entry| inner.entry(*entry).0.cmp(key)).ok()?;
        Some(inner.entry(inner.entries[at]).1)
    }

    /// Keys and values, sorted by key.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &str)> + Clone {
        self.inner.entries.iter().map(|entry| self.inner.entry(*entry))
    }

    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.inner.entries.len()
    }

    /// Whether there is no entry.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl PartialEq for Metadata {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl Eq for Metadata {}

impl fmt::Debug for Metadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl Serialize for Metadata {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = Inner;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Inner, A::Error> {
                let mut inner = Inner::default();
                let mut start = 0;
                while let Some(()) = map.next_key_seed(Append(&mut inner.text))? {
                    let value = inner.text.len();
                    map.next_value_seed(Append(&mut inner.text))?;
                    let lengths = (value - start, inner.text.len() - value);
                    let (Ok(key_len), Ok(value_len)) = (lengths.0.try_into(), lengths.1.try_into())
                    else {
                        return Err(serde::de::Error::custom("text of 4 GiB or more"));
                    };
                    inner.entries.push(Entry { start, key_len, value_len });
                    start = inner.text.len();
                }
                Ok(inner)
            }
        }

        deserializer.deserialize_map(Entries).map(Inner::finish)
    }
}

/// Adds a string to a text.
struct Append<'t>(&'t mut String);

impl<'de> DeserializeSeed<'de> for Append<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Append<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        self.0.push_str(text);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn parsed(json: &str) -> Metadata {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn it_is_what_a_map_of_strings_is() {
        for json in [
            "{}",
            r#"{"":""}"#,
            r#"{"b":"2","a":"1","c":""}"#,
            r#"{"b":"2","a":"1","b":"3","b":"4","a":""}"#,
            r#"{"\u00e9\n":"\"","ab":"c","a":"bc"}"#,
        ] {
            let (map, own) = (serde_json::from_str::<BTreeMap<String, String>>(json), parsed(json));
            let map = map.unwrap();
            assert!(own.iter().eq(map.iter().map(|(k, v)| (k.as_str(), v.as_str()))), "{json}");
            assert_eq!(own.len(), map.len());
            assert!(map.iter().all(|(key, value)| own.get(key) == Some(value)));
            assert_eq!(own.get("no such key"), None);
            assert_eq!(serde_json::to_string(&own).unwrap(), serde_json::to_string(&map).unwrap());
            assert_eq!(format!("{own:?}"), format!("{map:?}"));
        }
        for json in [r#"{"a":1}"#, "[]", r#"{"a":null}"#, r#"{1:""}"#, r#"{"a"}"#] {
            let map = serde_json::from_str::<BTreeMap<String, String>>(json).unwrap_err();
            let own = serde_json::from_str::<Metadata>(json).unwrap_err();
            assert_eq!(own.to_string(), map.to_string());
        }
    }

    #[test]
    fn of_several_files_the_earlier_one_counts() {
        let files =
            [r#"{"a":"1"}"#, "{}", r#"{"a":"2","b":"3"}"#, r#"{"b":"4","c":"5"}"#].map(parsed);
        assert_eq!(Metadata::merged(&files), parsed(r#"{"a":"1","b":"3","c":"5"}"#));
        // Nothing is added to the first: it is shared, not copied.
        let same = Metadata::merged(&files[..2]);
        assert!(Arc::ptr_eq(&same.inner, &files[0].inner));
        assert!(Metadata::merged(&[]).is_empty());
    }
}
