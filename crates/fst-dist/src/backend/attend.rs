//! What a rank tells its group while it loads.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use crate::group::Group;

/// How soon a rank that waits for others notices that its load was cancelled, and how often one that reads
/// tells that it is alive.
const WATCH_INTERVAL: Duration = Duration::from_millis(50);

/// Runs `load` while another thread attends to the group: it ends it when the load is cancelled, which a
/// rank that waits for others does not see, and tells that this rank is alive when `bytes` have moved,
/// which a rank that reads for long does not stop to tell.
pub(super) fn attending<T>(
    group: &dyn Group,
    cancelled: &(dyn Fn() -> bool + Sync),
    bytes: &(dyn Fn() -> u64 + Sync),
    load: impl FnOnce() -> T,
) -> T {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watcher = std::thread::Builder::new().name("fst-attend".to_owned());
        let watcher = watcher.spawn_scoped(scope, || {
            let mut known = bytes();
            while !done.load(Relaxed) {
                if cancelled() {
                    return group.abort("cancelled");
                }
                let now = bytes();
                if std::mem::replace(&mut known, now) != now {
                    group.alive();
                }
                std::thread::park_timeout(WATCH_INTERVAL);
            }
        });
        let _stop = Done(&done, watcher.as_ref().ok().map(|watcher| watcher.thread()));
        load()
    })
}

/// Ends the watcher when dropped, also by a panic: the scope waits for it.
struct Done<'a>(&'a AtomicBool, Option<&'a std::thread::Thread>);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
        if let Some(watcher) = self.1 {
            watcher.unpark();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;
    use crate::LocalGroup;
    use crate::group::{Control, HostCopier};

    #[test]
    fn a_rank_is_waited_for_while_its_bytes_move() {
        let deadline = Duration::from_millis(800);
        for moves in [true, false] {
            let mut groups = LocalGroup::with(2, HostCopier, deadline);
            let (other, group) = (groups.remove(1), groups.remove(0));
            let waited = std::thread::scope(|scope| {
                let waited = scope.spawn(move || other.gather_messages(&[]));
                // One read that takes longer than the deadline.
                let bytes = AtomicU64::new(0);
                attending(&group, &|| false, &|| bytes.load(Relaxed), || {
                    for _ in 0..24 {
                        std::thread::sleep(deadline / 8);
                        bytes.fetch_add(moves.into(), Relaxed);
                    }
                });
                let _ = group.gather_messages(&[]);
                waited.join()
            });
            let waited = waited.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            assert_eq!(waited.is_ok(), moves, "{waited:?}");
        }
    }
}
