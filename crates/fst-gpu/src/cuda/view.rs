//! Arenas as cudarc sees device memory, without a copy.

use crate::cuda::buffer::device::DeviceArena;
use crate::error::{Error, Result};
use cudarc::driver::{CudaSlice, CudaStream, CudaView};
use std::any::Any;
use std::fmt;
use std::mem::ManuallyDrop;
use std::sync::Arc;

/// A range of an arena as elements of `T`, for use with cudarc. It keeps the arena alive.
///
/// cudarc's views borrow from an owned slice, and an owned slice frees its address when dropped:
/// freeing an address inside an allocation is an error that sticks to the whole context. So the
/// owned slice is kept in here, and taken apart instead of dropped.
pub struct ArenaView<T> {
    /// Its address lies in `_arena`: it must never free it.
    slice: ManuallyDrop<CudaSlice<T>>,
    _arena: DeviceArena,
    /// What else is to live as long; declared behind the arena.
    _owner: Option<Arc<dyn Any + Send + Sync>>,
}

impl<T: bytemuck::AnyBitPattern> ArenaView<T> {
    /// `len` elements from byte `offset` of the arena on, used on `stream` (which must be of the
    /// arena's device and its primary context, as `CudaContext::new` gives it).
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`], [`Error::Misaligned`] or [`Error::WrongDevice`].
    pub fn new(
        arena: &DeviceArena,
        stream: &Arc<CudaStream>,
        offset: u64,
        len: usize,
    ) -> Result<Self> {
        let expected = stream.context();
        if expected.cu_ctx() != arena.device().context() {
            return Err(Error::WrongDevice {
                expected: expected.ordinal(),
                found: arena.device().ordinal(),
            });
        }
        let bytes = (len as u64).saturating_mul(size_of::<T>() as u64);
        let address = arena.range(offset, bytes)?;
        let align = align_of::<T>() as u64;
        if !address.is_multiple_of(align) {
            return Err(Error::Misaligned { address, align });
        }
        if expected.is_event_tracking() {
            // cudarc makes two events here and panics if it cannot: find out before.
            for _ in 0..2 {
                expected.new_event(None).map_err(|e| Error::Driver {
                    call: "cuEventCreate",
                    device: arena.device().ordinal(),
                    code: crate::cuda::sys::code(e.0),
                })?;
            }
        }
        // SAFETY: the range lies in the arena, which is kept; any bytes are a `T`.
        let slice = unsafe { stream.upgrade_device_ptr::<T>(address, len) };
        Ok(Self { slice: ManuallyDrop::new(slice), _arena: arena.clone(), _owner: None })
    }

    /// Keeps `owner` as long as the view: what accounts for the arena's memory, say.
    #[must_use]
    pub fn keeping(mut self, owner: Arc<dyn Any + Send + Sync>) -> Self {
        self._owner = Some(owner);
        self
    }

    /// The elements, as cudarc's functions take them.
    pub fn view(&self) -> CudaView<'_, T> {
        self.slice.as_view()
    }
}

impl<T> Drop for ArenaView<T> {
    fn drop(&mut self) {
        // SAFETY: taken once, here. `leak` releases everything but the memory.
        let slice = unsafe { ManuallyDrop::take(&mut self.slice) };
        slice.leak();
    }
}

impl<T> fmt::Debug for ArenaView<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ArenaView({} elements of {:?})", self.slice.len(), self._arena)
    }
}
