//! Builds a model while its weights are read: two threads ask for tensors by name, in an order of their own, and
//! wait for these alone.
//!
//! `cargo run -p fst-loader --example start -- model/`

use fst::{Checkpoint, Loader, Tensor};

fn main() -> fst::Result<()> {
    let Some(path) = std::env::args_os().nth(1) else {
        eprintln!("usage: start CHECKPOINT");
        std::process::exit(2);
    };
    let checkpoint = Checkpoint::open(path)?;
    let loading = Loader::new().start(&checkpoint)?;
    // From the last layer to the first: what is asked for is read first.
    let names: Vec<&str> = checkpoint.tensors().iter().rev().map(|tensor| tensor.name()).collect();
    let (front, back) = names.split_at(names.len() / 2);
    let build = |names: &[&str]| -> fst::Result<Vec<Tensor>> {
        names.iter().map(|name| loading.get(name)).collect()
    };
    let (front, back) = std::thread::scope(|scope| {
        let front = scope.spawn(|| build(front));
        let back = build(back);
        (front.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), back)
    });
    let model: Vec<Tensor> = front?.into_iter().chain(back?).collect();
    let report = loading.finish()?;
    println!("{} tensors, {:.1} GB/s", model.len(), report.gb_per_s());
    Ok(())
}
