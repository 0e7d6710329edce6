//! Shards that are objects, as sources of bytes.

use std::io;
use std::path::Path;
use std::sync::Arc;

use fst_format::{Checkpoint, Shard};
use fst_io::source::{Source, Unfilled};
use fst_io::{Change, Error, SourceFile};
use fst_object::{Cause, Difference, Object};

use crate::report::LoadReport;

/// A shard that is no local file.
pub(crate) fn source(shard: &Shard) -> Result<SourceFile, Error> {
    match shard.object() {
        Some(object) => Ok(SourceFile::remote(Arc::new(ObjectSource(object.clone())))),
        None => {
            let (path, source) = (shard.path().to_owned(), io::ErrorKind::Unsupported.into());
            Err(Error::Open { path, source })
        }
    }
}

/// A load of the checkpoint succeeded: copies of shards that were read whole are kept, and the report says
/// what the requests came to.
pub(crate) fn loaded(checkpoint: &Checkpoint, report: &mut LoadReport) {
    let mut first_byte = Vec::new();
    for object in checkpoint.shards().iter().filter_map(Shard::object) {
        object.keep_copy();
        let counters = object.counters();
        let all = report.remote.get_or_insert_default();
        all.requests += counters.requests;
        all.retries += counters.retries;
        all.throttled += counters.throttled;
        all.received_bytes += counters.received;
        all.repeated_bytes += counters.again;
        all.endpoints.push(object.endpoint().to_owned());
        first_byte.extend(counters.first_byte);
    }
    if let Some(all) = &mut report.remote {
        all.endpoints.sort_unstable();
        all.endpoints.dedup();
        first_byte.sort_unstable();
        let of_hundred = |part: usize| {
            let at = (first_byte.len() * part).div_ceil(100).saturating_sub(1);
            first_byte.get(at).copied().unwrap_or_default()
        };
        (all.first_byte_p50, all.first_byte_p99) = (of_hundred(50), of_hundred(99));
    }
}

#[derive(Debug)]
struct ObjectSource(Object);

impl Source for ObjectSource {
    fn path(&self) -> &Path {
        Path::new(self.0.url())
    }

    fn len(&self) -> u64 {
        self.0.len()
    }

    fn read(&self, offset: u64, into: &mut Unfilled<'_>) -> Result<(), Error> {
        let len = into.missing() as u64;
        let cancelled = into.cancelled();
        let take = &mut |bytes: &[u8]| into.append(bytes);
        let read = self.0.read(offset..offset + len, take, cancelled);
        read.map_err(|error| self.error(error.cause, error.offset.unwrap_or(offset), offset + len))
    }

    fn verify_unchanged(&self) -> Result<(), Error> {
        let verified = self.0.verify(&|| false);
        verified.map_err(|error| match error.cause {
            Cause::Changed(_) => self.error(error.cause, 0, 0),
            cause => Error::Open { path: self.path().to_owned(), source: io::Error::other(cause) },
        })
    }

    fn identity(&self) -> Vec<u8> {
        let identity = self.0.identity();
        let parts = [identity.etag.as_deref(), identity.version.as_deref()];
        let mut bytes: Vec<u8> =
            parts.into_iter().flatten().flat_map(|p| p.bytes().chain([0])).collect();
        bytes.extend(identity.modified.unwrap_or_default().to_le_bytes());
        bytes
    }
}

impl ObjectSource {
    fn error(&self, cause: Cause, offset: u64, end: u64) -> Error {
        let path = self.path().to_owned();
        let change = match cause {
            Cause::Cancelled => return Error::Cancelled,
            Cause::Changed(Difference::Length { was, now }) => Change::Length { was, now },
            Cause::Changed(_) => Change::Version,
            cause => {
                let (len, source) = (end.saturating_sub(offset), io::Error::other(cause));
                return Error::Read { path, offset, len, source };
            }
        };
        Error::Changed { path, change }
    }
}
