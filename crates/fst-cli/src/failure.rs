//! How a command ends when it does not end well: which line goes to standard error, which exit
//! status the program returns.

use std::fmt::Display;
use std::path::Path;
use std::process::ExitCode;

use crate::text::{self, visible};

/// Why a command failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The input is bad or the work failed: exit status 1 and one line.
    Failed(String),
    /// The command line asks for something that makes no sense: exit status 2.
    Usage(String),
    /// The user stopped the program: the status that shells expect after ctrl-C.
    Interrupted,
}

impl Failure {
    /// A failure whose message names its path already, as the library's errors do.
    pub(crate) fn of(error: impl Display) -> Self {
        Failure::Failed(error.to_string())
    }

    /// A failure about `path`.
    pub(crate) fn at(path: &Path, what: impl Display) -> Self {
        Failure::Failed(format!("{}: {what}", path.display()))
    }

    /// A command line that cannot be followed.
    pub(crate) fn usage(what: impl Display) -> Self {
        Failure::Usage(what.to_string())
    }

    /// Standard output cannot be written.
    pub(crate) fn output(error: std::io::Error) -> Self {
        Failure::Failed(format!("standard output: {error}"))
    }

    /// Says what happened on standard error, and with `json` as `{"error": ...}` on standard output as
    /// well, and returns the exit status.
    pub(crate) fn report(&self, json: bool) -> ExitCode {
        let (message, status) = match self {
            Failure::Failed(message) => (&**message, 1),
            Failure::Usage(message) => (&**message, 2),
            Failure::Interrupted => ("cancelled", 130),
        };
        if json {
            // Where this cannot be written, the status still tells.
            let _ = text::print_json(&serde_json::json!({ "error": message }));
        }
        if let Failure::Interrupted = self {
            let _ = std::io::Write::write_all(&mut anstream::stderr(), b"cancelled\n");
            return ExitCode::from(status);
        }
        // One line whatever a path or a name in a file holds. If standard error is gone as well,
        // the status has to do.
        let _ = std::io::Write::write_fmt(
            &mut anstream::stderr(),
            format_args!("error: {}\n", visible(message)),
        );
        ExitCode::from(status)
    }
}
