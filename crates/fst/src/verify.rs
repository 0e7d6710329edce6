//! Holding loads to a manifest: tensors are hashed by threads while later ones are read.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use fst_io::sink::SinkError;

use crate::error::{Error, Result};
use crate::files::from_sink;
use crate::load::Deliver;
use crate::loader::Loader;
use crate::report::LoadReport;
use crate::tensor::Tensor;
use fst_format::{Checkpoint, Manifest, Planned, VerifyError};
use fst_io::watch::Watch;

/// Bytes of an arena where tensors are hashed: short, so that there is soon something to hash.
pub(crate) const VERIFY_ARENA: u64 = 64 << 20;

impl Loader {
    /// Holds what is loaded to a manifest: every tensor's bytes, as they are loaded, must have the
    /// sum that it says. Threads hash tensors while later ones are read; a
    /// [`stream`](Self::stream) yields only tensors that were right.
    ///
    /// Every selected tensor must be in the manifest, and every tensor of the manifest in the
    /// checkpoint, selected or not. Hashing takes a core for each 1 to 2 GB/s, and one tensor is
    /// hashed by one core: the sums, not storage, can bound the load.
    #[must_use]
    pub fn verify(mut self, manifest: Manifest) -> Self {
        self.manifest = Some(Arc::new(manifest));
        self
    }

    /// Refuses what the manifest, if there is one, does not know as it would be loaded.
    pub(crate) fn check_manifest(&self, checkpoint: &Checkpoint, items: &[Planned]) -> Result<()> {
        match &self.manifest {
            Some(manifest) => Ok(manifest.check(checkpoint, items.iter().map(Planned::as_loaded))?),
            None => Ok(()),
        }
    }
}

/// What hashing cost.
#[derive(Debug, Default)]
pub(crate) struct Hashed {
    bytes: AtomicU64,
    /// Nanoseconds, added up over threads.
    busy: AtomicU64,
    /// Nanoseconds for which nothing was left to do but hash.
    tail: AtomicU64,
}

impl Hashed {
    /// Adds what hashing cost to a report, behind the stage that it went on beside.
    pub(crate) fn report(&self, report: &mut LoadReport) {
        let bytes = self.bytes.load(Relaxed);
        report.push("verify", Duration::from_nanos(self.tail.load(Relaxed)), bytes);
        report.push_part("verify.hash", Duration::from_nanos(self.busy.load(Relaxed)), bytes);
    }

    pub(crate) fn check(
        &self,
        manifest: &Manifest,
        name: &str,
        bytes: &[u8],
    ) -> Result<(), VerifyError> {
        let began = Instant::now();
        let result = manifest.check_bytes(name, bytes);
        self.busy.fetch_add(began.elapsed().as_nanos() as u64, Relaxed);
        self.bytes.fetch_add(bytes.len() as u64, Relaxed);
        result
    }
}

/// Runs `load`; the tensors that it delivers are hashed by threads of their own, and those that
/// are right go on to `deliver`. A wrong one ends the load.
pub(crate) fn verified<T>(
    manifest: &Manifest,
    hashed: &Hashed,
    watch: &Watch,
    deliver: Deliver<'_>,
    load: impl FnOnce(Deliver<'_>) -> Result<T>,
) -> Result<T> {
    let (send, receive) = mpsc::channel::<(usize, Tensor)>();
    let receive = Mutex::new(receive);
    // One thread at a time waits for the next tensor, the others for it.
    let next = || receive.lock().unwrap_or_else(|e| e.into_inner()).recv();
    let failure: Mutex<Option<Error>> = Mutex::new(None);
    let over = AtomicBool::new(false);
    let failed =
        || over.load(Relaxed) || failure.lock().unwrap_or_else(|e| e.into_inner()).is_some();
    let fail = |error| {
        failure.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(error);
    };
    let check = |index, tensor: Tensor| -> Result<()> {
        let host = tensor.to_host()?;
        hashed.check(manifest, tensor.info().name(), host.bytes()?)?;
        deliver(index, tensor).map_err(from_sink)
    };
    let hash = || {
        while let Ok((index, tensor)) = next() {
            // After a failure tensors are only dropped: their memory may be what the reader
            // waits for.
            if !failed()
                && let Err(error) = check(index, tensor)
            {
                fail(error);
            }
            watch.end_work();
        }
    };
    let result = thread::scope(|scope| {
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let started = (0..threads)
            .filter_map(|_| {
                let thread = thread::Builder::new().name("fst-verify".to_owned());
                thread.spawn_scoped(scope, hash).ok()
            })
            .count();
        let result = load(&|index, tensor| {
            if failed() {
                return Err(Error::Cancelled.into());
            }
            if started == 0 {
                return check(index, tensor).map_err(SinkError::from);
            }
            watch.begin_work();
            // The receiver lives as long as this function.
            send.send((index, tensor)).map_err(|_| Error::Cancelled.into())
        });
        over.store(result.is_err(), Relaxed);
        drop(send);
        let began = Instant::now();
        hash();
        (result, began)
    });
    let (result, began) = result;
    hashed.tail.fetch_add(began.elapsed().as_nanos() as u64, Relaxed);
    match failure.into_inner().unwrap_or_else(|e| e.into_inner()) {
        Some(error) => Err(error),
        None => result,
    }
}
