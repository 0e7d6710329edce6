//! Four ranks of one process, each a thread: with the reading shared, and each for itself.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, anyhow};
use fst::{Checkpoint, Loader, LocalGroup, Shard, Tensors};

use super::{Loaded, RANKS, Visit, is_split};

/// What each rank has.
struct Ranks {
    ranks: Vec<Tensors>,
    /// Whether the tensors are whole, and ranks see only their part of those that are split.
    whole: bool,
}

impl Ranks {
    fn for_each_part(&self, mut visit: impl FnMut(String, Vec<usize>, &[u8])) -> Result<()> {
        for (rank, tensors) in self.ranks.iter().enumerate() {
            for tensor in tensors {
                let (mut shape, mut bytes) = (tensor.shape().to_vec(), tensor.bytes()?);
                if self.whole && is_split(&shape) {
                    let part = bytes.len() / RANKS as usize;
                    bytes = &bytes[rank * part..(rank + 1) * part];
                    shape[0] /= RANKS as usize;
                }
                visit(format!("{rank} {}", tensor.name()), shape, bytes);
            }
        }
        Ok(())
    }
}

impl Loaded for Ranks {
    fn bytes(&self) -> u64 {
        let mut bytes = 0;
        let count = self.for_each_part(|_, _, part| bytes += part.len() as u64);
        // Host tensors have bytes.
        count.map_or(0, |()| bytes)
    }

    fn for_each(&self, visit: &mut Visit<'_>) -> Result<()> {
        self.for_each_part(|name, shape, bytes| visit(&name, &shape, bytes))
    }
}

fn on_threads(loaders: Vec<Loader>, folder: &Path) -> Result<Vec<Tensors>> {
    let checkpoint = Checkpoint::open(folder)?;
    std::thread::scope(|scope| {
        let load = |loader: Loader| {
            let checkpoint = &checkpoint;
            scope.spawn(move || loader.load(checkpoint))
        };
        let threads: Vec<_> = loaders.into_iter().map(load).collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined.map(|rank| Ok(rank.map_err(|_| anyhow!("a rank panicked"))??)).collect()
    })
}

/// What one rank reads reaches the others.
pub(super) fn shared(folder: &Path) -> Result<Box<dyn Loaded>> {
    let loader = |group| {
        Loader::new().group(Arc::new(group)).shard(|tensor| {
            if is_split(tensor.shape()) { Shard::split(0) } else { Shard::replicate() }
        })
    };
    let loaders = LocalGroup::host(RANKS as u32).into_iter().map(loader).collect();
    Ok(Box::new(Ranks { ranks: on_threads(loaders, folder)?, whole: false }))
}

/// Every rank reads all files.
pub(super) fn everyone(folder: &Path) -> Result<Box<dyn Loaded>> {
    let loaders = (0..RANKS).map(|_| Loader::new()).collect();
    Ok(Box::new(Ranks { ranks: on_threads(loaders, folder)?, whole: true }))
}
