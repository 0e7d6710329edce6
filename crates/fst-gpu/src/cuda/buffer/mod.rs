//! Memory: arenas on devices, pinned staging blocks on the host,
//! and host memory of the caller's that copy engines may read.

pub mod device;
mod free;
pub mod pinned;
pub mod registered;
