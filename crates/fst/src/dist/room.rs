//! Whether the ranks that share a device have room on it together: asked before any of them reserves
//! memory there or reads a byte.

use fst_dist::Group;
use fst_gpu::CudaDevice;
use serde::{Deserialize, Serialize};

use super::DistError;
use crate::device::Device;
use crate::error::{DeviceError, Result};

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

/// Tells the other ranks that this one needs nothing of a device.
pub(super) fn claim_nothing(group: &dyn Group) -> Result<()> {
    gather(group, None).map(drop)
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
