//! Converts elements on a device: `f32` to `bf16`, through pinned memory and a kernel. Where there is no device,
//! it says so and converts on the host.
//!
//! `cargo run -p fst-gpu --example cast`

use fst_gpu::cast::{CastType, cast};
use fst_gpu::kernel::{Kernel, StridedJob};
use fst_gpu::{CopyOp, CudaDevice, DeviceArena, Error, Pipeline, PipelineOptions};

const TYPES: (CastType, CastType) = (CastType::F32, CastType::BF16);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let elements: Vec<f32> = (0..1000).map(|index| index as f32 / 7.0).collect();
    let source: Vec<u8> = elements.iter().flat_map(|element| element.to_le_bytes()).collect();
    let mut expected = vec![0; source.len() / 2];
    cast(&source, TYPES.0, &mut expected, TYPES.1)?;
    match on_device(&source) {
        Ok(converted) => println!("on the device: {}", converted == expected),
        Err(error) => println!("on the host, as the device says: {error}"),
    }
    Ok(())
}

fn on_device(source: &[u8]) -> Result<Vec<u8>, Error> {
    let device = CudaDevice::open(0)?;
    let arena = DeviceArena::new(&device, source.len() as u64 / 2)?;
    let pipeline = Pipeline::new(&device, PipelineOptions::default())?;
    let mut block = pipeline.acquire()?;
    block.as_mut_slice()[..source.len()].copy_from_slice(source);
    let cols = source.len() as u64 / 4;
    let job = StridedJob { src: 0, dst: arena.range(0, cols * 2)?, rows: 1, cols, src_pitch: 0 };
    let op = CopyOp::Transform { kernel: Kernel::Cast { from: TYPES.0, to: TYPES.1 }, job };
    // SAFETY: the arena outlives the flush, and nothing else uses its bytes.
    unsafe { pipeline.submit(block, &[op])? };
    pipeline.flush()?;
    let mut converted = vec![0; source.len() / 2];
    arena.copy_to_host(0, &mut converted)?;
    Ok(converted)
}
