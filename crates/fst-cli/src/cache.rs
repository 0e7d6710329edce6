//! The local folder of copies that `--cache` names.

use std::path::PathBuf;
use std::sync::OnceLock;

use clap::Args;
use fst::{Cache, OpenOptions};

use crate::text;

/// Where copies of what is read by URL are kept.
#[derive(Debug, Args)]
pub(crate) struct CacheArgs {
    /// Keep copies of shards that are read whole by URL in this folder, and read those that it has
    #[arg(long = "cache", value_name = "DIR")]
    folder: Option<PathBuf>,
    /// Bytes that the cache holds at most, about: what was not used for the longest time goes first
    /// [default: no bound]
    #[arg(long = "cache-size", value_name = "BYTES", requires = "folder")]
    bytes: Option<u64>,
}

/// The cache of the process, once it is asked for.
static CACHE: OnceLock<Cache> = OnceLock::new();

impl CacheArgs {
    /// The options, with the cache if one is asked for.
    pub(crate) fn apply(&self, options: OpenOptions) -> OpenOptions {
        let Some(folder) = &self.folder else { return options };
        options.cache(CACHE.get_or_init(|| Cache::new(folder, self.bytes.unwrap_or(u64::MAX))))
    }
}

/// Waits until copies are written, and warns of those that were not.
pub(crate) fn finish() {
    if let Some(cache) = CACHE.get() {
        for copy in &cache.wait().given_up {
            text::warn(&format!("not kept in the cache: {copy}"));
        }
    }
}
