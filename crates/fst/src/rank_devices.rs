//! Groups whose ranks keep their shards on devices: in one process, or one process for each device.

use std::time::Duration;

use fst_dist::group::{DEFAULT_DEADLINE, LaunchEnv, LocalGroup, NcclGroup, TcpControl};
use fst_dist::{DeviceCopier, NcclStream};

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
    let copier = DeviceCopier::new(devices.iter().filter_map(Device::as_cuda));
    let copier = copier.map_err(DeviceError::Cuda)?;
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
    let Some(cuda) = device.as_cuda() else {
        return Err(DistError::NotCuda { device: device.clone() }.into());
    };
    let env = LaunchEnv::from_env().map_err(DistError::Group)?;
    let control = TcpControl::from_env(&env, DEFAULT_DEADLINE).map_err(DistError::Group)?;
    let stream = NcclStream::new(cuda).map_err(DeviceError::Cuda)?;
    Ok(NcclGroup::init(Box::new(control), Box::new(stream)).map_err(DistError::Group)?)
}
