//! What the program prints for people: figures with units, aligned tables, colours.
//!
//! Text is put together in memory and written once, so that a reader who goes away (`| head`) is
//! noticed in one place.

mod pattern;
mod table;
mod units;

use std::fmt::Write as _;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

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

/// `text` with control characters and those that are not seen made visible: names come out of files
/// that anybody can write, and a terminal obeys what it is sent.
pub(crate) fn visible(text: &str) -> String {
    let mut visible = String::with_capacity(text.len());
    for c in text.chars() {
        if is_hidden(c) {
            // Writing to a `String` cannot fail.
            let _ = write!(visible, "{}", c.escape_default());
        } else {
            visible.push(c);
        }
    }
    visible
}

/// Whether a character steers what is shown rather than being shown: a control or format character
/// of Unicode (bidirectional overrides, joiners, tags and the like), or a separator of lines.
fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{feff}'
            | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// A JSON document with what is [hidden](is_hidden) as `\uXXXX`: such characters stand in strings
/// only, where this means the same.
fn escaped(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        if is_hidden(c) {
            for unit in c.encode_utf16(&mut [0; 2]) {
                // Writing to a `String` cannot fail.
                let _ = write!(out, "\\u{unit:04x}");
            }
        } else {
            out.push(c);
        }
    }
    out
}

/// Whether only what was asked for is printed.
static QUIET: AtomicBool = AtomicBool::new(false);

/// Whether only what was asked for is printed from now on.
pub(crate) fn set_quiet(quiet: bool) {
    QUIET.store(quiet, Ordering::Relaxed);
}

/// Whether only what was asked for is printed.
pub(crate) fn is_quiet() -> bool {
    QUIET.load(Ordering::Relaxed)
}

/// Prints what nobody needs who asked for quiet.
pub(crate) fn remark(text: &str) -> io::Result<()> {
    if is_quiet() { Ok(()) } else { print(text) }
}

/// Warns on standard error, unless quiet was asked for.
pub(crate) fn warn(what: &str) {
    if !is_quiet() {
        let line = format!("warning: {}\n", visible(what));
        // What cannot be written to standard error has no better place.
        let _ = anstream::stderr().write_all(line.as_bytes());
    }
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

/// Characters in a line of the terminal that standard output goes to, if it goes to one.
pub(crate) fn width() -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(io::stdout()).ok()?;
    // A serial line has no size.
    (size.ws_col > 0).then_some(usize::from(size.ws_col))
}

/// Writes one JSON document to standard output.
pub(crate) fn print_json(document: &impl serde::Serialize) -> io::Result<()> {
    print_json_text(&serde_json::to_string(document)?)
}

/// Writes a JSON document that is text already, in one line.
pub(crate) fn print_json_text(json: &str) -> io::Result<()> {
    print(&(escaped(json) + "\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_hidden_is_shown_and_the_rest_is_left_alone() {
        assert_eq!(visible("a\u{202e}b\u{1b}[1m\n"), "a\\u{202e}b\\u{1b}[1m\\n");
        assert_eq!(visible("\u{2066}\u{feff}\u{200d}"), "\\u{2066}\\u{feff}\\u{200d}");
        let plain = "modèle.层.0 \u{1f600} \"x\" \\n";
        assert_eq!(visible(plain), plain);
    }

    #[test]
    fn json_means_the_same_and_has_nothing_hidden() {
        let name = "a\u{202e}b\u{7f}\u{9b}\u{e0041}\n\u{1f600}é";
        let json = serde_json::to_string(&serde_json::json!({ name: [name] })).unwrap();
        let safe = escaped(&json);
        assert!(!safe.chars().any(is_hidden) && safe.contains("\\u202e") && safe.contains('é'));
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&safe).unwrap(),
            serde_json::from_str::<serde_json::Value>(&json).unwrap()
        );
    }
}
