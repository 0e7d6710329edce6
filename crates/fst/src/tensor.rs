//! Tensors that own their memory, and the set that a load returns.

use std::collections::HashMap;
use std::fmt;

use fst_format::{Dtype, Element, TensorInfo};
use fst_io::SharedBuffer;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::report::LoadReport;

/// A loaded tensor: a name, a shape, a dtype, and a counted reference to the memory that holds its
/// elements, in row-major order without gaps.
///
/// Cloning is cheap and shares the memory. The memory is freed with the last tensor that lies in
/// the same arena.
#[derive(Clone)]
pub struct Tensor {
    info: TensorInfo,
    dtype: Dtype,
    /// The shape, where it is not the one in the checkpoint.
    shape: Option<Box<[usize]>>,
    data: Data,
}

/// Where the elements are.
#[derive(Clone)]
pub(crate) enum Data {
    /// `offset..offset + len` of an arena in host memory.
    Host { arena: SharedBuffer, offset: usize, len: usize },
}

impl Tensor {
    pub(crate) fn new(info: TensorInfo, dtype: Dtype, shape: Option<&[usize]>, data: Data) -> Self {
        Self { info, dtype, shape: shape.map(Into::into), data }
    }

    /// Its name in the checkpoint.
    pub fn name(&self) -> &str {
        self.info.name()
    }

    /// Type of its elements, as loaded.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Its dimensions, outermost first; empty for a scalar.
    pub fn shape(&self) -> &[usize] {
        self.shape.as_deref().unwrap_or_else(|| self.info.shape())
    }

    /// Number of its elements.
    pub fn elements(&self) -> usize {
        self.shape().iter().product()
    }

    /// Number of its bytes.
    pub fn byte_len(&self) -> usize {
        match &self.data {
            Data::Host { len, .. } => *len,
        }
    }

    /// What the checkpoint says of it: the tensor before slicing and conversion.
    pub fn info(&self) -> &TensorInfo {
        &self.info
    }

    /// Where its elements are.
    pub fn device(&self) -> Device {
        match &self.data {
            Data::Host { .. } => Device::host(),
        }
    }

    /// Its bytes: little-endian elements in row-major order.
    ///
    /// # Errors
    ///
    /// [`Error::NotOnHost`] when they are in a device's memory.
    pub fn bytes(&self) -> Result<&[u8]> {
        match &self.data {
            Data::Host { arena, offset, len } => {
                arena.get(*offset..*offset + *len).ok_or_else(|| Error::NotOnHost {
                    tensor: self.name().to_owned(),
                    device: self.device(),
                })
            }
        }
    }

    /// Its elements, typed. On a big-endian machine this is refused for elements of more than one
    /// byte, since the format is little-endian.
    ///
    /// # Errors
    ///
    /// [`Error::WrongDtype`] when the tensor holds another type, [`Error::NotOnHost`] when it is in
    /// a device's memory.
    pub fn as_slice<T: Element>(&self) -> Result<&[T]> {
        let tensor = || self.name().to_owned();
        if T::DTYPE != self.dtype {
            return Err(Error::WrongDtype { tensor: tensor(), asked: T::DTYPE, found: self.dtype });
        }
        bytemuck::try_cast_slice(self.bytes()?)
            .ok()
            .filter(|_| cfg!(target_endian = "little") || size_of::<T>() == 1)
            .ok_or_else(|| Error::Misaligned { tensor: tensor(), dtype: self.dtype })
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tensor")
            .field("name", &self.name())
            .field("dtype", &self.dtype)
            .field("shape", &self.shape())
            .field("device", &self.device())
            .finish_non_exhaustive()
    }
}

/// The tensors of a load, in the checkpoint's order (by shard, then by place in it), and its
/// report.
#[derive(Debug, Clone)]
pub struct Tensors {
    tensors: Vec<Tensor>,
    by_name: HashMap<Box<str>, usize>,
    report: LoadReport,
}

impl Tensors {
    pub(crate) fn new(tensors: Vec<Tensor>, report: LoadReport) -> Self {
        let by_name = tensors.iter().enumerate().map(|(i, t)| (t.name().into(), i)).collect();
        Self { tensors, by_name, report }
    }

    /// The tensor of this name.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownTensor`] when none was loaded.
    pub fn get(&self, name: &str) -> Result<&Tensor> {
        self.by_name
            .get(name)
            .and_then(|index| self.tensors.get(*index))
            .ok_or_else(|| Error::UnknownTensor { name: name.to_owned() })
    }

    /// All tensors.
    pub fn iter(&self) -> std::slice::Iter<'_, Tensor> {
        self.tensors.iter()
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether nothing was loaded.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// What the load did.
    pub fn report(&self) -> &LoadReport {
        &self.report
    }
}

impl<'a> IntoIterator for &'a Tensors {
    type Item = &'a Tensor;
    type IntoIter = std::slice::Iter<'a, Tensor>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl IntoIterator for Tensors {
    type Item = Tensor;
    type IntoIter = std::vec::IntoIter<Tensor>;

    fn into_iter(self) -> Self::IntoIter {
        self.tensors.into_iter()
    }
}
