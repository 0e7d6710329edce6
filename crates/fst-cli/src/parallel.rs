//! Work of many independent parts, on several threads.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// Cores that this process may use.
pub(crate) fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// What `work` gives for each of `0..count`, in order, on up to so many threads. The first error ends it.
pub(crate) fn map<T: Send, E: Send>(
    threads: usize,
    count: usize,
    work: impl Fn(usize) -> Result<T, E> + Sync,
) -> Result<Vec<T>, E> {
    let next = AtomicUsize::new(0);
    let share = || {
        let mut done = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= count {
                return Ok(done);
            }
            // After an error nobody goes on.
            done.push((at, work(at).inspect_err(|_| next.store(count, Ordering::Relaxed))?));
        }
    };
    thread::scope(|scope| {
        // A machine out of threads does it with those it has.
        let spawn = |_| thread::Builder::new().spawn_scoped(scope, share).ok();
        let others: Vec<_> = (1..threads.min(count)).map_while(spawn).collect();
        let mut done = share()?;
        for other in others {
            match other.join() {
                Ok(part) => done.extend(part?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        done.sort_unstable_by_key(|(at, _)| *at);
        Ok(done.into_iter().map(|(_, result)| result).collect())
    })
}
