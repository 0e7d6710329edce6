//! Groups whose ranks keep their shards on devices: in one process, or one process for each device.

use std::any::Any;
use std::ffi::c_void;
use std::fmt;
use std::time::Duration;

use fst_dist::group::{
    Copier, CopyError, DEFAULT_DEADLINE, DeviceStream, HostCopier, LaunchEnv, LocalGroup,
    NcclGroup, TcpControl,
};
use fst_dist::{Cause, Dst, Space, Src};
use fst_gpu::{CudaDevice, Stream, Transfer, Transfers};

use super::DistError;
use crate::device::Device;
use crate::error::{DeviceError, Result};

/// The handles of ranks in this process, of which rank `r` keeps its shards on `devices[r]`, with the
/// usual deadline. Several ranks may share a device, and the host may be among them.
///
/// ```no_run
/// use std::sync::Arc;
/// use fst::{Checkpoint, Device, Loader, Preset, dist::local_groups};
///
/// let checkpoint = Checkpoint::open("Llama-2-7b-hf")?;
/// let devices = [Device::cuda(0)?, Device::cuda(1)?];
/// let groups = local_groups(&devices)?;
/// std::thread::scope(|scope| {
///     for (group, device) in groups.into_iter().zip(devices) {
///         let loader = Loader::new().device(device).group(Arc::new(group)).preset(Preset::llama());
///         let checkpoint = &checkpoint;
///         scope.spawn(move || loader.load(checkpoint));
///     }
/// });
/// # Ok::<(), fst::Error>(())
/// ```
///
/// # Errors
///
/// The driver's.
pub fn local_groups(devices: &[Device]) -> Result<Vec<LocalGroup>> {
    local_groups_with(devices, DEFAULT_DEADLINE)
}

/// As [`local_groups`]; a rank that others wait for may be silent for `deadline`.
///
/// # Errors
///
/// As for [`local_groups`].
pub fn local_groups_with(devices: &[Device], deadline: Duration) -> Result<Vec<LocalGroup>> {
    let copier = DeviceCopier::new(devices).map_err(DeviceError::Cuda)?;
    Ok(LocalGroup::with(devices.len() as u32, copier, deadline))
}

/// Makes this process one rank of a group over NCCL, with its shards on `device`, by the variables that
/// torchrun and most launchers set ([`LaunchEnv`]). Waits for all ranks.
///
/// ```no_run
/// use std::sync::Arc;
/// use fst::{Checkpoint, Device, LaunchEnv, Loader, Preset, dist::nccl_group};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let device = Device::cuda(LaunchEnv::from_env()?.local_rank as usize)?;
/// let group = Arc::new(nccl_group(&device)?);
/// let loader = Loader::new().device(device).group(group).preset(Preset::llama());
/// let shards = loader.load(&Checkpoint::open("Llama-2-7b-hf")?)?;
/// # Ok(())
/// # }
/// ```
///
/// Other ways to make one are those of [`NcclGroup`], with an [`NcclStream`].
///
/// # Errors
///
/// [`DistError::NotCuda`], variables that are missing, ranks that do not come, or NCCL or the driver
/// missing or failing.
pub fn nccl_group(device: &Device) -> Result<NcclGroup> {
    let env = LaunchEnv::from_env().map_err(DistError::Group)?;
    let control = TcpControl::from_env(&env, DEFAULT_DEADLINE).map_err(DistError::Group)?;
    let stream = NcclStream::new(device)?;
    Ok(NcclGroup::init(Box::new(control), Box::new(stream)).map_err(DistError::Group)?)
}

/// A stream of a device, for [`NcclGroup`] to work on.
#[derive(Debug)]
pub struct NcclStream(Stream);

impl NcclStream {
    /// Makes a stream on `device`.
    ///
    /// # Errors
    ///
    /// [`DistError::NotCuda`], or the driver's.
    pub fn new(device: &Device) -> Result<Self> {
        let Some(cuda) = device.as_cuda() else {
            return Err(DistError::NotCuda { device: device.clone() }.into());
        };
        Ok(Self(Stream::new(cuda).map_err(DeviceError::Cuda)?))
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

/// Copies between the memories of several devices and the host.
struct DeviceCopier {
    /// Each device once.
    devices: Vec<Transfers>,
}

impl DeviceCopier {
    fn new(ranks: &[Device]) -> fst_gpu::Result<Self> {
        let mut devices: Vec<Transfers> = Vec::new();
        for device in ranks.iter().filter_map(Device::as_cuda) {
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
            // SAFETY: source and destination are lent for this call, each in the memory that it says;
            // destinations are exclusive.
            unsafe { worker.run(&batch) }.map_err(|error| (positions, CopyError::from(error)))?;
        }
        Ok(())
    }
}
