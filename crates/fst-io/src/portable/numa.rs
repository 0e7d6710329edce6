//! No binding of threads to the processors near storage.

use std::collections::BTreeSet;

use crate::file::SourceFile;

/// The processors of the node that the files' storage hangs on: not known.
pub(crate) fn processors_near<'a>(
    _: impl Iterator<Item = &'a SourceFile> + Clone,
) -> Option<BTreeSet<usize>> {
    None
}

/// Keeps the calling thread on some processors: never here.
#[derive(Debug)]
pub(crate) struct Bound;

impl Bound {
    /// `None`: the thread may run anywhere.
    pub(crate) fn to(_: &BTreeSet<usize>) -> Option<Self> {
        None
    }
}
