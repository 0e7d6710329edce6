//! All that needs CUDA; `absent.rs` stands in for it where the feature `cuda` is off.

pub mod buffer;
mod cached;
pub(crate) mod cufile;
mod device;
pub mod kernel;
mod load;
mod modules;
mod pipeline;
mod sink;
mod stream;
mod sys;
mod transfer;
mod view;

pub use buffer::device::{DEVICE_ALIGN, DeviceArena};
pub use buffer::pinned::{
    Afterwards, PinnedBlock, PinnedRing, RingOptions, kept_bytes, release_kept,
};
pub use buffer::registered::{HostAccess, RegisteredHost};
pub use cached::{CachedOptions, CachedStats, copy_cached};
pub use device::{CudaDevice, CurrentContext, DeviceMemory};
pub(crate) use load::load_to_devices;
pub use load::{CudaMemory, load_into_devices};
pub use pipeline::{CopyOp, Done, Pipeline, PipelineOptions, PipelineStats};
pub use sink::{Admit, Landing, PipelineSink, Route, TakeHost};
pub use stream::{Event, Stream};
pub use sys::{DRIVER_LIBRARIES, LEAST_CUDA};
pub use transfer::{Transfer, Transfers};
pub use view::ArenaView;
