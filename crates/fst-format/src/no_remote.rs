//! Stands in for `remote.rs` where the feature `object-store` is off: URLs are refused.

use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::Error;
use crate::folder::Choice;

/// An object, of which there are none.
#[derive(Clone, Debug)]
pub(crate) enum Object {}

/// A folder of copies, of which there are none.
#[derive(Clone, Debug)]
pub(crate) enum Cache {}

impl Object {
    pub(crate) fn len(&self) -> u64 {
        match *self {}
    }

    pub(crate) fn is_same(&self, _other: &Self) -> bool {
        match *self {}
    }

    pub(crate) fn is_same_version(&self, _other: &Self) -> bool {
        match *self {}
    }
}

fn refusal(path: &Path) -> Error {
    Error::NoObjectStore { url: path.to_owned() }
}

pub(crate) fn open(path: &Path) -> Result<(Object, Vec<u8>), Error> {
    Err(refusal(path))
}

pub(crate) fn find(cache: &Cache, _: &Object) -> Option<PathBuf> {
    match *cache {}
}

pub(crate) fn copy(_: &mut Object, cache: &Cache, _: &[u8]) {
    match *cache {}
}

pub(crate) fn read_onto(object: &Object, _: &mut Vec<u8>, _: Range<u64>) -> Result<(), Error> {
    match *object {}
}

pub(crate) fn read_index(path: &Path) -> Result<Vec<u8>, Error> {
    Err(refusal(path))
}

pub(crate) fn offline(_: &Path) -> Result<Option<PathBuf>, Error> {
    Ok(None)
}

pub(crate) fn choose(url: &Path) -> Result<Choice, Error> {
    Err(refusal(url))
}

pub(crate) fn is_missing(_: &Error) -> bool {
    false
}
