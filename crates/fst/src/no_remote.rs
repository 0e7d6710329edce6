//! Stands in for `remote.rs` where the feature `object-store` is off.

use std::io;

use fst_format::{Checkpoint, Shard};
use fst_io::{Error, SourceFile};

use crate::report::LoadReport;

/// Refuses a shard that is no local file.
pub(crate) fn source(shard: &Shard) -> Result<SourceFile, Error> {
    let (path, source) = (shard.path().to_owned(), io::ErrorKind::Unsupported.into());
    Err(Error::Open { path, source })
}

/// There is nothing to say.
pub(crate) fn loaded(_: &Checkpoint, _: &mut LoadReport) {}
