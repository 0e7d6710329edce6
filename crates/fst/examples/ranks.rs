//! Four ranks, threads of this process, load a checkpoint together: each keeps its part of every tensor, and
//! nothing is read twice.
//!
//! `cargo run -p fst-loader --example ranks -- model/`

use std::sync::Arc;

use fst::{Checkpoint, Loader, LocalGroup, Preset};

fn main() -> fst::Result<()> {
    let Some(path) = std::env::args_os().nth(1) else {
        eprintln!("usage: ranks CHECKPOINT");
        std::process::exit(2);
    };
    let checkpoint = Checkpoint::open(path)?;
    let names = checkpoint.tensors().iter().map(|tensor| tensor.name());
    let preset = Preset::detect(names).unwrap_or_else(Preset::replicate);
    let reports = std::thread::scope(|scope| {
        let ranks: Vec<_> = LocalGroup::host(4)
            .into_iter()
            .map(|group| {
                let loader = Loader::new().group(Arc::new(group)).preset(preset.clone());
                let checkpoint = &checkpoint;
                scope.spawn(move || Ok(loader.load(checkpoint)?.report().clone()))
            })
            .collect();
        let join = |rank: std::thread::ScopedJoinHandle<'_, fst::Result<_>>| {
            rank.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        ranks.into_iter().map(join).collect::<fst::Result<Vec<_>>>()
    })?;
    for report in reports {
        if let Some(rank) = report.rank {
            println!(
                "rank {} of {}: read {} bytes, keeps {}, received {}",
                rank.rank, rank.world, report.bytes_read, rank.kept_bytes, rank.received_bytes
            );
        }
    }
    Ok(())
}
