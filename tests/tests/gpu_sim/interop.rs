//! Arenas in other hands: cudarc views, DLPack.

use crate::support::{machine, simulated};
use cudarc::driver::CudaContext;
use fst_gpu::dlpack::{DlDataType, DlDevice, DlSource, Writes};
use fst_gpu::{ArenaView, CudaDevice, DeviceArena, Error};
use std::sync::Arc;

#[test]
fn cudarc_reads_an_arena_in_place() {
    let _machine = machine();
    let device = CudaDevice::open(0).unwrap();
    let arena = DeviceArena::new(&device, 4096).unwrap();
    let values: Vec<f32> = (0..100).map(|i| i as f32 / 3.0).collect();
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_ne_bytes()).collect();
    arena.copy_from_host(256, &bytes).unwrap();
    let context = CudaContext::new(0).unwrap();
    for stream in [context.default_stream(), context.new_stream().unwrap()] {
        let view = ArenaView::<f32>::new(&arena, &stream, 256, 100).unwrap();
        let view2 = ArenaView::<f32>::new(&arena, &stream, 296, 90).unwrap();
        assert_eq!(stream.clone_dtoh(&view.view()).unwrap(), values);
        assert_eq!(stream.clone_dtoh(&view2.view()).unwrap(), values[10..]);
        // A copy on the device reads the same.
        let copy = stream.clone_dtod(&view.view()).unwrap();
        assert_eq!(stream.clone_dtoh(&copy).unwrap(), values);
        drop(copy);
        stream.synchronize().unwrap();
    }
    let stream = context.default_stream();
    let error = ArenaView::<f32>::new(&arena, &stream, 4000, 25).unwrap_err();
    assert!(matches!(error, Error::OutOfRange { end: 4100, len: 4096, .. }), "{error}");
    let error = ArenaView::<f32>::new(&arena, &stream, 258, 1).unwrap_err();
    assert!(matches!(error, Error::Misaligned { align: 4, .. }), "{error}");
    assert!(ArenaView::<f32>::new(&arena, &stream, 0, usize::MAX).is_err());
    // Dropped views freed nothing, and poisoned nothing.
    let view = ArenaView::<f32>::new(&arena, &stream, 256, 100).unwrap();
    drop(arena);
    assert_eq!(stream.clone_dtoh(&view.view()).unwrap(), values);
    drop(view);
    assert!(context.check_err().is_ok());
}

#[test]
fn a_stream_of_another_device_is_refused() {
    let Some(_sim) = simulated(2, 1 << 20) else { return };
    let arena = DeviceArena::new(&CudaDevice::open(0).unwrap(), 64).unwrap();
    let context = CudaContext::new(1).unwrap();
    let error = ArenaView::<u8>::new(&arena, &context.default_stream(), 0, 64).unwrap_err();
    assert_eq!(error, Error::WrongDevice { expected: 1, found: 0 });
}

#[test]
fn an_exported_tensor_keeps_its_arena() {
    let Some(sim) = simulated(2, 1 << 20) else { return };
    let arena = DeviceArena::new(&CudaDevice::open(1).unwrap(), 4096).unwrap();
    let export = |arena: &DeviceArena| DlSource {
        address: arena.range(512, 600).unwrap(),
        owner: Arc::new(arena.clone()),
        device: DlDevice::cuda(1),
        dtype: DlDataType::new(DlDataType::BFLOAT, 16),
        shape: vec![3, 100],
    };
    let (old, new) =
        (export(&arena).into_managed(), export(&arena).into_versioned(Writes::Forbidden));
    drop(arena);
    assert_eq!(sim.report().arrays, 1);
    // SAFETY: exported above, each deleted once.
    unsafe {
        assert_eq!((*old.as_ptr()).dl_tensor.device, DlDevice::cuda(1));
        (*old.as_ptr()).deleter.unwrap()(old.as_ptr());
        assert_eq!(sim.report().arrays, 1);
        (*new.as_ptr()).deleter.unwrap()(new.as_ptr());
    }
    assert_eq!(sim.report().arrays, 0);
}
