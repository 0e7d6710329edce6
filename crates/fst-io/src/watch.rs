//! One load's reads, watched together: how far they are, what they should read first, and their end.

use std::cell::Cell;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::engine::Control;
use crate::error::Error;
use crate::stats::ReadStats;

/// What a read of a load is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Tensors that are usable where they land.
    Placed,
    /// Tensors that are moved, cut or converted on their way.
    Transformed,
}

/// Follows the reads of one load: how many bytes they brought, what is wanted first, and whether to end.
#[derive(Debug, Default)]
pub struct Watch {
    flag: Arc<AtomicBool>,
    /// That of the user's token, where `flag` is not.
    token: Option<Arc<AtomicBool>>,
    reads: Mutex<Reads>,
    /// Whether anything may be preferred.
    may_prefer: bool,
    /// Pieces of work on what has landed that are not done.
    work: AtomicUsize,
}

/// The reads that have begun, and what was preferred, whether its read has begun or not.
#[derive(Debug, Default)]
struct Reads {
    controls: Vec<(Option<Part>, Arc<Control>)>,
    preferred: Vec<(Part, Range<u32>)>,
}

impl Watch {
    /// Of a load that ends by `flag`.
    pub fn new(flag: Arc<AtomicBool>) -> Self {
        Self { flag, ..Self::default() }
    }

    /// Of a load that goes on in the background, and ends by `token` or by [`stop`](Self::stop). With
    /// `may_prefer`, tensors may be preferred.
    pub fn background(token: Arc<AtomicBool>, may_prefer: bool) -> Self {
        Self { token: Some(token), may_prefer, ..Self::default() }
    }

    /// Marks this thread as one of the load's own.
    pub fn enter(&self) -> Entered {
        Entered(ENTERED.replace(std::ptr::from_ref(self) as usize))
    }

    /// Whether this thread is one of the load's own.
    pub fn is_entered(&self) -> bool {
        ENTERED.get() == std::ptr::from_ref(self) as usize
    }

    /// Whether anything may be preferred.
    pub fn may_prefer(&self) -> bool {
        self.may_prefer
    }

    /// Counts a piece of work on what has landed, which goes on beside the reads.
    pub fn begin_work(&self) {
        self.work.fetch_add(1, Relaxed);
    }

    /// Ends such a piece of work.
    pub fn end_work(&self) {
        self.work.fetch_sub(1, Relaxed);
    }

    /// Whether such work goes on.
    pub fn is_working(&self) -> bool {
        self.work.load(Relaxed) > 0
    }

    /// Ends the reads.
    pub fn stop(&self) {
        self.flag.store(true, Relaxed);
    }

    /// Whether the reads are to end.
    pub fn is_stopped(&self) -> bool {
        let is_set = |flag: &Arc<AtomicBool>| flag.load(Relaxed);
        is_set(&self.flag) || self.token.as_ref().is_some_and(is_set)
    }

    fn reads(&self) -> MutexGuard<'_, Reads> {
        self.reads.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Follows one more read.
    pub fn next(&self) -> Arc<Control> {
        self.follow(None)
    }

    /// Follows one more read, of a part whose extents may be preferred.
    pub fn next_of(&self, part: Part) -> Arc<Control> {
        self.follow(Some(part))
    }

    /// Follows one more read, of a part whose extents may be preferred if there is one.
    fn follow(&self, part: Option<Part>) -> Arc<Control> {
        let control = Control::with_flag(self.flag.clone());
        let control = Arc::new(match &self.token {
            Some(token) => control.within(token.clone()),
            None => control,
        });
        let mut reads = self.reads();
        let wanted = reads.preferred.iter().filter(|(of, _)| Some(*of) == part);
        wanted.for_each(|(_, extents)| control.prefer(extents.clone()));
        reads.controls.push((part, control.clone()));
        control
    }

    /// Has these extents read before others of the same part.
    pub fn prefer(&self, part: Part, extents: Range<u32>) {
        let mut reads = self.reads();
        let begun = reads.controls.iter().filter(|(of, _)| *of == Some(part));
        begun.for_each(|(_, control)| control.prefer(extents.clone()));
        reads.preferred.push((part, extents));
    }

    /// Bytes that have been read so far.
    pub fn bytes(&self) -> u64 {
        self.reads().controls.iter().map(|(_, control)| control.landed_bytes()).sum()
    }
}

thread_local! {
    /// Address of the watch of the load that this thread is of; 0 for others.
    static ENTERED: Cell<usize> = const { Cell::new(0) };
}

/// Ends the mark of a thread, by what was there before.
#[derive(Debug)]
pub struct Entered(usize);

impl Drop for Entered {
    fn drop(&mut self) {
        ENTERED.set(self.0);
    }
}

/// Carries out two reads at once; the first that fails ends the other.
///
/// # Panics
///
/// If one of them does.
pub fn both(
    watch: &Watch,
    mut one: impl FnMut() -> Result<ReadStats, Error> + Send,
    mut other: impl FnMut() -> Result<ReadStats, Error>,
) -> (Result<ReadStats, Error>, Result<ReadStats, Error>) {
    /// Ends the other read also where one panics.
    struct Other<'w>(&'w Watch, bool);
    impl Drop for Other<'_> {
        fn drop(&mut self) {
            if !self.1 {
                self.0.stop();
            }
        }
    }
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("fst-read".to_owned());
        let carry_out = |read: &mut dyn FnMut() -> Result<ReadStats, Error>| {
            let mut other = Other(watch, false);
            let result = read();
            other.1 = result.is_ok();
            result
        };
        match thread.spawn_scoped(scope, move || carry_out(&mut one)) {
            Ok(thread) => {
                let other = carry_out(&mut other);
                let one = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                (one, other)
            }
            Err(source) => {
                let what = "a thread for reads";
                (Err(Error::Setup { what, source }), Err(Error::Cancelled))
            }
        }
    })
}
