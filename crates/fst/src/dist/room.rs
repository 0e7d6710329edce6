//! Whether the ranks that share a device, or a host's memory, have room there together: asked before any of them reserves
//! memory there or reads a byte.

use std::hash::{DefaultHasher, Hash, Hasher};

use fst_dist::{Group, RankPlan};
use fst_gpu::CudaDevice;
use serde::{Deserialize, Serialize};

use super::DistError;
use crate::available::{AvailableMemory, MemoryLimit};
use crate::device::Device;
use crate::error::{DeviceError, Error, Result};
use crate::loader::ARENA;
use crate::options::Item;

/// What a rank needs of the device that it loads to; it travels between ranks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Claim {
    /// The device, told from those of other machines too.
    uuid: [u8; 16],
    /// The most bytes that the rank uses at a time.
    needed: u64,
    /// Bytes free before any rank of the group has reserved some.
    free: u64,
    /// Name and bytes of the rank's largest tensor.
    largest: (String, u64),
}

/// Bytes of host memory that a rank fills: its shards as they arrive or as they are converted, an arena
/// at a time, and its staging memory.
pub(super) fn needed(view: &RankPlan<'_>, items: &[Item]) -> u64 {
    let (mut arrived, mut made, mut moved) = (0u64, 0u64, 0u64);
    for output in view.outputs() {
        let item = output.tensors.first().and_then(|&tensor| items.get(tensor as usize));
        let bits =
            item.filter(|item| item.dtype != item.info.dtype()).map(|item| item.dtype.bits());
        let converted = bits.map(|bits| {
            let elements = output.shape.iter().fold(1, |all: u64, dim| all.saturating_mul(*dim));
            elements.saturating_mul(u64::from(bits)) / 8
        });
        moved = moved.max(converted.map_or(0, |_| output.bytes.max(ARENA)));
        arrived = arrived.saturating_add(output.bytes);
        made = made.saturating_add(converted.unwrap_or(output.bytes));
    }
    let beside = moved.min(arrived).saturating_add(view.staging_bytes());
    arrived.max(made).saturating_add(beside)
}

/// Tells the other ranks that this one needs `needed` bytes of host memory, and refuses, if `check` says
/// so, where there is no room for all that share it: those of one machine and control group.
pub(super) fn claim_host(group: &dyn Group, check: bool, needed: u64) -> Result<()> {
    let own = AvailableMemory::now();
    let free = own.as_ref().filter(|_| check).map_or(u64::MAX, |own| own.bytes);
    let uuid = host(own.as_ref().is_some_and(|own| own.limit == MemoryLimit::AddressSpace));
    let claim = Claim { uuid, needed, free, largest: Default::default() };
    let claims = gather(group, Some(&claim))?;
    match (crowd(&claims, &claim), own) {
        (Some(Crowd { needed, free, .. }), Some(own)) if check => {
            Err(Error::Memory { needed, available: free, limit: own.limit })
        }
        _ => Ok(()),
    }
}

/// What processes have in common that share memory: the machine and the control group. With `alone`,
/// this process only.
fn host(alone: bool) -> [u8; 16] {
    let read = |path: &str| std::fs::read(path).unwrap_or_default();
    let mut hasher = DefaultHasher::new();
    // The same until the machine starts anew (`random(4)`).
    read("/proc/sys/kernel/random/boot_id").hash(&mut hasher);
    let machine = hasher.finish();
    std::fs::read_link("/proc/self/ns/cgroup").ok().hash(&mut hasher);
    read("/proc/self/cgroup").hash(&mut hasher);
    alone.then(std::process::id).hash(&mut hasher);
    (u128::from(machine) << 64 | u128::from(hasher.finish())).to_le_bytes()
}

/// Tells the other ranks that this one needs `needed` bytes of `device`, of which `largest` is the
/// largest tensor, and refuses if there is no room for all that share the device.
pub(super) fn claim(
    group: &dyn Group,
    device: &CudaDevice,
    needed: u64,
    largest: Option<(&str, u64)>,
) -> Result<()> {
    let uuid = device.uuid().map_err(DeviceError::Cuda)?;
    let free = device.memory().map_err(DeviceError::Cuda)?.free;
    let (name, bytes) = largest.unwrap_or_default();
    let claim = Claim { uuid, needed, free, largest: (name.to_owned(), bytes) };
    let claims = gather(group, Some(&claim))?;
    crowd(&claims, &claim).map_or(Ok(()), |crowd| {
        let Crowd { ranks, needed, free, largest: (largest, bytes) } = crowd;
        let device = Device::of_cuda(device);
        Err(DistError::Crowded { device, ranks, needed, free, largest, bytes }.into())
    })
}

/// The claims of all ranks, by rank.
fn gather(group: &dyn Group, claim: Option<&Claim>) -> Result<Vec<Option<Claim>>> {
    // Numbers and strings can always be written.
    let message = serde_json::to_vec(&claim).unwrap_or_default();
    let all = group.gather_messages(&message).map_err(DistError::Group)?;
    // What another rank has written, this one can read; and each looks after itself besides.
    Ok(all.iter().map(|message| serde_json::from_slice(message).unwrap_or_default()).collect())
}

/// Ranks that need more of a device than there is.
#[derive(Debug, PartialEq, Eq)]
struct Crowd {
    ranks: Vec<u32>,
    needed: u64,
    free: u64,
    largest: (String, u64),
}

/// The ranks that share the device of `own`, if that has no room for them. Pure.
fn crowd(claims: &[Option<Claim>], own: &Claim) -> Option<Crowd> {
    let sharing = || {
        let ranks = (0..).zip(claims).filter_map(|(rank, claim)| Some((rank, claim.as_ref()?)));
        ranks.filter(|(_, claim)| claim.uuid == own.uuid)
    };
    let needed = sharing().fold(0u64, |sum, (_, claim)| sum.saturating_add(claim.needed));
    let free = sharing().map(|(_, claim)| claim.free).min().unwrap_or(own.free);
    let largest = sharing().map(|(_, claim)| &claim.largest).max_by_key(|(_, bytes)| *bytes);
    (needed > free).then(|| Crowd {
        ranks: sharing().map(|(rank, _)| rank).collect(),
        needed,
        free,
        largest: largest.cloned().unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ranks_on_the_same_device_count_together() {
        let claim = |device: u8, needed| Claim {
            uuid: [device; 16],
            needed,
            free: 100 - u64::from(device),
            largest: (format!("of {needed}"), needed / 2),
        };
        // Two machines with a device each, and a rank on the host.
        let claims = [Some(claim(1, 60)), Some(claim(2, 60)), None, Some(claim(1, 39))];
        assert_eq!(crowd(&claims, &claim(1, 60)), None);
        assert_eq!(crowd(&claims, &claim(2, 60)), None);
        let claims = [Some(claim(1, 60)), Some(claim(2, 60)), None, Some(claim(1, 40))];
        assert_eq!(crowd(&claims, &claim(2, 60)), None);
        let expected =
            Crowd { ranks: vec![0, 3], needed: 100, free: 99, largest: ("of 60".to_owned(), 30) };
        assert_eq!(crowd(&claims, &claim(1, 40)), Some(expected));
    }
}
