//! Measured rates: there is one for each way, and a refused way is told from a slow one.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use cuda_sim::Sim;
use fst::gpu::{Afterwards, CudaDevice, Pipeline, PipelineOptions, RingOptions};
use std::any::Any;
use std::ptr::NonNull;
use std::sync::Arc;

use fst_benches::gpu::measure::{cached_rates, pinned_rate};

#[test]
fn both_ways_are_measured_and_a_refusal_is_kept() {
    let sim = Sim::load().expect("the simulator").exclusive(1, 256 << 20);
    let device = CudaDevice::open(0).unwrap();
    let rate = pinned_rate(&device, 8 << 20).unwrap();
    println!("pinned: {:.2} GB/s", rate / 1e9);
    assert!(rate.is_finite() && rate > 0.0);

    let mut file = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut file, &vec![3; 20 << 20]).unwrap();
    // SAFETY: nobody else has the file.
    let map = Arc::new(unsafe { memmap2::Mmap::map(&file) }.unwrap());
    let (start, len) = (NonNull::new(map.as_ptr().cast_mut()).unwrap(), map.len());
    let owner: Arc<dyn Any + Send + Sync> = map;
    let ring = RingOptions { block_bytes: 1 << 20, blocks: 8, afterwards: Afterwards::Release };
    let pipeline = Pipeline::new(&device, PipelineOptions { ring, streams: 2 }).unwrap();
    // SAFETY: the mapping lives as long as its owner; its file is not changed.
    let rates = unsafe { cached_rates(&pipeline, start, len, &owner, 2) }.unwrap();
    println!("{rates:?}");
    assert!(rates.staged > 0.0);
    assert!(rates.direct.is_ok());
    sim.set("read_only_register", 0);
    // SAFETY: as above.
    let rates = unsafe { cached_rates(&pipeline, start, len, &owner, 2) }.unwrap();
    let refusal = rates.direct.as_ref().unwrap_err().to_string();
    assert!(refusal.contains("cuMemHostRegister") && !rates.direct_is_faster(), "{refusal}");
    pipeline.flush().unwrap();
}
