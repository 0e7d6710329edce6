//! Tensors for other frameworks by DLPack, both forms: `DLManagedTensor`, and the versioned one of
//! DLPack 1.x. The deleter that travels with a tensor releases the owner of its memory.
//!
//! Layouts follow `dlpack.h` of <https://github.com/dmlc/dlpack>. Neither form holds a stream:
//! the bytes must have arrived ([`Pipeline::flush`](crate::Pipeline::flush)) before a tensor is
//! exported, and then they may be read from any stream.

use std::any::Any;
use std::ffi::c_void;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

/// `DLDevice`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DlDevice {
    /// `DLDeviceType`.
    pub device_type: i32,
    /// The device's number.
    pub device_id: i32,
}

impl DlDevice {
    /// Host memory.
    pub const CPU: Self = Self { device_type: 1, device_id: 0 };

    /// Memory of a CUDA device.
    pub const fn cuda(ordinal: usize) -> Self {
        Self { device_type: 2, device_id: ordinal as i32 }
    }
}

/// `DLDataType`: what an element is.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DlDataType {
    /// One of the codes of [`DlDataType`].
    pub code: u8,
    /// Bits of an element.
    pub bits: u8,
    /// Elements of a vector; 1 for ordinary tensors.
    pub lanes: u16,
}

impl DlDataType {
    /// `kDLInt`: signed integers.
    pub const INT: u8 = 0;
    /// `kDLUInt`: unsigned integers.
    pub const UINT: u8 = 1;
    /// `kDLFloat`: IEEE floats.
    pub const FLOAT: u8 = 2;
    /// `kDLBfloat`: bfloat16.
    pub const BFLOAT: u8 = 4;
    /// `kDLComplex`: complex numbers, `bits` for both parts.
    pub const COMPLEX: u8 = 5;
    /// `kDLBool`: booleans of 8 bits.
    pub const BOOL: u8 = 6;
    /// `kDLFloat8_e4m3fn` (DLPack 1.1).
    pub const FLOAT8_E4M3FN: u8 = 10;
    /// `kDLFloat8_e4m3fnuz` (DLPack 1.1).
    pub const FLOAT8_E4M3FNUZ: u8 = 11;
    /// `kDLFloat8_e5m2` (DLPack 1.1).
    pub const FLOAT8_E5M2: u8 = 12;
    /// `kDLFloat8_e5m2fnuz` (DLPack 1.1).
    pub const FLOAT8_E5M2FNUZ: u8 = 13;
    /// `kDLFloat8_e8m0fnu` (DLPack 1.1).
    pub const FLOAT8_E8M0FNU: u8 = 14;
    /// `kDLFloat6_e2m3fn` (DLPack 1.1).
    pub const FLOAT6_E2M3FN: u8 = 15;
    /// `kDLFloat6_e3m2fn` (DLPack 1.1).
    pub const FLOAT6_E3M2FN: u8 = 16;
    /// `kDLFloat4_e2m1fn` (DLPack 1.1).
    pub const FLOAT4_E2M1FN: u8 = 17;

    /// A type of one lane.
    pub const fn new(code: u8, bits: u8) -> Self {
        Self { code, bits, lanes: 1 }
    }
}

/// `DLTensor`.
#[repr(C)]
#[derive(Debug)]
pub struct DlTensor {
    /// Address of the first element, on the device.
    pub data: *mut c_void,
    /// Where the data is.
    pub device: DlDevice,
    /// Number of dimensions.
    pub ndim: i32,
    /// What an element is.
    pub dtype: DlDataType,
    /// `ndim` lengths.
    pub shape: *mut i64,
    /// `ndim` distances in elements; row-major and dense here.
    pub strides: *mut i64,
    /// Always 0 here.
    pub byte_offset: u64,
}

