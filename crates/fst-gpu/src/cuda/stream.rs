//! Streams and events, each freed in its own context when dropped.

use crate::cuda::device::CudaDevice;
use crate::error::Result;
use cudarc::driver::sys;
use std::fmt;

/// A stream that does not synchronise with the legacy default stream.
pub struct Stream {
    device: CudaDevice,
    /// Created in `new`, destroyed on drop.
    handle: sys::CUstream,
}

// SAFETY: stream handles may be used from any thread while their context lives; `device` holds it.
unsafe impl Send for Stream {}
// SAFETY: as above; the driver synchronises calls on one stream.
unsafe impl Sync for Stream {}

impl Stream {
    /// Creates a stream on a device.
    pub fn new(device: &CudaDevice) -> Result<Self> {
        let _current = device.make_current()?;
        let mut handle = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: a context is current; a valid out pointer.
        let result = unsafe { sys::cuStreamCreate(&mut handle, flags) };
        device.check(result, "cuStreamCreate")?;
        Ok(Self { device: device.clone(), handle })
    }

    /// The driver's handle, valid while this value lives.
    pub fn handle(&self) -> sys::CUstream {
        self.handle
    }

    /// The stream's device.
    pub fn device(&self) -> &CudaDevice {
        &self.device
    }

    /// Waits until all work queued so far has run; an error that the work met comes back here.
    pub fn synchronize(&self) -> Result<()> {
        let _current = self.device.make_current()?;
        // SAFETY: the handle is live.
        let result = unsafe { sys::cuStreamSynchronize(self.handle) };
        self.device.check(result, "cuStreamSynchronize")
    }

    /// Makes later work of this stream wait for an event.
    pub fn wait(&self, event: &Event) -> Result<()> {
        let _current = self.device.make_current()?;
        // SAFETY: both handles are live.
        let result = unsafe { sys::cuStreamWaitEvent(self.handle, event.handle, 0) };
        self.device.check(result, "cuStreamWaitEvent")
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Ok(_current) = self.device.make_current() {
            // SAFETY: created in `new`; queued work goes on after the handle is gone, which is why
            // owners of memory wait before they free it.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.handle) };
        }
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream({}, {:?})", self.device, self.handle)
    }
}

/// A mark in a stream, without timing; waiting for it sleeps instead of spinning.
pub struct Event {
    device: CudaDevice,
    /// Created in `new`, destroyed on drop.
    handle: sys::CUevent,
}

// SAFETY: event handles may be used from any thread while their context lives; `device` holds it.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// Creates an event on a device.
    pub fn new(device: &CudaDevice) -> Result<Self> {
        let _current = device.make_current()?;
        let mut handle = std::ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32
            | sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32;
        // SAFETY: a context is current; a valid out pointer.
        let result = unsafe { sys::cuEventCreate(&mut handle, flags) };
        device.check(result, "cuEventCreate")?;
        Ok(Self { device: device.clone(), handle })
    }

    /// Marks the work queued on `stream` so far.
    pub fn record(&self, stream: &Stream) -> Result<()> {
        let _current = self.device.make_current()?;
        self.record_current(stream)
    }

    /// [`record`](Self::record) with the context current already.
    pub(crate) fn record_current(&self, stream: &Stream) -> Result<()> {
        // SAFETY: both handles are live.
        let result = unsafe { sys::cuEventRecord(self.handle, stream.handle) };
        self.device.check(result, "cuEventRecord")
    }

    /// Whether the marked work has run.
    pub fn is_complete(&self) -> Result<bool> {
        let _current = self.device.make_current()?;
        // SAFETY: the handle is live.
        match unsafe { sys::cuEventQuery(self.handle) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => self.device.check(result, "cuEventQuery").map(|()| true),
        }
    }

    /// Waits until the marked work has run.
    pub fn synchronize(&self) -> Result<()> {
        let _current = self.device.make_current()?;
        // SAFETY: the handle is live.
        let result = unsafe { sys::cuEventSynchronize(self.handle) };
        self.device.check(result, "cuEventSynchronize")
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(_current) = self.device.make_current() {
            // SAFETY: created in `new`; a recorded mark need not have been reached.
            let _ = unsafe { sys::cuEventDestroy_v2(self.handle) };
        }
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Event({}, {:?})", self.device, self.handle)
    }
}
