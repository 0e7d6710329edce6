//! Loads by several ranks on one device, held to the same in host memory: ranks of this process, and
//! NCCL with one rank.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use fst::dist::{GroupError, local_groups, nccl_group};
use fst::{
    Checkpoint, Checksum, Device, DistError, Error, Group, Loader, LocalGroup, Preset, Tensor,
};

/// Ranks that share the device.
const WORLD: u32 = 4;

/// What a rank keeps.
type Sums = Vec<Checksum>;

/// Loads the checkpoint in `path` by ranks on device 0 and compares SHA-256 sums of all shards.
///
/// # Errors
/// A load that fails, or a shard that differs.
pub fn check(path: &std::path::Path) -> Result<()> {
    let device = Device::cuda(0)?;
    let checkpoint = Checkpoint::open(path)?;
    let names = checkpoint.tensors().iter().map(|tensor| tensor.name());
    let preset = Preset::detect(names).context("no preset fits the names of the tensors")?;
    let loader = Loader::new().preset(preset);

    let host = load(LocalGroup::host(WORLD), &loader, &checkpoint)?;
    let on_device = loader.clone().device(device.clone());
    let groups = local_groups(&vec![device.clone(); WORLD as usize])?;
    compare(&load(groups, &on_device, &checkpoint)?, &host)?;
    println!("{WORLD} ranks on {device}: the sums agree");

    let group = match nccl_group(&device) {
        Ok(group) => group,
        Err(Error::Dist(DistError::Group(error @ GroupError::Library { .. }))) => {
            println!("SKIPPED: NCCL: {error}");
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    let version = group.nccl().version()?;
    let alone = load(LocalGroup::host(1), &loader, &checkpoint)?;
    let sums = vec![load_one(Arc::new(group), &on_device, &checkpoint)?];
    compare(&sums, &alone)?;
    println!("a rank over NCCL {version} on {device}: the sums agree");
    Ok(())
}

/// Each rank loads on a thread of its own.
fn load(groups: Vec<LocalGroup>, loader: &Loader, checkpoint: &Checkpoint) -> Result<Vec<Sums>> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = groups
            .into_iter()
            .map(|group| scope.spawn(move || load_one(Arc::new(group), loader, checkpoint)))
            .collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, Result<Sums>>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().map(join).collect()
    })
}

fn load_one(group: Arc<dyn Group>, loader: &Loader, checkpoint: &Checkpoint) -> Result<Sums> {
    let tensors = loader.clone().group(group).load(checkpoint)?;
    Ok(tensors.iter().map(Tensor::checksum).collect::<Result<_, _>>()?)
}

fn compare(found: &[Sums], expected: &[Sums]) -> Result<()> {
    for (rank, (found, expected)) in found.iter().zip(expected).enumerate() {
        ensure!(found.len() == expected.len(), "rank {rank} keeps {} tensors", found.len());
        for (found, expected) in found.iter().zip(expected) {
            ensure!(found == expected, "rank {rank}: {found:?}, on the host {expected:?}");
        }
    }
    Ok(())
}
