//! What candle's `VarBuilder` asks.

use candle_core::{DType, Device, Error, Result, Shape, Tensor};
use candle_nn::Init;
use candle_nn::var_builder::{Backend, Shard, SimpleBackend};

use crate::background::Background;
use crate::error;

/// Gives out whole tensors.
pub(crate) struct Whole(pub(crate) Background);

impl SimpleBackend for Whole {
    fn get(&self, s: Shape, name: &str, _: Init, dtype: DType, dev: &Device) -> Result<Tensor> {
        checked(&self.0, s, name, dtype, dev)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, dev: &Device) -> Result<Tensor> {
        self.0.get(name, None, Some(dtype), dev)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.contains(name)
    }
}

/// The backend of [`Weights::sharded`](crate::Weights::sharded): gives out parts of tensors.
#[derive(Debug)]
pub struct Sharded(pub(crate) Background);

impl Backend for Sharded {
    type Hints = Shard;

    /// The part of a tensor that is this rank's. As in candle, the shape is that of the whole tensor and
    /// counts only where there is one rank.
    fn get(&self, s: Shape, name: &str, h: Shard, dtype: DType, dev: &Device) -> Result<Tensor> {
        let Shard { dim, rank, world_size } = h;
        if world_size == 1 {
            return checked(&self.0, s, name, dtype, dev);
        }
        let shape = self.0.shape(name)?;
        let Some(size) = shape.get(dim).copied() else {
            let (op, shape, dim) = ("sharded get", Shape::from(shape), dim as i32);
            return Err(Error::DimOutOfRange { shape, dim, op }.bt());
        };
        if world_size == 0 || size % world_size != 0 {
            let shape = Shape::from(shape);
            return Err(Error::ShapeMismatchSplit { shape, dim, n_parts: world_size }.bt());
        }
        if rank >= world_size {
            candle_core::bail!("rank {rank} of {world_size} asks for its part of tensor {name:?}");
        }
        let part = size / world_size;
        self.0.get(name, Some((dim, rank * part..(rank + 1) * part)), Some(dtype), dev)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, dev: &Device) -> Result<Tensor> {
        self.0.get(name, None, Some(dtype), dev)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.contains(name)
    }
}

/// A whole tensor of the shape that is expected.
fn checked(of: &Background, s: Shape, name: &str, dtype: DType, dev: &Device) -> Result<Tensor> {
    let shape = of.shape(name)?;
    if s.dims() != shape {
        return Err(error::shape(name, s, shape));
    }
    of.get(name, None, Some(dtype), dev)
}
