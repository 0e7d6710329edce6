//! Memory: arenas on devices, pinned staging blocks on the host.

pub mod device;
pub mod pinned;