/// `DLManagedTensor`.
#[repr(C)]
#[derive(Debug)]
pub struct DlManagedTensor {
    /// The tensor.
    pub dl_tensor: DlTensor,
    /// For the deleter.
    pub manager_ctx: *mut c_void,
    /// To be called once, by whoever consumes the tensor.
    pub deleter: Option<unsafe extern "C" fn(*mut DlManagedTensor)>,
}

/// `DLPackVersion`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DlVersion {
    /// Layout.
    pub major: u32,
    /// Additions.
    pub minor: u32,
}

/// `DLManagedTensorVersioned`.
#[repr(C)]
#[derive(Debug)]
pub struct DlManagedTensorVersioned {
    /// The version that the rest follows.
    pub version: DlVersion,
    /// For the deleter.
    pub manager_ctx: *mut c_void,
    /// To be called once, by whoever consumes the tensor.
    pub deleter: Option<unsafe extern "C" fn(*mut DlManagedTensorVersioned)>,
    /// [`READ_ONLY`](Self::READ_ONLY) and others.
    pub flags: u64,
    /// The tensor.
    pub dl_tensor: DlTensor,
}

impl DlManagedTensorVersioned {
    /// The version exported here.
    pub const VERSION: DlVersion = DlVersion { major: 1, minor: 1 };
    /// `DLPACK_FLAG_BITMASK_READ_ONLY`: consumers must not write.
    pub const READ_ONLY: u64 = 1;
}

/// Whether consumers may write to an exported tensor. Only the versioned form can tell them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writes {
    /// They may: nobody else relies on the bytes.
    Allowed,
    /// They must not: other tensors of the arena or other owners read them.
    Forbidden,
}

/// A tensor to export: who keeps its memory, and what it is.
pub struct DlSource {
    /// Keeps the memory alive until the deleter has run.
    pub owner: Arc<dyn Any + Send + Sync>,
    /// Address of the first element.
    pub address: u64,
    /// Where that is.
    pub device: DlDevice,
    /// What an element is.
    pub dtype: DlDataType,
    /// Lengths of the dimensions, outermost first; none for a scalar.
    pub shape: Vec<i64>,
}

impl fmt::Debug for DlSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DlSource")
            .field("address", &format_args!("{:#x}", self.address))
            .field("device", &self.device)
            .field("dtype", &self.dtype)
            .field("shape", &self.shape)
            .finish_non_exhaustive()
    }
}

/// What a managed tensor points to, freed by its deleter. The managed tensor comes first, so its
/// address is that of the whole.
#[repr(C)]
struct Exported<M> {
    managed: M,
    /// `shape`, then `strides`.
    extents: Box<[i64]>,
    owner: Arc<dyn Any + Send + Sync>,
}

impl DlSource {
    fn export<M>(self, managed: impl FnOnce(DlTensor) -> M) -> NonNull<M> {
        let ndim = self.shape.len();
        let mut strides = vec![1i64; ndim];
        for i in (1..ndim).rev() {
            strides[i - 1] = strides[i].saturating_mul(self.shape[i].max(1));
        }
        let mut extents = self.shape;
        extents.extend(strides);
        let mut extents = extents.into_boxed_slice();
        let shape = extents.as_mut_ptr();
        let dl_tensor = DlTensor {
            data: self.address as usize as *mut c_void,
            device: self.device,
            ndim: ndim as i32,
            dtype: self.dtype,
            shape,
            strides: shape.wrapping_add(ndim),
            byte_offset: 0,
        };
        let exported = Exported { managed: managed(dl_tensor), extents, owner: self.owner };
        NonNull::from(Box::leak(Box::new(exported))).cast()
    }

    /// The unversioned form, as `__dlpack__` of older consumers takes it in a capsule named
    /// `dltensor`. Whoever gets it calls its deleter once; until then the owner lives.
    pub fn into_managed(self) -> NonNull<DlManagedTensor> {
        self.export(|dl_tensor| DlManagedTensor {
            dl_tensor,
            manager_ctx: std::ptr::null_mut(),
            deleter: Some(delete::<DlManagedTensor>),
        })
    }

