//! The benchmark harness: loaders of safetensors checkpoints run in turn on the same files.
//!
//! What makes a figure here believable, and which module sees to it:
//!
//! - every run is a fresh process, so memory and allocator start equal ([`child`], `fst-bench-contender`);
//! - contenders are interleaved, the order rotates and is reversed in turn, so that slow drift of the machine and what
//!   the run before leaves behind hit all ([`runner`]);
//! - the page cache is put into the wanted state before each run and *checked*; a run whose state could
//!   not be confirmed is kept in the record but never enters a median ([`page_cache`]);
//! - free memory is touched and freed just before each run, since a hypervisor may have taken it ([`memory`]);
//! - comparisons are ratios of runs of the same round, given with their spread ([`stats`]);
//! - all contenders are held to the same bytes by a digest of every tensor ([`digest`]).
//!
//! Workloads ([`workload`]) and contenders ([`contender`]) are data. Results are written as JSON, a table
//! and a drawing ([`report`], [`plot`]) with a description of the machine ([`machine`]).
//!
//! [`gpu`] measures loads to a CUDA device, for the folder that `tools/gpu-check` makes.

pub mod app;
pub mod child;
pub mod contender;
pub mod data;
pub mod digest;
pub mod gpu;
pub mod huge;
pub mod machine;
pub mod memory;
pub mod models;
pub mod page_cache;
pub mod plot;
pub mod report;
pub mod runner;
pub mod stats;
pub mod target;
pub mod workload;
