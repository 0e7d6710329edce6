//! What the `fst` program is made of, as a library for this workspace's tests and benchmarks.
//!
//! It makes checkpoints that look like published ones: [`models`] knows their tensors, [`synth`]
//! writes them. It follows the needs of the program and has no stable interface; programs that load
//! checkpoints depend on the crate `fst`.

pub mod models;
pub mod synth;
