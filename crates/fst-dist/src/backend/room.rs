//! Whether the ranks that share a device, or a host's memory, have room there together: asked before any of them reserves
//! memory there or reads a byte.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use fst_gpu::LoadError;
use fst_io::available::{AvailableMemory, MemoryLimit, Shortage};
use serde::{Deserialize, Serialize};

use crate::error::RankError;
use crate::group::Group;

/// What a rank needs of a memory; it travels between ranks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Claim {
    /// The memory, distinct from those of other machines: the UUID of a device, or see [`host`].
    uuid: [u8; 16],
    /// The most bytes that the rank uses at a time.
    needed: u64,
    /// Bytes free before any rank of the group has reserved some.
    free: u64,
    /// Name and bytes of the rank's largest tensor.
    largest: (String, u64),
    /// The process, and bytes that it keeps pinned, if such memory will do.
    kept: Option<(u32, u64)>,
}

/// What a rank needs of the device that it loads to.
pub(super) struct OnDevice<'a> {
    /// The device, and its number.
    pub(super) uuid: [u8; 16],
    pub(super) ordinal: usize,
    /// The most bytes that the rank uses there at a time, and bytes free.
    pub(super) needed: u64,
    pub(super) free: u64,
    /// Name and bytes of its largest tensor.
    pub(super) largest: Option<(&'a str, u64)>,
    /// Bytes of host memory that this process keeps pinned.
    pub(super) kept: u64,
}

/// Tells the other ranks that this one needs `needed` bytes of host memory, pinned ones if it loads to a
/// device, and what it needs of that. Refuses where a device has no room for all that share it; and, if
/// `check` says so, where the host has none for those of one machine and control group.
pub(super) fn claim(
    group: &dyn Group,
    device: Option<OnDevice<'_>>,
    needed: u64,
    check: bool,
) -> Result<(), RankError> {
    // Ranks take fresh memory.
    fst_io::release_kept();
    let own = AvailableMemory::now();
    let ordinal = device.as_ref().map_or(0, |device| device.ordinal);
    let mut claims = vec![Claim {
        uuid: host(own.as_ref().is_some_and(|own| own.limit == MemoryLimit::AddressSpace)),
        needed,
        free: own.as_ref().filter(|_| check).map_or(u64::MAX, |own| own.bytes),
        largest: Default::default(),
        kept: device.as_ref().map(|device| (std::process::id(), device.kept)),
    }];
    claims.extend(device.map(|OnDevice { uuid, needed, free, largest, .. }| {
        let (name, bytes) = largest.unwrap_or_default();
        Claim { uuid, needed, free, largest: (name.to_owned(), bytes), kept: None }
    }));
    let all = gather(group, &claims)?;
    let mut short = claims.iter().map(|claim| shortage(&all, claim));
    if let (Some(Some(short)), Some(mut own), true) = (short.next(), own, check) {
        own.bytes = short.free;
        return Err(LoadError::from(Shortage::new(short.needed, own)).into());
    }
    match short.next().flatten() {
        Some(Lack { ranks, needed, free, largest: (largest, bytes) }) => {
            Err(RankError::SharedDevice { device: ordinal, ranks, needed, free, largest, bytes })
        }
        None => Ok(()),
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

/// The claims of all ranks, by rank.
fn gather(group: &dyn Group, claims: &[Claim]) -> Result<Vec<Vec<Claim>>, RankError> {
    // Numbers and strings can always be written.
    let message = serde_json::to_vec(claims).unwrap_or_default();
    let all = group.gather_messages(&message)?;
    // What another rank has written, this one can read; and each looks after itself besides.
    Ok(all.iter().map(|message| serde_json::from_slice(message).unwrap_or_default()).collect())
}

/// Ranks that need more of a memory than there is.
#[derive(Debug, PartialEq, Eq)]
struct Lack {
    ranks: Vec<u32>,
    needed: u64,
    free: u64,
    largest: (String, u64),
}

/// The ranks that share the memory of `own`, if that has no room for them. Pure.
fn shortage(claims: &[Vec<Claim>], own: &Claim) -> Option<Lack> {
    let sharing = || {
        let claims = (0..).zip(claims).flat_map(|(rank, all)| all.iter().map(move |c| (rank, c)));
        claims.filter(|(_, claim)| claim.uuid == own.uuid)
    };
    let sum = |sum: u64, claim: &Claim| sum.saturating_add(claim.needed);
    // What a process keeps serves its ranks once.
    let kept: BTreeMap<u32, u64> = sharing().filter_map(|(_, claim)| claim.kept).collect();
    let reused = kept.into_iter().map(|(process, bytes)| {
        let its = sharing().filter(|(_, c)| c.kept.is_some_and(|(other, _)| other == process));
        bytes.min(its.fold(0, |all, (_, claim)| sum(all, claim)))
    });
    let needed = sharing().fold(0, |all, (_, claim)| sum(all, claim)).saturating_sub(reused.sum());
    let free = sharing().map(|(_, claim)| claim.free).min().unwrap_or(own.free);
    let largest = sharing().map(|(_, claim)| &claim.largest).max_by_key(|(_, bytes)| *bytes);
    (needed > free).then(|| Lack {
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
            kept: None,
        };
        // Two machines with a device each, and a rank on the host.
        let claims = [vec![claim(1, 60)], vec![claim(2, 60)], vec![], vec![claim(1, 39)]];
        assert_eq!(shortage(&claims, &claim(1, 60)), None);
        assert_eq!(shortage(&claims, &claim(2, 60)), None);
        let claims = [vec![claim(1, 60)], vec![claim(2, 60)], vec![], vec![claim(1, 40)]];
        assert_eq!(shortage(&claims, &claim(2, 60)), None);
        let expected =
            Lack { ranks: vec![0, 3], needed: 100, free: 99, largest: ("of 60".to_owned(), 30) };
        assert_eq!(shortage(&claims, &claim(1, 40)), Some(expected));
    }
    #[test]
    fn what_a_process_keeps_pinned_serves_its_ranks_once() {
        let claim = |process, needed, kept| {
            let (uuid, largest) = ([0; 16], Default::default());
            vec![Claim { uuid, needed, free: 0, largest, kept: Some((process, kept)) }]
        };
        // Two processes; the second keeps more than it needs. A rank on the host keeps nothing.
        let mut claims = vec![claim(1, 60, 100), claim(1, 60, 100), claim(2, 60, 70)];
        claims.push(vec![Claim { kept: None, ..claim(1, 7, 0).remove(0) }]);
        let lack = shortage(&claims, &claims[0][0]).unwrap();
        assert_eq!((lack.needed, lack.ranks), (20 + 7, vec![0, 1, 2, 3]));
    }
}
