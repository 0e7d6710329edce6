//! Loads all of a checkpoint into host memory, and says what was read and what bound it.
//!
//! `cargo run -p fst-loader --example load -- model/`

use fst::{Checkpoint, Loader};

fn main() -> fst::Result<()> {
    let Some(path) = std::env::args_os().nth(1) else {
        eprintln!("usage: load CHECKPOINT");
        std::process::exit(2);
    };
    let checkpoint = Checkpoint::open(path)?;
    let tensors = Loader::new().load(&checkpoint)?;
    for tensor in tensors.iter().take(5) {
        println!("{} {} {:?}", tensor.name(), tensor.dtype(), tensor.shape());
    }
    let report = tensors.report();
    println!("{} tensors, {} bytes, {:.1} GB/s", report.tensors, report.bytes, report.gb_per_s());
    for stage in &report.stages {
        println!("{:>16} {:.3} s", stage.name, stage.seconds);
    }
    Ok(())
}
