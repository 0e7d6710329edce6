//! Checkpoints whose files are objects of a store, or lie on the hub or a web server.

use std::ops::Range;
use std::path::{Path, PathBuf};

use fst_object::{Cause, Settings};

use crate::folder::{self, Choice};
use crate::index::MAX_INDEX_LEN;
use crate::{Error, hub};

pub(crate) use fst_object::{Cache, Object};

/// Bytes that are asked for with the first request: most headers are shorter.
const HEAD: u64 = 256 << 10;

const HUB: &str = "hf://";

const NEVER: &dyn Fn() -> bool = &|| false;

/// Finds an object, and the first of its bytes.
pub(crate) fn open(path: &Path) -> Result<(Object, Vec<u8>), Error> {
    Ok(Object::open(&path.to_string_lossy(), HEAD, &Settings::default(), NEVER)?)
}

/// The copy of an object.
pub(crate) fn find(cache: &Cache, object: &Object) -> Option<PathBuf> {
    cache.find(object)
}

/// Has the bytes of an object copied into the cache as they are read.
pub(crate) fn copy(object: &mut Object, cache: &Cache, head: &[u8]) {
    object.copy_to(cache, head);
}

/// Appends the bytes of `range` of an object, which starts where `bytes` ends.
pub(crate) fn read_onto(
    object: &Object,
    bytes: &mut Vec<u8>,
    range: Range<u64>,
) -> Result<(), Error> {
    Ok(object.read(range, &mut |part| bytes.extend_from_slice(part), NEVER)?)
}

pub(crate) fn read_index(path: &Path) -> Result<Vec<u8>, Error> {
    let (object, mut bytes) = open(path)?;
    let len = object.len();
    if len > MAX_INDEX_LEN {
        return Err(Error::IndexTooLarge { index: path.to_owned(), len, max: MAX_INDEX_LEN });
    }
    let have = bytes.len() as u64;
    read_onto(&object, &mut bytes, have..len)?;
    Ok(bytes)
}

/// Where a URL leads on this machine, as one of the hub does if the hub is not to be asked.
pub(crate) fn offline(url: &Path) -> Result<Option<PathBuf>, Error> {
    let of_hub = url.to_str().and_then(|url| url.strip_prefix(HUB)).filter(|_| hub::is_offline());
    of_hub.map(|of_hub| hub::cached(of_hub, url)).transpose()
}

/// What a URL stands for: a file or an index by its name, or else a folder.
pub(crate) fn choose(url: &Path) -> Result<Choice, Error> {
    let text = url.to_string_lossy();
    if !text.starts_with(HUB) {
        return choose_at(&text, None);
    }
    // A revision may be another commit a moment later.
    match fst_object::list(&text, &Settings::default(), NEVER)? {
        Some(listing) => choose_at(&listing.url, Some(listing.names)),
        None => choose_at(&text, None),
    }
}

/// As [`choose`], of a URL whose listing may be known.
fn choose_at(text: &str, listed: Option<Vec<String>>) -> Result<Choice, Error> {
    let name = text.rsplit('/').next().unwrap_or_default();
    let itself = || Choice::Files(vec![text.into()]);
    if folder::is_index(name) {
        return Ok(Choice::Index(text.into()));
    }
    if name.ends_with(".safetensors") {
        return Ok(itself());
    }
    let folder = PathBuf::from(text.trim_end_matches('/'));
    let listed = match listed {
        Some(names) => Some(names),
        None => fst_object::list(text, &Settings::default(), NEVER)?.map(|listing| listing.names),
    };
    match listed {
        // What holds nothing is no folder.
        Some(names) if names.is_empty() && !name.is_empty() => Ok(itself()),
        Some(names) => {
            let mut names: Vec<_> = names.into_iter().map(Into::into).collect();
            names.sort_unstable();
            folder::choose_by_names(&folder, names)
        }
        None => probe(&folder, !name.is_empty(), Path::new(text)),
    }
}

/// Looks for a folder's checkpoint where nobody lists its files.
fn probe(folder: &Path, may_be_file: bool, url: &Path) -> Result<Choice, Error> {
    let is_there = |path: &Path| match open(path) {
        Ok(_) => Ok(true),
        Err(error) if is_missing(&error) => Ok(false),
        Err(error) => Err(error),
    };
    let single = folder.join("model.safetensors");
    if is_there(&single)? {
        return Ok(Choice::Files(vec![single]));
    }
    let index = folder.join("model.safetensors.index.json");
    if is_there(&index)? {
        return Ok(Choice::Index(index));
    }
    if may_be_file && is_there(url)? {
        return Ok(Choice::Files(vec![url.to_owned()]));
    }
    Err(Error::NoCheckpoint { folder: folder.to_owned(), others: Vec::new() })
}

/// Whether an error says that there is no such object.
pub(crate) fn is_missing(error: &Error) -> bool {
    matches!(error, Error::Object(error) if matches!(error.cause, Cause::NotFound))
}
