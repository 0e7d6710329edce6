//! Copies between memories that exist already: rows within a device, runs between devices and to and
//! from the host, fills and casts. Each batch is queued on one stream and waited for once.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use cudarc::driver::sys;

use crate::cuda::device::CudaDevice;
use crate::cuda::kernel::{Kernel, StridedJob};
use crate::cuda::pipeline::{From, copy_rows, copy_within, push_run};
use crate::cuda::stream::Stream;
use crate::error::Result;

/// Longest distance from row to row that copies of rows are given; the driver's limit on all devices
/// so far (`CU_DEVICE_ATTRIBUTE_MAX_PITCH`).
const MAX_PITCH: u64 = i32::MAX as u64;

/// One piece of work of a batch. Addresses are of the [`Transfers`]' device unless said otherwise.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Transfer<'a> {
    /// Rows, equally long and equally far apart, within the device.
    Rows {
        /// The first row.
        source: u64,
        /// Bytes from row to row there.
        source_pitch: u64,
        /// Where it goes.
        destination: u64,
        /// Bytes from row to row there.
        destination_pitch: u64,
        /// Bytes of a row.
        width: u64,
        /// Rows.
        rows: u64,
    },
    /// From another device's memory.
    FromDevice {
        /// The other device.
        device: &'a CudaDevice,
        /// Address there.
        source: u64,
        /// Address here.
        destination: u64,
        /// Bytes.
        len: u64,
    },
    /// From host memory, pinned or not.
    FromHost {
        /// Address on the host.
        source: u64,
        /// Address on the device.
        destination: u64,
        /// Bytes.
        len: u64,
    },
    /// To host memory, pinned or not.
    ToHost {
        /// Address on the device.
        source: u64,
        /// Address on the host.
        destination: u64,
        /// Bytes.
        len: u64,
    },
    /// Zeros.
    Zero {
        /// The first byte.
        destination: u64,
        /// Bytes.
        len: u64,
    },
    /// A gather or a cast within the device.
    Run {
        /// [`Kernel::Gather`] or [`Kernel::Cast`].
        kernel: Kernel,
        /// What it does.
        job: StridedJob,
    },
}

/// Carries out batches of [`Transfer`]s on a device. Threads that use it at the same time have a
/// stream each; streams are made as they are needed and kept.
pub struct Transfers {
    device: CudaDevice,
    idle: Mutex<Vec<Stream>>,
}

impl Transfers {
    /// Transfers on `device`; makes the first stream.
    ///
    /// # Errors
    ///
    /// The driver's.
    pub fn new(device: &CudaDevice) -> Result<Self> {
        let idle = Mutex::new(vec![Stream::new(device)?]);
        Ok(Self { device: device.clone(), idle })
    }

    /// The device.
    pub fn device(&self) -> &CudaDevice {
        &self.device
    }

    /// Carries out a batch, in no particular order, and waits until all of it is done; after an error
    /// too nothing of it runs any more.
    ///
    /// # Errors
    ///
    /// The driver's.
    ///
    /// # Safety
    ///
    /// All ranges are allocated where the transfer says, sources are initialised, destinations overlap
    /// neither each other nor a source, and nobody else uses them until this returns. For
    /// [`Transfer::Run`] also as for [`Stream::run`].
    pub unsafe fn run(&self, batch: &[Transfer<'_>]) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let stream = match idle {
            Some(stream) => stream,
            None => Stream::new(&self.device)?,
        };
        // SAFETY: the caller's contract; the stream is waited for below.
        let queued = unsafe { enqueue(&stream, batch) };
        // What is queued must have run, or never run, before anybody frees what it uses.
        let done = stream.synchronize();
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(stream);
        queued.and(done)
    }
}

impl fmt::Debug for Transfers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Transfers").field(&self.device).finish()
    }
}

