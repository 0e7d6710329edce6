//! `--device`: the name is checked with the command line, the device is looked for when it is used.

use std::str::FromStr;

use fst::Device;

use crate::failure::Failure;

/// The name of a device, of a form that there is.
#[derive(Clone, Debug)]
pub(crate) struct DeviceArg(String);

impl FromStr for DeviceArg {
    type Err = &'static str;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let ordinal = name.strip_prefix("cuda:");
        if name == "host"
            || name == "cuda"
            || ordinal.is_some_and(|ordinal| ordinal.parse::<u32>().is_ok())
        {
            Ok(Self(name.to_owned()))
        } else {
            Err("expected host, or cuda:N with the number of a GPU")
        }
    }
}

impl Default for DeviceArg {
    fn default() -> Self {
        Self("host".to_owned())
    }
}

impl DeviceArg {
    /// Whether it names a GPU.
    pub(crate) fn is_cuda(&self) -> bool {
        self.0 != "host"
    }

    /// The device, if this machine has it.
    pub(crate) fn open(&self) -> Result<Device, Failure> {
        self.0.parse().map_err(|error: fst::Error| Failure::Failed(format!("{}: {error}", self.0)))
    }

    /// The GPU of a process that has one for itself: the one named, or that of its rank on this machine.
    pub(crate) fn of_process(asked: Option<&Self>, local_rank: u32) -> Result<Device, Failure> {
        match asked {
            Some(named) if named.0 != "cuda" => named.open(),
            _ => Self(format!("cuda:{local_rank}")).open(),
        }
    }

    /// The devices of `world` ranks: the one named, or by `cuda` all GPUs in turn.
    pub(crate) fn of_ranks(&self, world: u32) -> Result<Vec<Device>, Failure> {
        let mut devices: Vec<Device> = match self.0.as_str() {
            "cuda" => Device::available().into_iter().filter(|device| !device.is_host()).collect(),
            _ => Vec::new(),
        };
        if devices.is_empty() {
            devices.push(self.open()?);
        }
        Ok(devices.iter().cycle().take(world as usize).cloned().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_devices_have_such_names() {
        for name in ["host", "cuda", "cuda:0", "cuda:15"] {
            assert!(name.parse::<DeviceArg>().is_ok(), "{name}");
        }
        for name in ["", "cpu", "cuda:", "cuda:-1", "cuda:x", "cuda:0:0", "CUDA:0"] {
            assert!(name.parse::<DeviceArg>().is_err(), "{name}");
        }
    }
}
