//! Measures loads to CUDA device 0; started by the `run.sh` that `tools/gpu-check` packs.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand};
use fst_benches::gpu::peers::Environment;
use fst_benches::gpu::record::Log;
use fst_benches::gpu::{Part, parts, probe, ranks, table};

/// Measures loads to CUDA device 0.
#[derive(Debug, Parser)]
#[command(name = "fst-gpu-check")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a part and append its runs to FILE
    Run {
        /// What to measure
        #[arg(value_enum)]
        part: Part,
        /// Folders of checkpoints
        #[arg(required = true)]
        paths: Vec<PathBuf>,
        /// Where runs go, a line of JSON each
        #[arg(long)]
        out: PathBuf,
        /// Runs of each contender
        #[arg(long, default_value_t = 3)]
        rounds: usize,
        /// Start no run that would probably end later
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        /// The folder with gpu_load.py and site/ that holds the peers
        #[arg(long)]
        peers: Option<PathBuf>,
        /// The Python interpreter that has torch
        #[arg(long, default_value = "python3")]
        python: PathBuf,
        /// What torch calls the device; `cpu` tries the peers where there is none
        #[arg(long, default_value = "cuda:0")]
        torch_device: String,
    },
    /// Ask what decides how loads should go, in seconds
    Probe {
        /// A folder on the file system of the data
        folder: PathBuf,
    },
    /// Load one checkpoint, say when it is usable, and sum it
    Once {
        /// Folder of the checkpoint
        path: PathBuf,
    },
    /// Load one checkpoint by ranks on one device and hold their shards to those in host memory; NCCL's
    /// rank is the one that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say
    Ranks {
        /// Folder of the checkpoint
        path: PathBuf,
    },
    /// Print the summary of a folder of results
    Table {
        /// The folder
        folder: PathBuf,
    },
}

fn main() -> anyhow::Result<()> {
    match Args::parse().command {
        Command::Probe { folder } => probe::run(&folder),
        Command::Once { path } => parts::once(&path),
        Command::Ranks { path } => ranks::check(&path),
        Command::Table { folder } => {
            println!("{}", table::summarise(&folder)?);
            Ok(())
        }
        Command::Run { part, paths, out, rounds, seconds, peers, python, torch_device } => {
            let peers = peers.map(|folder| Environment {
                python,
                script: folder.join("gpu_load.py"),
                site: folder.join("site"),
                device: torch_device,
            });
            let peers_log = out.with_file_name("peers.log");
            let limit = Duration::from_secs(seconds);
            let plan = parts::Plan { part, paths, rounds, limit, peers, peers_log };
            parts::run(&plan, &mut Log::open(&out)?)
        }
    }
}
