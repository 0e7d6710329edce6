//! `fst completions` and `fst man`: what clap knows of the command line, for shells and for man.

use std::path::Path;

use clap::CommandFactory;
use clap_complete::Shell;
use clap_mangen::Man;

use crate::args::Cli;
use crate::failure::Failure;
use crate::{output, text};

pub(crate) fn completions(shell: Shell) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "fst", &mut script);
    text::print(&String::from_utf8_lossy(&script)).map_err(Failure::output)
}

/// Writes `fst.1`, and `fst-load.1` and the like.
pub(crate) fn pages(folder: &Path) -> Result<(), Failure> {
    let mut program = Cli::command();
    program.build();
    let commands = program.get_subcommands().filter(|command| command.get_name() != "help");
    for command in [program.clone()].into_iter().chain(commands.cloned()) {
        // What a user types has a space, what man is asked for a hyphen.
        let name = command.get_bin_name().unwrap_or("fst").replace(' ', "-");
        let mut page = Vec::new();
        let path = folder.join(format!("{name}.1"));
        let man = Man::new(command).title(name.to_uppercase());
        man.render(&mut page).map_err(|error| Failure::at(&path, error))?;
        output::write(&path, page)?;
    }
    Ok(())
}
