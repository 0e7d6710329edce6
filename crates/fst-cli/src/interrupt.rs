//! Ctrl-C and the signals that ask a program to end: the first one asks the work to stop, a second
//! one ends the program at once, and so does the first where no work heeds it. Temporary folders are
//! removed either way.

use std::ffi::c_int;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use crate::failure::Failure;
use crate::progress;

/// Set by the first ctrl-C.
static STOP: AtomicBool = AtomicBool::new(false);

/// What to do at the first ctrl-C, and what to remove at the second.
static ON_STOP: Mutex<Actions> =
    Mutex::new(Actions { cancel: Vec::new(), folders: Vec::new(), watched: false });

struct Actions {
    cancel: Vec<Box<dyn Fn() + Send>>,
    /// Whether any work looks at [`STOP`].
    watched: bool,
    folders: Vec<PathBuf>,
}

fn actions() -> MutexGuard<'static, Actions> {
    ON_STOP.lock().unwrap_or_else(|poison| poison.into_inner())
}

/// Catches ctrl-C and the signals that ask a program to end. Without it, as where a sandbox forbids
/// handlers, they end the program as they always do.
pub(crate) fn catch() {
    // What `nohup` asked to be ignored stays ignored. (An ignored SIGINT does not: shells give it to what
    // they start in the background, where a user still sends it by hand.)
    // SAFETY: SIG_IGN is no function, so nothing is called.
    let hangup = unsafe { signal(SIGHUP, SIG_IGN) };
    let handled = ctrlc::set_handler(|| {
        let again = STOP.swap(true, Ordering::SeqCst);
        let actions = actions();
        let heeded = actions.watched || !actions.cancel.is_empty();
        if again || !heeded {
            // A second one ends the program even where standard error is stuck.
            if !again {
                Failure::Interrupted.report(false);
            }
            for folder in &actions.folders {
                let _ = std::fs::remove_dir_all(folder);
            }
            progress::wipe();
            _exit(130);
        }
        for cancel in &actions.cancel {
            cancel();
        }
    });
    if hangup == SIG_IGN || handled.is_err() {
        // SAFETY: either SIG_IGN, or what was there before.
        unsafe { signal(SIGHUP, hangup) };
    }
}

/// The signal of a terminal that goes away, and what ignores a signal (signal(7), signal(2)).
const SIGHUP: c_int = 1;
const SIG_IGN: usize = 1;

unsafe extern "C" {
    /// Ends the process without what libraries have registered for its end: they may wait for the
    /// very thing that does not come to an end.
    safe fn _exit(status: c_int) -> !;

    /// Sets what becomes of a signal, and returns what became of it before.
    fn signal(signal: c_int, handler: usize) -> usize;
}

/// Whether the user has asked to stop.
pub(crate) fn requested() -> bool {
    STOP.load(Ordering::SeqCst)
}

/// The flag behind [`requested`], for work that looks at it itself.
pub(crate) fn flag() -> &'static AtomicBool {
    actions().watched = true;
    &STOP
}

/// Calls `cancel` at the first ctrl-C, or now if that was before.
pub(crate) fn on_stop(cancel: impl Fn() + Send + 'static) {
    let mut actions = actions();
    if requested() {
        cancel();
    }
    actions.cancel.push(Box::new(cancel));
}

/// How soon a ctrl-C is noticed while work goes on that cannot be stopped.
const NOTICED: Duration = Duration::from_millis(20);

/// Does `work` on a thread of its own, and leaves it to itself at the first ctrl-C: for what nothing
/// can stop and what the end of the program may cut off anywhere.
pub(crate) fn unless_stopped<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Failure> {
    actions().watched = true;
    let (send, receive) = channel();
    let worker = thread::Builder::new().name("fst-work".to_owned()).spawn(move || {
        // Nobody waits for it once the user has asked to stop.
        let _ = send.send(work());
    });
    let worker = worker.map_err(Failure::of)?;
    loop {
        match receive.recv_timeout(NOTICED) {
            Ok(done) => return Ok(done),
            Err(RecvTimeoutError::Timeout) if requested() => return Err(Failure::Interrupted),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => match worker.join() {
                Err(panic) => std::panic::resume_unwind(panic),
                Ok(()) => return Err(Failure::Interrupted),
            },
        }
    }
}

/// A temporary folder that is removed when it goes out of scope, and at a second ctrl-C.
#[derive(Debug)]
pub(crate) struct TemporaryFolder {
    folder: tempfile::TempDir,
}

impl TemporaryFolder {
    /// Makes a folder in the system's place for temporary files.
    pub(crate) fn new() -> std::io::Result<Self> {
        // A signal meanwhile waits, and finds the folder.
        let mut actions = actions();
        let folder = tempfile::Builder::new().prefix("fst-").tempdir()?;
        actions.folders.push(folder.path().to_owned());
        Ok(Self { folder })
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        // The folder itself goes with `TempDir`.
        let path = self.folder.path();
        actions().folders.retain(|folder| folder != path);
    }
}
