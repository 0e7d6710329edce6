//! The progress bar on standard error: shown to people at a terminal, never in the way of a script.

use std::io::{IsTerminal, stderr};
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::text;

/// Whether a bar is on the screen.
static SHOWN: AtomicBool = AtomicBool::new(false);

/// Takes a bar off the screen when the program ends without dropping it; not from a terminal that takes
/// nothing.
pub(crate) fn wipe() {
    let mut ready = [PollFd::from_borrowed_fd(rustix::stdio::stderr(), PollFlags::OUT)];
    if SHOWN.load(Ordering::Relaxed) && poll(&mut ready, Some(&Timespec::default())) == Ok(1) {
        let _ = rustix::io::write(rustix::stdio::stderr(), b"\r\x1b[2K");
    }
}

/// A bar that counts bytes. Removed from the screen when dropped.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// A bar for `bytes` of `doing`, hidden where nobody watches.
    pub(crate) fn new(doing: &'static str, bytes: u64, wanted: bool) -> Self {
        let shown = wanted && !text::is_quiet() && stderr().is_terminal();
        SHOWN.store(shown, Ordering::Relaxed);
        let target =
            if shown { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(bytes), target).with_message(doing);
        // Only a mistake in the template makes this fail; the plain bar does as well.
        if let Ok(style) = ProgressStyle::with_template(
            "{msg} {wide_bar} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta}",
        ) {
            bar.set_style(style);
        }
        Self { bar }
    }

    /// Counts more bytes.
    pub(crate) fn add(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    /// The bar itself, for closures that outlive this value's borrows.
    pub(crate) fn bar(&self) -> ProgressBar {
        self.bar.clone()
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
        SHOWN.store(false, Ordering::Relaxed);
    }
}
