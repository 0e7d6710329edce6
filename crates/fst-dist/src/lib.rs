//! Ranks, process groups, shard specifications, which rank reads which bytes, and the exchange.
//!
//! This crate knows nothing of the I/O engines' internals.
