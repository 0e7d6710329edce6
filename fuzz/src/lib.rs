//! Entry points of the fuzz targets.
//!
//! They are plain functions over bytes, so that the workspace's tests run them on a stable
//! toolchain over `fuzz/seeds` and mutations of it. With cargo-fuzz and a nightly toolchain:
//!
//! ```text
//! cargo +nightly fuzz run decoder fuzz/corpus/decoder fuzz/seeds/decoder -- -max_total_time=60
//! ```

pub mod format;
pub mod planner;
