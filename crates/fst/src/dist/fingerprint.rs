//! What tells two checkpoints of the same layout apart: lengths of files, and a sample of bytes.

use std::os::unix::fs::FileExt;

use fst_format::Checkpoint;

use crate::error::{Error, Result};
use crate::host::{locate, open_shard, shards_of};
use crate::options::Item;

/// Places that are sampled, over all files: a few milliseconds of cold reads.
const SAMPLES: usize = 32;
/// Bytes at each place.
const SAMPLE: usize = 64;

/// The types of the elements, and for each file its length and bytes from places spread over it.
///
/// Names and times of files are left out: nodes may have copies of their own. `alive` is called for each
/// file. Files are open one at a time: most are others' to read.
pub(super) fn of(checkpoint: &Checkpoint, items: &[Item], alive: &dyn Fn()) -> Result<Vec<u8>> {
    let mut fingerprint = Vec::new();
    for item in items {
        fingerprint.extend_from_slice(item.info.dtype().as_str().as_bytes());
        fingerprint.push(0);
    }
    let mut shards: Vec<usize> = shards_of(items).collect();
    shards.sort_unstable();
    shards.dedup();
    let places = (SAMPLES / shards.len().max(1)).max(1) as u64;
    for shard in shards {
        alive();
        let file = open_shard(checkpoint, items, shard)?;
        fingerprint.extend_from_slice(&file.len().to_le_bytes());
        for place in 0..places {
            // The last one ends with the file: tensors at the front may be shared by versions.
            let last = file.len().saturating_sub(SAMPLE as u64);
            let at = (u128::from(last) * u128::from(place + 1) / u128::from(places)) as u64;
            let mut sample = [0; SAMPLE];
            let len = file.len().min(SAMPLE as u64) as usize;
            file.buffered().read_exact_at(&mut sample[..len], at).map_err(|source| {
                let (path, len) = (file.path().to_owned(), len as u64);
                locate(fst_io::Error::Read { path, offset: at, len, source }, items)
            })?;
            fingerprint.extend_from_slice(&sample);
        }
    }
    Ok::<_, Error>(fingerprint)
}
