//! The threads that move bytes between sockets and memory.

use std::sync::OnceLock;

use tokio::runtime::{Builder, Runtime};

use crate::error::Cause;

/// Two, so that one that decrypts does not hold up the other.
const THREADS: usize = 2;

static RUNTIME: OnceLock<Result<Runtime, String>> = OnceLock::new();

/// Runs a future on the calling thread. It may wait for what the runtime's threads do; and the caller may be
/// a thread of another runtime.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> Result<T, Cause> {
    let runtime = RUNTIME.get_or_init(|| {
        let mut builder = Builder::new_multi_thread();
        builder.worker_threads(THREADS).thread_name("fst-net").enable_io().enable_time();
        builder.build().map_err(|error| error.to_string())
    });
    match runtime {
        Ok(runtime) => {
            let _context = runtime.enter();
            Ok(pollster::block_on(future))
        }
        Err(error) => Err(Cause::Setup { reason: format!("no threads for the network: {error}") }),
    }
}