/// # Safety
///
/// As for [`Transfers::run`], until the stream's work has run.
unsafe fn enqueue(stream: &Stream, batch: &[Transfer<'_>]) -> Result<()> {
    let device = stream.device();
    let _current = device.make_current()?;
    let mut runs = Vec::new();
    for transfer in batch {
        // SAFETY: the caller's contract, for each transfer.
        unsafe {
            match *transfer {
                Transfer::Rows {
                    source,
                    source_pitch,
                    destination,
                    destination_pitch,
                    width,
                    rows,
                } => {
                    if rows == 1 || (source_pitch == width && destination_pitch == width) {
                        push_run(&mut runs, (source, destination, width * rows));
                    } else if source_pitch.max(destination_pitch) > MAX_PITCH {
                        for row in 0..rows {
                            let (from, to) = (row * source_pitch, row * destination_pitch);
                            push_run(&mut runs, (source + from, destination + to, width));
                        }
                    } else {
                        let (from, to) = ((source, source_pitch), (destination, destination_pitch));
                        copy_rows(stream, From::Device, from, to, (width, rows))?;
                    }
                }
                Transfer::FromDevice { device: other, source, destination, len } if len > 0 => {
                    let result = sys::cuMemcpyPeerAsync(
                        destination,
                        device.context(),
                        source,
                        other.context(),
                        len as usize,
                        stream.handle(),
                    );
                    device.check(result, "cuMemcpyPeerAsync")?;
                }
                Transfer::FromHost { source, destination, len } if len > 0 => {
                    let (source, len) = (source as *const _, len as usize);
                    let result =
                        sys::cuMemcpyHtoDAsync_v2(destination, source, len, stream.handle());
                    device.check(result, "cuMemcpyHtoDAsync")?;
                }
                Transfer::ToHost { source, destination, len } if len > 0 => {
                    let (destination, len) = (destination as *mut _, len as usize);
                    let result =
                        sys::cuMemcpyDtoHAsync_v2(destination, source, len, stream.handle());
                    device.check(result, "cuMemcpyDtoHAsync")?;
                }
                Transfer::Zero { destination, len } if len > 0 => {
                    let result =
                        sys::cuMemsetD8Async(destination, 0, len as usize, stream.handle());
                    device.check(result, "cuMemsetD8Async")?;
                }
                Transfer::Run { kernel, job } => stream.run(kernel, job)?,
                _ => {}
            }
        }
    }
    // SAFETY: as above.
    unsafe { copy_within(stream, 0, &runs) }
}

impl CudaDevice {
    /// Lets this device read `other`'s memory directly where the machine can; without, copies between
    /// the two go through the host. It stays so for the rest of the process. `false` where it cannot.
    /// Its own memory a device always reads.
    ///
    /// # Errors
    ///
    /// The driver's.
    pub fn enable_peer_access(&self, other: &Self) -> Result<bool> {
        if self == other {
            return Ok(true);
        }
        let number = |device: &Self| {
            let mut number = 0;
            // SAFETY: the driver is initialised; a valid out pointer.
            let result = unsafe { sys::cuDeviceGet(&mut number, device.ordinal() as i32) };
            device.check(result, "cuDeviceGet").map(|()| number)
        };
        let (here, there, mut can) = (number(self)?, number(other)?, 0);
        // SAFETY: two devices of the driver's; a valid out pointer.
        let result = unsafe { sys::cuDeviceCanAccessPeer(&mut can, here, there) };
        self.check(result, "cuDeviceCanAccessPeer")?;
        if can == 0 {
            return Ok(false);
        }
        let _current = self.make_current()?;
        // SAFETY: the other context is retained by `other`.
        match unsafe { sys::cuCtxEnablePeerAccess(other.context(), 0) } {
            sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(true),
            // Eight peers at most, on some systems; parts of a device, and containers, have none.
            sys::CUresult::CUDA_ERROR_TOO_MANY_PEERS
            | sys::CUresult::CUDA_ERROR_PEER_ACCESS_UNSUPPORTED
            | sys::CUresult::CUDA_ERROR_NOT_PERMITTED
            | sys::CUresult::CUDA_ERROR_NOT_SUPPORTED => Ok(false),
            result => self.check(result, "cuCtxEnablePeerAccess").map(|()| true),
        }
    }
}

impl Stream {
    /// Whether all work queued so far has run; an error that the work met comes back here.
    ///
    /// # Errors
    ///
    /// The driver's.
    pub fn is_done(&self) -> Result<bool> {
        let _current = self.device().make_current()?;
        // SAFETY: the handle is live.
        match unsafe { sys::cuStreamQuery(self.handle()) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => self.device().check(result, "cuStreamQuery").map(|()| true),
        }
    }
}
