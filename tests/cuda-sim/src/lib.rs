//! A simulated CUDA driver for tests on machines without a GPU.
//!
//! Built as a shared library with SONAME `libcuda.so`, it exports the part of the CUDA driver API
//! (and of cuFile) that fst calls, over host memory. It is adversarial, not obliging:
//!
//! * asynchronous work runs at the latest moment the API allows: when a synchronising call, or a
//!   query that answers "complete", makes it observable, and not earlier;
//! * pageable memory that is copied may be read at the call or when the copy runs: a change in between is
//!   a violation; pinned memory is read when the copy runs, so a staging block that is reused too early
//!   shows as wrong bytes;
//! * registering memory pins its pages: those behind the end of a mapped file are refused, and a copy
//!   from a mapping whose file shrank afterwards is no signal. Short copies straight out of a file's mapping
//!   are violations: a driver may make them itself, and then they are one;
//! * fresh device memory is filled with [`FRESH`], freed memory with [`POISON`] and kept aside;
//! * freeing memory that queued work still refers to, double frees, foreign pointers, leaks and
//!   work left pending are recorded as violations;
//! * any call can be made to fail at its n-th use, and copies to fail when they run.
//!
//! The state is per process. [`Sim::load`] opens the library by its absolute path, before anything
//! else asks for `libcuda.so`; [`Sim::exclusive`] hands the simulator to one test at a time and
//! checks on drop that nothing leaked. Kernels run as host functions: for the PTX entry `name` the
//! symbol `fst_sim_kernel_name(grid: *const u32, block: *const u32, params: *mut *mut c_void)` is
//! looked up in the libraries given to [`Sim::add_kernels`] and then in the process.
//!
//! Time costs nothing unless the clock is started ([`Sim::run_clock`]): then calls take as long as a table
//! says (`clock.rs`), and copies run beside the process at the rate of a link.
//!
//! Environment, read when the library is first used and at every reset: `FST_SIM_DEVICES` (1),
//! `FST_SIM_MEMORY` (bytes per device, 1 GiB), `FST_SIM_FAIL` (`NAME:N:CODE,...`),
//! `FST_SIM_SET` (`NAME:VALUE,...`, as [`Sim::set`]),
//! `FST_SIM_KERNELS` (a library of host kernels), `FST_SIM_REPORT` (a file that is given the report
//! at exit). A program started by a test finds the simulator through [`Sim::environment`].

mod client;
mod clock;
mod codes;
mod control;
mod exports;
pub mod fatbin;
mod memory;
mod ptx;
mod queue;
mod world;

pub use client::{Guard, Report, Sim, SimError, Span};
pub use codes::*;

/// The byte that fills device memory when it is allocated.
pub const FRESH: u8 = 0xCD;
/// The byte that fills device memory once it is freed.
pub const POISON: u8 = 0xDB;
