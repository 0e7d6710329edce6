//! The `fst` program: loads, inspects, sums and makes safetensors checkpoints.

mod args;
mod command;
mod device;
mod dtype;
mod failure;
mod figures;
mod interrupt;
mod progress;
mod ranks;
mod reading;
mod slice;
mod sums;
mod text;
mod timeline;

use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};

fn main() -> ExitCode {
    // Wrong usage ends here with status 2, `--help` and `--version` with 0.
    let cli = Cli::parse();
    interrupt::catch();
    let result = match &cli.command {
        Command::Load(args) => command::load::run(args),
        Command::Inspect(args) => command::inspect::run(args),
        Command::Sum(args) => command::sum::run(args),
        Command::Synth(args) => command::synth::run(args),
        Command::Plan(args) => command::plan::run(args),
        Command::Doctor(args) => command::doctor::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
