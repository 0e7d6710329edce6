//! What the program prints for people: figures with units, aligned tables, colours.
//!
//! Text is put together in memory and written once, so that a reader who goes away (`| head`) is
//! noticed in one place.

mod pattern;
mod table;
mod units;

use std::fmt::Write as _;
use std::io::{self, Write};

use anstyle::{AnsiColor, Style};

pub(crate) use pattern::summarize;
pub(crate) use table::{Align, Table};
pub(crate) use units::{bytes, count, counted, rate, seconds};

/// Headings of sections.
pub(crate) const HEADING: Style = Style::new().bold();
/// The one figure a command is run for.
pub(crate) const RESULT: Style = AnsiColor::Green.on_default().bold();
/// What is less important than the text around it.
pub(crate) const FAINT: Style = Style::new().dimmed();
/// Things that are there and work.
pub(crate) const GOOD: Style = AnsiColor::Green.on_default();
/// Things that are missing without being an error.
pub(crate) const MISSING: Style = AnsiColor::Yellow.on_default();

/// `text` in `style`; the colours are dropped on the way out where they are not wanted.
pub(crate) fn styled(style: Style, text: impl std::fmt::Display) -> String {
    format!("{style}{text}{style:#}")
}

/// `text` with control characters made visible: names come out of files that anybody can write, and
/// a terminal obeys what it is sent.
pub(crate) fn visible(text: &str) -> String {
    let mut visible = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            // Writing to a `String` cannot fail.
            let _ = write!(visible, "{}", c.escape_default());
        } else {
            visible.push(c);
        }
    }
    visible
}

/// Writes finished text to standard output, with colours only where a terminal shows them.
///
/// A reader that has gone away is no error: it has seen what it wanted.
pub(crate) fn print(text: &str) -> io::Result<()> {
    let mut out = anstream::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// Writes one JSON document to standard output.
pub(crate) fn print_json(document: &impl serde::Serialize) -> io::Result<()> {
    let mut text = serde_json::to_string(document)?;
    text.push('\n');
    print(&text)
}
