//! Runs the program, and makes the checkpoints it is run on.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// The program under test with these arguments, not yet started.
pub(crate) fn fst<I: IntoIterator<Item: AsRef<std::ffi::OsStr>>>(args: I) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fst"));
    command.args(args).stdin(Stdio::null());
    command
}

/// How a run ended.
pub(crate) struct Run {
    pub(crate) status: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Run {
    pub(crate) fn of(output: Output) -> Self {
        Self {
            status: output.status.code().expect("the program ended by itself"),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// The one JSON document on standard output; nothing was said on standard error.
    pub(crate) fn json(&self) -> Value {
        assert_eq!((self.status, self.stderr.as_str()), (0, ""), "{}", self.stdout);
        serde_json::from_str(&self.stdout).expect("one JSON document")
    }

    /// What follows `error: ` in the one line on standard error of a run that failed; with `--json` it
    /// stands in the document on standard output as well.
    pub(crate) fn error(&self) -> &str {
        assert_eq!(self.status, 1, "{}", self.stderr);
        let line = self.stderr.strip_suffix('\n').expect("a whole line");
        assert!(!line.contains('\n'), "one line, not {line:?}");
        let line = line.strip_prefix("error: ").expect("a line that starts with `error: `");
        if !self.stdout.is_empty() {
            let document: Value = serde_json::from_str(&self.stdout).expect("one JSON document");
            assert_eq!(document["error"], line);
        }
        line
    }
}

/// Runs the program to its end.
pub(crate) fn run<I: IntoIterator<Item: AsRef<std::ffi::OsStr>>>(args: I) -> Run {
    Run::of(fst(args).output().unwrap())
}

/// Presses ctrl-C once the program is under way. One that was over by then is started again: only what
/// it does when it is interrupted in the midst of its work is of interest.
pub(crate) fn interrupted(
    mut program: impl FnMut() -> Command,
    is_under_way: impl Fn(&Child) -> bool,
) -> Output {
    let mut once = || {
        let mut command = program();
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while !is_under_way(&child) && child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "nothing was done");
            std::thread::sleep(Duration::from_micros(200));
        }
        if child.try_wait().unwrap().is_none() {
            kill_process(Pid::from_child(&child), Signal::INT).unwrap();
        }
        let output = child.wait_with_output().unwrap();
        (!output.status.success()).then_some(output)
    };
    (0..20).find_map(|_| once()).expect("a run that heeds it")
}

/// A folder for checkpoints, removed at the end of the test.
pub(crate) struct Folder(TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Makes a checkpoint with `fst synth` and these further arguments.
    pub(crate) fn synth(&self, name: &str, args: &[&str]) -> PathBuf {
        let path = self.join(name);
        let run = run([&["synth", path.to_str().unwrap()], args].concat());
        assert_eq!((run.status, run.stderr.as_str()), (0, ""));
        path
    }
}

/// What the program writes to a terminal of so many columns, with the terminal's codes.
pub(crate) fn on_a_terminal(columns: u16, args: &[&str]) -> String {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let name = ptsname(&terminal, Vec::new()).unwrap().into_string().unwrap();
    let end = std::fs::File::options().read(true).write(true).open(name).unwrap();
    let size = rustix::termios::Winsize { ws_row: 24, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&end, size).unwrap();
    let stdout = end.try_clone().unwrap();
    let mut child = fst(args).stdout(stdout).stderr(end).env("TERM", "xterm").spawn().unwrap();
    let reader = std::thread::spawn(move || {
        let mut shown = Vec::new();
        // Ends with an error once nobody has the other end open.
        let _ = std::fs::File::from(terminal).read_to_end(&mut shown);
        String::from_utf8_lossy(&shown).into_owned()
    });
    assert!(child.wait().unwrap().success());
    reader.join().unwrap()
}

/// The lines that a terminal was told to show, each as often as it was drawn, without colours.
pub(crate) fn lines_shown(output: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    let mut chars = output.chars();
    while let Some(c) = chars.next() {
        match c {
            '\r' | '\n' => lines.push(String::new()),
            // A control sequence goes on to its letter.
            '\u{1b}' => drop(chars.find(char::is_ascii_alphabetic)),
            c => lines.last_mut().unwrap().push(c),
        }
    }
    lines.retain(|line| !line.is_empty());
    lines
}

/// Names in a folder, sorted.
pub(crate) fn names_in(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Writes a safetensors file with this header text and data.
pub(crate) fn write_raw(path: &Path, header: &str, data: &[u8]) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    std::fs::write(path, bytes).unwrap();
}
