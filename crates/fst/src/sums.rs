//! Sums of tensors that are never in memory whole.

use std::sync::Mutex;
use std::sync::atomic::{
    AtomicU64,
    Ordering::{AcqRel, Acquire},
};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use fst_format::{Checkpoint, Planned};
use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};
use crate::loader::Loader;
use crate::progress::Progress;
use crate::stream::TensorStream;
use crate::tensor::Tensor;
use fst_format::{Checksum, Digest};
use fst_io::available::AvailableMemory;

/// Bytes of a file that are hashed at a time: a multiple of the size of any element.
const PART: u64 = 8 << 20;

/// Memory for parts on their way from the reader to the hash.
const BUDGET: u64 = 256 << 20;

/// A part of a tensor, the first number telling which, and whether it is the last.
type Part = (usize, Tensor, bool);

impl Loader {
    /// The SHA-256 of the bytes of each selected tensor, as [`load`](Self::load) would load them:
    /// through the same engine, to the same device, sliced and converted. Tensors pass in parts, so
    /// that this fills no more memory than the [budget](Self::memory_budget) (by default 256 MiB, or
    /// a quarter of what is available where that is less), however large they are. `told` is called as
    /// parts arrive. In the checkpoint's order.
    ///
    /// # Errors
    ///
    /// As for [`stream`](Self::stream).
    pub fn checksums(
        &self,
        checkpoint: &Checkpoint,
        mut told: impl FnMut(&Progress),
    ) -> Result<Vec<Checksum>> {
        self.ranks.refuse("sums")?;
        let began = Instant::now();
        let items = self.planned(checkpoint)?;
        let mut parts: Vec<Planned> = Vec::with_capacity(items.len());
        // For each part, the tensor that it is of, and whether it is the last.
        let mut of: Vec<(usize, bool)> = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            parts.extend(item.parts(PART));
            of.resize(parts.len(), (index, false));
            if let Some(last) = of.last_mut() {
                last.1 = true;
            }
        }
        // Threads and the program need some, too.
        let quarter = AvailableMemory::now().map_or(BUDGET, |available| available.bytes / 4);
        let budget = self.budget.unwrap_or(BUDGET.min(quarter));
        // Whoever hashes takes as long as that takes.
        let mut loader = self.clone().in_order(true).stall_timeout(Duration::MAX);
        loader.manifest = None;
        loader.budget = Some(budget);
        let stream = match TensorStream::start(&loader, checkpoint, parts.clone()) {
            Err(Error::Budget { needed, .. }) if self.budget.is_none() => {
                loader.budget = Some(needed);
                TensorStream::start(&loader, checkpoint, parts)?
            }
            stream => stream?,
        };
        let mut progress = Progress {
            bytes_done: 0,
            bytes_total: stream.byte_len(),
            tensors_total: items.len(),
            elapsed: began.elapsed(),
        };
        let digests = hash_all(stream, &of, items.len(), |bytes| {
            progress.bytes_done += bytes;
            progress.elapsed = began.elapsed();
            told(&progress);
        })?;
        let sum = |(item, sha256): (&Planned, Digest)| {
            let mut sum = Checksum::new(item.source().name(), sha256);
            sum.dtype = Some(item.dtype());
            sum.shape = Some(item.shape().to_vec());
            sum
        };
        Ok(items.iter().zip(digests).map(sum).collect())
    }
}

impl Tensor {
    /// The sum of its bytes, with its dtype and shape, for a [`Manifest`](crate::Manifest). Bytes on a device
    /// are copied first.
    ///
    /// # Errors
    ///
    /// When copying from a device fails.
    pub fn checksum(&self) -> Result<Checksum> {
        let mut sum = Checksum::new(self.name(), Digest::of(self.to_host()?.bytes()?));
        sum.dtype = Some(self.dtype());
        sum.shape = Some(self.shape().to_vec());
        Ok(sum)
    }
}

/// Hashes the parts that come: those of one tensor by one thread, in order.
fn hash_all(
    stream: TensorStream,
    of: &[(usize, bool)],
    tensors: usize,
    mut arrived: impl FnMut(u64),
) -> Result<Vec<Digest>> {
    let digests: Mutex<Vec<Option<Digest>>> = Mutex::new(vec![None; tensors]);
    let failure: Mutex<Option<Error>> = Mutex::new(None);
    let done = |index: usize, digest: Digest| {
        let mut digests = digests.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(slot) = digests.get_mut(index) {
            *slot = Some(digest);
        }
    };
    let failed = || failure.lock().unwrap_or_else(|e| e.into_inner()).is_some();
    let fail = |error| {
        failure.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(error);
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let (mut senders, queues): (Vec<Sender<Part>>, Vec<Receiver<Part>>) =
        (0..threads).map(|_| channel()).unzip();
    // For each thread, the bytes that it has not hashed yet.
    let lefts: Vec<AtomicU64> = (0..threads).map(|_| AtomicU64::new(0)).collect();
    thread::scope(|scope| -> Result<()> {
        let mut started = 0;
        for (queue, left) in queues.into_iter().zip(&lefts) {
            let work = {
                let (done, fail, failed) = (&done, &fail, &failed);
                move || {
                    let mut state = Sha256::new();
                    for (index, part, last) in queue {
                        // After a failure parts are only dropped: the reader may wait for their memory.
                        if !failed() {
                            match take(&mut state, &part, last) {
                                Ok(Some(digest)) => done(index, digest),
                                Ok(None) => {}
                                Err(error) => fail(error),
                            }
                        }
                        left.fetch_sub(part.byte_len() as u64, AcqRel);
                    }
                }
            };
            let thread = thread::Builder::new().name("fst-sum".to_owned());
            match thread.spawn_scoped(scope, work) {
                Ok(_) => started += 1,
                // Fewer threads are slower and still right.
                Err(_) => break,
            }
        }
        let mut own = (started == 0).then(Sha256::new);
        // Dropped with this closure, also after an error: that ends the threads.
        let mut senders = std::mem::take(&mut senders);
        senders.truncate(started);
        let mut current = 0;
        let mut fresh = true;
        let mut of = of.iter();
        for part in stream {
            // What the stream finds at its end comes after the last part.
            let part = part?;
            let Some(&(index, last)) = of.next() else { break };
            arrived(part.byte_len() as u64);
            if failed() {
                break;
            }
            if let Some(state) = &mut own {
                if let Some(digest) = take(state, &part, last)? {
                    done(index, digest);
                }
                continue;
            }
            if fresh {
                let idle = lefts[..started].iter().enumerate();
                current = idle.min_by_key(|(_, left)| left.load(Acquire)).map_or(0, |(at, _)| at);
            }
            fresh = last;
            lefts[current].fetch_add(part.byte_len() as u64, AcqRel);
            // The receiver is there until the senders go.
            let _ = senders[current].send((index, part, last));
        }
        Ok(())
    })?;
    if let Some(error) = failure.into_inner().unwrap_or_else(|e| e.into_inner()) {
        return Err(error);
    }
    let digests = digests.into_inner().unwrap_or_else(|e| e.into_inner());
    // Every part of a stream that ended well was hashed.
    digests.into_iter().collect::<Option<_>>().ok_or(Error::Cancelled)
}

/// Hashes one more part of a tensor; the sum with the last.
fn take(state: &mut Sha256, part: &Tensor, last: bool) -> Result<Option<Digest>> {
    state.update(part.to_host()?.bytes()?);
    Ok(last.then(|| Digest::from_bytes(state.finalize_reset().into())))
}
