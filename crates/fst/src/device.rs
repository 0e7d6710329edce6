//! Where tensors are loaded to.

use std::fmt;
use std::str::FromStr;

use crate::error::{DeviceError, Error};

/// A memory that tensors can be loaded into.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Device(Kind);

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(crate) enum Kind {
    #[default]
    Host,
}

impl Default for Device {
    fn default() -> Self {
        Self::host()
    }
}

impl Device {
    /// The memory of this process.
    pub fn host() -> Self {
        Self(Kind::Host)
    }

    /// Whether this is the memory of this process.
    pub fn is_host(&self) -> bool {
        matches!(self.0, Kind::Host)
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Kind::Host => f.write_str("host"),
        }
    }
}

impl FromStr for Device {
    type Err = Error;

    /// Parses `host`, or `cuda:N`.
    fn from_str(name: &str) -> Result<Self, Error> {
        match name {
            "host" => Ok(Self::host()),
            _ => Err(DeviceError::Unknown { name: name.to_owned() }.into()),
        }
    }
}
