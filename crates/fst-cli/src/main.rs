//! The `fst` program: loads, inspects, sums and makes safetensors checkpoints.

mod args;
#[cfg(feature = "object-store")]
mod cache;
mod command;
mod device;
mod dtype;
mod failure;
mod figures;
mod hub;
mod interrupt;
mod output;
mod parallel;
mod progress;
mod ranks;
mod reading;
mod slice;
mod sums;
mod text;
mod timeline;

use std::process::ExitCode;

use clap::Parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use args::{Cli, Command};

fn main() -> ExitCode {
    // Wrong usage ends here with status 2, `--help` and `--version` with 0.
    let cli = Cli::parse();
    interrupt::catch();
    raise_file_limit();
    text::set_quiet(cli.quiet);
    let result = match &cli.command {
        Command::Load(args) => command::load::run(args),
        Command::Inspect(args) => command::inspect::run(args),
        Command::Sum(args) => command::sum::run(args),
        Command::Synth(args) => command::synth::run(args),
        Command::Plan(args) => command::plan::run(args),
        Command::Doctor(args) => command::doctor::run(args),
        Command::Completions { shell } => command::manual::completions(*shell),
        Command::Man { folder } => command::manual::pages(folder),
    };
    #[cfg(feature = "object-store")]
    cache::finish();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(cli.command.json()),
    }
}

/// Lets this process have more files open than the usual 1,024, which large checkpoints need, as far
/// as the system allows without being asked.
fn raise_file_limit() {
    // Enough for every checkpoint, and not so many that a library which tries all numbers takes long.
    const ENOUGH: u64 = 1 << 16;
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.map_or(ENOUGH, |maximum| maximum.min(ENOUGH));
    if current.is_some_and(|current| current < wanted) {
        // Where it is refused, an error will say which limit it was.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum });
    }
}