    /// The versioned form, for a capsule named `dltensor_versioned`. Whoever gets it calls its
    /// deleter once; until then the owner lives.
    pub fn into_versioned(self, writes: Writes) -> NonNull<DlManagedTensorVersioned> {
        let flags = match writes {
            Writes::Allowed => 0,
            Writes::Forbidden => DlManagedTensorVersioned::READ_ONLY,
        };
        self.export(|dl_tensor| DlManagedTensorVersioned {
            version: DlManagedTensorVersioned::VERSION,
            manager_ctx: std::ptr::null_mut(),
            deleter: Some(delete::<DlManagedTensorVersioned>),
            flags,
            dl_tensor,
        })
    }
}

/// # Safety
///
/// `managed` came from [`DlSource::export`] with this `M`, and was not deleted before.
unsafe extern "C" fn delete<M>(managed: *mut M) {
    if managed.is_null() {
        return;
    }
    // SAFETY: the managed tensor is the first field of the allocation made in `export`.
    let Exported { owner, extents, managed } =
        *unsafe { Box::from_raw(managed.cast::<Exported<M>>()) };
    drop((managed, extents));
    drop(owner);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(owner: &Arc<Vec<f32>>, shape: Vec<i64>) -> DlSource {
        DlSource {
            owner: Arc::clone(owner) as _,
            address: owner.as_ptr() as u64,
            device: DlDevice::CPU,
            dtype: DlDataType::new(DlDataType::FLOAT, 32),
            shape,
        }
    }

    #[test]
    fn the_deleter_releases_the_owner() {
        let owner = Arc::new(vec![1.5f32; 24]);
        let managed = source(&owner, vec![2, 3, 4]).into_managed();
        assert_eq!(Arc::strong_count(&owner), 2);
        // SAFETY: just exported; deleted once below.
        unsafe {
            let tensor = &managed.as_ref().dl_tensor;
            assert_eq!(tensor.data as usize, owner.as_ptr() as usize);
            assert_eq!(tensor.ndim, 3);
            assert_eq!(std::slice::from_raw_parts(tensor.shape, 3), [2, 3, 4]);
            assert_eq!(std::slice::from_raw_parts(tensor.strides, 3), [12, 4, 1]);
            assert_eq!((tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes), (2, 32, 1));
            let deleter = managed.as_ref().deleter.unwrap();
            deleter(managed.as_ptr());
        }
        assert_eq!(Arc::strong_count(&owner), 1);
    }

    #[test]
    fn the_versioned_form_says_what_may_be_written() {
        let owner = Arc::new(vec![0f32; 1]);
        for (writes, flags) in [(Writes::Allowed, 0), (Writes::Forbidden, 1)] {
            let managed = source(&owner, vec![]).into_versioned(writes);
            // SAFETY: just exported; deleted once below, on another thread as consumers do.
            unsafe {
                let tensor = managed.as_ref();
                assert_eq!((tensor.version.major, tensor.flags), (1, flags));
                assert_eq!(tensor.dl_tensor.ndim, 0);
                let (deleter, address) = (tensor.deleter.unwrap(), managed.as_ptr() as usize);
                std::thread::spawn(move || deleter(address as *mut _)).join().unwrap();
            }
            assert_eq!(Arc::strong_count(&owner), 1);
        }
    }

    #[test]
    fn layouts_are_those_of_the_header() {
        assert_eq!(size_of::<DlTensor>(), 48);
        assert_eq!(size_of::<DlManagedTensor>(), 64);
        assert_eq!(size_of::<DlManagedTensorVersioned>(), 80);
        assert_eq!(std::mem::offset_of!(DlManagedTensorVersioned, dl_tensor), 32);
        assert_eq!(std::mem::offset_of!(DlTensor, shape), 24);
    }
}
