//! fst-gpu under the simulated driver: adversarial timing, poison, leaks, failures.
//!
//! With `FST_TEST_REAL_CUDA=1` the tests that need no simulator run on the machine's own driver
//! and device 0; the others say that they were skipped.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod arena;
mod cached;
mod cufile;
mod interop;
mod pipeline;
mod presence;
mod program;
mod simulator;
mod sink;
mod support;
mod transform;
