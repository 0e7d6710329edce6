//! candle's loader, as its users call it.

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::{Result, bail};
use candle_core::{DType, Device, Tensor, WithDType};

use super::{Loaded, Visit};

struct Tensors(Vec<HashMap<String, Tensor>>);

/// `candle_core::safetensors::load` of each file to the CPU.
pub(super) fn load(files: &[PathBuf]) -> Result<Box<dyn Loaded>> {
    let mut all = Vec::new();
    for path in files {
        all.push(candle_core::safetensors::load(path, &Device::Cpu)?);
    }
    Ok(Box::new(Tensors(all)))
}

impl Loaded for Tensors {
    fn bytes(&self) -> u64 {
        let tensors = self.0.iter().flat_map(HashMap::values);
        tensors.map(|t| (t.elem_count() * t.dtype().size_in_bytes()) as u64).sum()
    }

    fn for_each(&self, visit: &mut Visit<'_>) -> Result<()> {
        for (name, tensor) in self.0.iter().flatten() {
            let data = match tensor.dtype() {
                DType::BF16 => bytes::<half::bf16>(tensor)?,
                DType::F16 => bytes::<half::f16>(tensor)?,
                DType::F32 => bytes::<f32>(tensor)?,
                other => bail!("{name}: no digest of candle tensors of {other:?}"),
            };
            visit(name, tensor.dims(), &data);
        }
        Ok(())
    }
}

fn bytes<T: WithDType + bytemuck::NoUninit>(tensor: &Tensor) -> Result<Vec<u8>> {
    let values: Vec<T> = tensor.flatten_all()?.to_vec1()?;
    Ok(bytemuck::cast_slice(&values).to_vec())
}
