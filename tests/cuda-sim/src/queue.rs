//! Streams: queued work, and when it runs.

use crate::POISON;
use crate::clock::Engine;
use crate::codes::*;
use crate::memory::HostKind;
use crate::world::{Due, Outcome, World};
use std::collections::VecDeque;
use std::ffi::c_void;

/// A kernel on the host.
pub(crate) type HostKernel = unsafe extern "C" fn(*const u32, *const u32, *mut *mut c_void);

/// Where a copy reads.
pub(crate) enum Source {
    /// Device or pinned memory: read when the copy runs.
    Live(u64),
    /// Pageable memory, which may be read at the call or when the copy runs: it must not change in
    /// between.
    Snapshot { bytes: Vec<u8>, address: u64 },
}

/// Rows of bytes; a plain copy has one.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) width: usize,
    pub(crate) rows: usize,
    pub(crate) src_pitch: usize,
    pub(crate) dst_pitch: usize,
}

impl Shape {
    pub(crate) fn flat(len: usize) -> Self {
        Self { width: len, rows: 1, src_pitch: len, dst_pitch: len }
    }

    fn span(&self, pitch: usize) -> usize {
        if self.rows == 0 || self.width == 0 { 0 } else { (self.rows - 1) * pitch + self.width }
    }

    pub(crate) fn src_span(&self) -> usize {
        self.span(self.src_pitch)
    }

    pub(crate) fn dst_span(&self) -> usize {
        self.span(self.dst_pitch)
    }
}

/// One queued operation.
pub(crate) enum Work {
    Copy { dst: u64, src: Source, shape: Shape },
    Set { dst: u64, value: u8, len: usize },
    Launch { kernel: HostKernel, grid: [u32; 3], block: [u32; 3], params: Vec<Vec<u8>> },
    Wait { stream: u64, upto: u64 },
    Free { address: u64 },
    Record,
}

impl Work {
    fn is_marker(&self) -> bool {
        matches!(self, Work::Wait { .. } | Work::Record)
    }

    /// Whether the operation reads or writes within `address..address + len`.
    fn touches(&self, address: u64, len: usize) -> bool {
        let hit = |a: u64, n: usize| a < address + len as u64 && address < a + n as u64;
        match self {
            Work::Copy { dst, src, shape } => {
                hit(*dst, shape.dst_span())
                    || matches!(src, Source::Live(a) if hit(*a, shape.src_span()))
            }
            Work::Set { dst, len, .. } => hit(*dst, *len),
            // Any argument may be a pointer.
            Work::Launch { params, .. } => params
                .iter()
                .any(|p| p.as_chunks::<8>().0.iter().any(|&word| hit(u64::from_ne_bytes(word), 1))),
            Work::Wait { .. } | Work::Free { .. } | Work::Record => false,
        }
    }
}

/// A stream.
pub(crate) struct Stream {
    pub(crate) device: usize,
    pub(crate) legacy: bool,
    /// Takes part in the legacy default stream's implicit synchronisation.
    pub(crate) blocking: bool,
    pub(crate) destroyed: bool,
    pub(crate) queries: u32,
    /// Position of the last operation queued, and of the last that ran; positions start at 1.
    pub(crate) queued: u64,
    pub(crate) done: u64,
    work: VecDeque<Work>,
    /// When each of them ends, and the last that was queued; 0 without a clock.
    ends: VecDeque<u64>,
    last: u64,
}

impl Stream {
    pub(crate) fn new(device: usize, legacy: bool, blocking: bool) -> Self {
        Self {
            device,
            legacy,
            blocking,
            destroyed: false,
            queries: 0,
            queued: 0,
            done: 0,
            work: VecDeque::new(),
            ends: VecDeque::new(),
            last: 0,
        }
    }

    /// When the work up to a position ends.
    fn ends(&self, upto: u64) -> u64 {
        let ahead = upto.min(self.queued).saturating_sub(self.done) as usize;
        ahead.checked_sub(1).and_then(|at| self.ends.get(at).copied()).unwrap_or_default()
    }

    fn append(&mut self, work: Work) -> u64 {
        self.work.push_back(work);
        self.queued += 1;
        self.queries = 0;
        self.queued
    }

    /// Operations queued that move data.
    pub(crate) fn work_pending(&self) -> usize {
        self.work.iter().filter(|w| !w.is_marker()).count()
    }
}

/// Reads pinned host memory as a device does, to which a mapping of a file that shrank is no signal:
/// whatever cannot be read any more is poison. (A device finds the pages that were pinned.)
fn read_pinned(address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![POISON; len];
    let local = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: len };
    let remote = libc::iovec { iov_base: address as *mut c_void, iov_len: len };
    // SAFETY: `bytes` holds `len` bytes; the other side is read by the kernel, which checks it.
    unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) };
    bytes
}

