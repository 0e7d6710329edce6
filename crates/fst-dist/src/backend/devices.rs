//! Copies between devices of one process, and streams for NCCL.

use std::any::Any;
use std::ffi::c_void;
use std::fmt;

use fst_gpu::{CudaDevice, Stream, Transfer, Transfers};

use super::Cause;
use crate::group::{Copier, CopyError, DeviceStream, HostCopier};
use crate::memory::{Dst, Space, Src};

/// A stream of a device, for [`NcclGroup`](crate::group::NcclGroup) to work on.
#[derive(Debug)]
pub struct NcclStream(Stream);

impl NcclStream {
    /// Makes a stream on `device`.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(device: &CudaDevice) -> fst_gpu::Result<Self> {
        Ok(Self(Stream::new(device)?))
    }
}

// SAFETY: the stream lives as long as this value, and the driver itself is asked.
unsafe impl DeviceStream for NcclStream {
    fn handle(&self) -> *mut c_void {
        self.0.handle().cast()
    }

    fn ordinal(&self) -> u32 {
        self.0.device().ordinal() as u32
    }

    fn make_current(&self) -> Result<Box<dyn Any>, Cause> {
        Ok(Box::new(self.0.device().make_current()?))
    }

    fn is_done(&self) -> Result<bool, Cause> {
        Ok(self.0.is_done()?)
    }
}

/// Copies between the memories of several devices and the host, for
/// [`LocalGroup::with`](crate::LocalGroup::with).
pub struct DeviceCopier {
    /// Each device once.
    devices: Vec<Transfers>,
}

impl DeviceCopier {
    /// Copies of ranks on these devices, of which several may be the same.
    ///
    /// # Errors
    /// The driver's.
    pub fn new<'d>(ranks: impl IntoIterator<Item = &'d CudaDevice>) -> fst_gpu::Result<Self> {
        let mut devices: Vec<Transfers> = Vec::new();
        for device in ranks {
            if devices.iter().any(|known| known.device() == device) {
                continue;
            }
            for other in devices.iter().map(Transfers::device) {
                // Without, the driver goes through the host.
                device.enable_peer_access(other)?;
                other.enable_peer_access(device)?;
            }
            devices.push(Transfers::new(device)?);
        }
        Ok(Self { devices })
    }

    fn of(&self, space: Space) -> Option<&Transfers> {
        let Space::Device(ordinal) = space else { return None };
        self.devices.iter().find(|known| known.device().ordinal() == ordinal as usize)
    }
}

/// A memory of which the copier knows nothing.
#[derive(Debug, thiserror::Error)]
#[error("no copy from {from:?} to {to:?}: the group was not made for both")]
struct NotReached {
    from: Space,
    to: Space,
}

impl fmt::Debug for DeviceCopier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.devices.iter().map(Transfers::device)).finish()
    }
}

/// A copy that one device carries out.
fn transfer<'d>(src: &Src<'_>, dst: &Dst<'_>, from: Option<&'d CudaDevice>) -> Transfer<'d> {
    let (source, destination, len) = (src.addr(), dst.addr(), src.len() as u64);
    match (from, dst.space()) {
        (None, _) => Transfer::FromHost { source, destination, len },
        (Some(_), Space::Host) => Transfer::ToHost { source, destination, len },
        (Some(_), to) if to == src.space() => Transfer::Rows {
            source,
            source_pitch: len,
            destination,
            destination_pitch: len,
            width: len,
            rows: 1,
        },
        (Some(device), _) => Transfer::FromDevice { device, source, destination, len },
    }
}

impl Copier for DeviceCopier {
    fn reaches(&self, space: Space) -> bool {
        space == Space::Host || self.of(space).is_some()
    }

    fn copy(&self, src: Src<'_>, dst: Dst<'_>) -> Result<(), CopyError> {
        self.copy_all(vec![(src, dst)]).map_err(|(_, error)| error)
    }

    /// What one device copies is waited for once; so that, if one fails, it may have been any.
    fn copy_all(&self, copies: Vec<(Src<'_>, Dst<'_>)>) -> Result<(), (Vec<usize>, CopyError)> {
        // By the device that copies: the receiving one, unless that is the host.
        let mut batches: Vec<(&Transfers, Vec<usize>, Vec<Transfer<'_>>)> = Vec::new();
        let mut on_host = Vec::new();
        for (at, (src, dst)) in copies.into_iter().enumerate() {
            let (from, to) = (src.space(), dst.space());
            let unknown = || (vec![at], CopyError::from(NotReached { from, to }));
            if from == Space::Host && to == Space::Host {
                on_host.push((at, src, dst));
                continue;
            }
            let source = match from {
                Space::Host => None,
                _ => Some(self.of(from).ok_or_else(unknown)?),
            };
            let worker = match to {
                Space::Host => source,
                _ => self.of(to),
            };
            let worker = worker.ok_or_else(unknown)?;
            let transfer = transfer(&src, &dst, source.map(Transfers::device));
            match batches.iter_mut().find(|(known, ..)| std::ptr::eq(*known, worker)) {
                Some((_, positions, batch)) => {
                    positions.push(at);
                    batch.push(transfer);
                }
                None => batches.push((worker, vec![at], vec![transfer])),
            }
        }
        for (at, src, dst) in on_host {
            HostCopier.copy(src, dst).map_err(|error| (vec![at], error))?;
        }
        for (worker, positions, batch) in batches {
            // SAFETY: source and destination are borrowed for this call, each in the memory that it says;
            // destinations are exclusive.
            unsafe { worker.run(&batch) }.map_err(|error| (positions, CopyError::from(error)))?;
        }
        Ok(())
    }
}
