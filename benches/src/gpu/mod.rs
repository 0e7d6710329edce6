//! Loads to a CUDA device, measured: what the folder made by `tools/gpu-check` runs.
//!
//! Contenders run in turn on the same files, in the page-cache state that is wanted and checked;
//! after each load, outside of the clock, every tensor is summed on the device, and all contenders
//! must come to the same sum. fst loads in this process, peers each in one of their own that stays
//! ([`peers`]), so that imports and the first touch of a device cost nobody anything; only in
//! [`Part::Start`] every load is a fresh process.
//!
//! Every run is a line of JSON ([`record::Record`]) written at once, so that a run that is cut off
//! leaves what it had. [`table`] makes the summary of them.

pub mod measure;
pub mod ours;
pub mod parts;
pub mod peers;
pub mod probe;
pub mod ranks;
pub mod raw;
pub mod record;
pub mod sum;
pub mod table;

pub use parts::Part;