impl World {
    /// Resolves a stream handle in the current context.
    pub(crate) fn stream(&mut self, handle: u64) -> Result<u64, i32> {
        let here = self.here()?;
        if handle <= 2 {
            return Ok(self.devices[here].legacy);
        }
        let owner = self.streams.get(&handle).filter(|s| !s.destroyed).map(|s| s.device);
        match owner {
            Some(device) if device == here => Ok(handle),
            Some(device) => {
                self.violation(format!(
                    "stream of device {device} used while the context of device {here} is current"
                ));
                Err(ERROR_INVALID_CONTEXT)
            }
            None => {
                self.violation(format!("stream {handle:#x} does not exist"));
                Err(ERROR_INVALID_HANDLE)
            }
        }
    }

    /// When the work of a stream up to a position ends.
    pub(crate) fn ends(&self, stream: u64, upto: u64) -> u64 {
        self.streams.get(&stream).map_or(0, |s| s.ends(upto))
    }

    /// Whether the work of a stream up to a position takes longer still.
    pub(crate) fn takes_longer(&self, stream: u64, upto: u64) -> bool {
        self.clock.now().is_some_and(|now| self.ends(stream, upto) > now)
    }

    /// When work that is queued behind all of a stream's ends.
    fn schedule(&mut self, stream: &Stream, work: &Work) -> u64 {
        let bytes = |shape: &Shape| (shape.width * shape.rows) as u64;
        let (engine, bytes) = match work {
            Work::Copy { src: Source::Snapshot { .. }, shape, .. } => {
                (Engine::ToDevice, bytes(shape))
            }
            Work::Copy { dst, src: Source::Live(src), shape } => {
                let on_device = |address: u64| self.memory.owner(address, 1).is_some();
                let engine = match (on_device(*src), on_device(*dst)) {
                    (false, _) => Engine::ToDevice,
                    (true, true) => Engine::Within,
                    (true, false) => Engine::ToHost,
                };
                (engine, bytes(shape))
            }
            Work::Set { len, .. } => (Engine::Within, *len as u64),
            Work::Launch { .. } => (Engine::Kernels, 0),
            Work::Wait { stream: other, upto } => return stream.last.max(self.ends(*other, *upto)),
            Work::Free { .. } | Work::Record => return stream.last,
        };
        self.clock.schedule(stream.device, engine, bytes, stream.last)
    }

    fn append(&mut self, stream: u64, work: Work) -> u64 {
        let Some(mut s) = self.streams.remove(&stream) else {
            return 0;
        };
        s.last = self.schedule(&s, &work);
        s.ends.push_back(s.last);
        let position = s.append(work);
        self.streams.insert(stream, s);
        position
    }

    /// Queues work on a stream; its position. Nothing runs.
    pub(crate) fn enqueue(&mut self, stream: u64, work: Work) -> u64 {
        let Some(s) = self.streams.get(&stream) else {
            return 0;
        };
        let (device, legacy, blocking) = (s.device, s.legacy, s.blocking);
        let waits: Vec<(u64, u64)> = self
            .streams
            .iter()
            .filter(|&(&id, o)| {
                id != stream
                    && o.device == device
                    && o.queued > o.done
                    && ((legacy && o.blocking) || (blocking && o.legacy))
            })
            .map(|(&id, o)| (id, o.queued))
            .collect();
        for (stream_waited, upto) in waits {
            self.append(stream, Work::Wait { stream: stream_waited, upto });
        }
        self.append(stream, work)
    }

    /// Runs a stream's work up to a position, and what that waits for. Work that takes longer than until now
    /// runs when the call has waited for it.
    pub(crate) fn drain(&mut self, stream: u64, upto: u64) -> Outcome {
        if self.takes_longer(stream, upto) {
            let target = self.host.call_target();
            self.due.push(Due { stream, upto, target });
            return Ok(());
        }
        self.run_to(stream, upto)
    }

    /// Runs a stream's work up to a position, and what that waits for, whatever the time.
    pub(crate) fn run_to(&mut self, stream: u64, upto: u64) -> Outcome {
        loop {
            let Some(s) = self.streams.get_mut(&stream) else {
                return Ok(());
            };
            let device = s.device;
            if let Some(code) = self.devices[device].error {
                return Err(code);
            }
            if s.done >= upto {
                return Ok(());
            }
            let Some(work) = s.work.pop_front() else {
                return Ok(());
            };
            s.ends.pop_front();
            let result = match work {
                Work::Wait { stream, upto } => self.run_to(stream, upto),
                work => self.run(device, work),
            };
            if let Some(s) = self.streams.get_mut(&stream) {
                s.done += 1;
            }
            if let Err(code) = result {
                // The context is dead: nothing of it runs any more.
                self.devices[device].error.get_or_insert(code);
                for s in self.streams.values_mut().filter(|s| s.device == device) {
                    s.work.clear();
                    s.ends.clear();
                    s.done = s.queued;
                }
                return Err(code);
            }
        }
    }

