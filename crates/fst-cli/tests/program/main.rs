//! Runs the `fst` program as a script would and looks at what it says and returns.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod doctor;
mod fixture;
mod inspect;
mod layouts;
mod load;
mod ranks;
mod slices;
mod sum;
mod synth;
mod usage;
