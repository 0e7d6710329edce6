//! One load of one contender, in a process of its own; started by the harness.

use clap::Parser;
use fst_benches::child::{ContenderArgs, run};

fn main() -> anyhow::Result<()> {
    let measurement = run(&ContenderArgs::parse())?;
    println!("{}", serde_json::to_string(&measurement)?);
    Ok(())
}