    /// Runs everything of a device, the youngest streams first.
    pub(crate) fn drain_device(&mut self, device: usize) -> Outcome {
        let all: Vec<(u64, u64)> = self
            .streams
            .iter()
            .rev()
            .filter(|(_, s)| s.device == device)
            .map(|(&id, s)| (id, s.queued))
            .collect();
        let mut result = Ok(());
        for (stream, upto) in all {
            result = result.and(self.drain(stream, upto));
        }
        self.streams.retain(|_, s| !(s.destroyed && s.queued == s.done));
        result
    }

    /// Records a violation when queued work still refers to memory that is going away.
    pub(crate) fn check_unused(&mut self, call: &str, address: u64, len: usize) {
        let count: usize = self
            .streams
            .values()
            .map(|s| s.work.iter().filter(|w| w.touches(address, len)).count())
            .sum();
        if count > 0 {
            self.violation(format!(
                "{call} of memory that {count} operations still queued refer to"
            ));
        }
    }

    fn run(&mut self, device: usize, work: Work) -> Outcome {
        match work {
            Work::Copy { dst, src, shape } => {
                if let Some(code) = self.injected("run:copy", Some(device)) {
                    return Err(code);
                }
                self.check_reachable("destination", dst, shape.dst_span())?;
                self.copied_bytes += (shape.rows * shape.width) as u64;
                if self.discard {
                    return Ok(());
                }
                if let Source::Live(address) = src {
                    self.check_reachable("source", address, shape.src_span())?;
                }
                let from = match &src {
                    Source::Live(address) => *address as *const u8,
                    Source::Snapshot { bytes, address } => {
                        if read_pinned(*address, bytes.len()) != *bytes {
                            self.violation(format!(
                                "pageable memory at {address:#x} changed before the copy of its {} \
                                 bytes ran",
                                bytes.len()
                            ));
                        }
                        bytes.as_ptr()
                    }
                };
                let mut pinned = Vec::new();
                let from = match &src {
                    Source::Live(address) if self.memory.owner(*address, 1).is_none() => {
                        pinned = read_pinned(*address, shape.src_span());
                        pinned.as_ptr()
                    }
                    _ => from,
                };
                for row in 0..shape.rows {
                    // SAFETY: both spans were checked to lie in live memory just above (a
                    // snapshot holds `src_span` bytes by construction), and rows stay in them.
                    unsafe {
                        std::ptr::copy(
                            from.add(row * shape.src_pitch),
                            (dst as *mut u8).add(row * shape.dst_pitch),
                            shape.width,
                        );
                    }
                }
                drop(pinned);
            }
            Work::Set { .. } | Work::Launch { .. } if self.discard => {}
            Work::Set { dst, value, len } => {
                self.check_reachable("destination", dst, len)?;
                // SAFETY: the range was checked to lie in live memory.
                unsafe { (dst as *mut u8).write_bytes(value, len) };
            }
            Work::Launch { kernel, grid, block, mut params } => {
                if let Some(code) = self.injected("run:launch", Some(device)) {
                    return Err(code);
                }
                let mut pointers: Vec<*mut c_void> =
                    params.iter_mut().map(|p| p.as_mut_ptr().cast()).collect();
                // SAFETY: the kernel was registered for this entry and the arguments were copied
                // with the sizes that its PTX declares; that it stays in bounds is what is tested.
                unsafe { kernel(grid.as_ptr(), block.as_ptr(), pointers.as_mut_ptr()) };
            }
            Work::Free { address } => {
                if let Ok((len, _)) = self.memory.free(address) {
                    self.devices[device].used -= self.taken(len);
                } else {
                    self.violation("cuMemFreeAsync of memory that is not allocated".into());
                }
            }
            Work::Wait { .. } | Work::Record => {}
        }
        Ok(())
    }

    /// Memory that a running operation may touch: live device memory or pinned host memory.
    /// Pageable host memory appears only as the target of a copy that was drained in its call.
    fn check_reachable(&mut self, what: &str, address: u64, len: usize) -> Outcome {
        if len == 0
            || self.memory.owner(address, len).is_some()
            || self.host.kind(address, len) == HostKind::Pinned
            || self.host.is_call_target(address, len)
        {
            return Ok(());
        }
        self.violation(format!(
            "a copy's {what} ({len} bytes at {address:#x}) was freed before the copy ran"
        ));
        Err(ERROR_ILLEGAL_ADDRESS)
    }
}
