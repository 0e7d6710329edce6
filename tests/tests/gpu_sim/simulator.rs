//! The simulator itself: it must be as disobliging as it says, or the other tests prove nothing.

use crate::support::simulated;
use cudarc::driver::sys;
use fst_gpu::{CudaDevice, DeviceArena, Event, Stream};
use std::ffi::c_void;

fn ok(result: sys::CUresult) {
    assert_eq!(result as u32, 0);
}

fn to_device(to: u64, from: &[u8], stream: &Stream) {
    // SAFETY: both sides hold the bytes until the stream is synchronised.
    ok(unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.as_ptr().cast(), from.len(), stream.handle()) });
}

fn read(arena: &DeviceArena) -> u8 {
    let mut byte = [0];
    arena.copy_to_host(0, &mut byte).unwrap();
    byte[0]
}

#[test]
fn pinned_sources_are_read_late_and_pageable_ones_may_not_change() {
    let Some(mut sim) = simulated(1, 1 << 20) else { return };
    let device = CudaDevice::open(0).unwrap();
    let _current = device.make_current().unwrap();
    let (a, b) = (DeviceArena::new(&device, 1).unwrap(), DeviceArena::new(&device, 1).unwrap());
    let stream = Stream::new(&device).unwrap();
    let mut pinned: *mut c_void = std::ptr::null_mut();
    // SAFETY: a valid out pointer; the byte is freed below.
    let pinned = unsafe {
        ok(sys::cuMemHostAlloc(&mut pinned, 1, 0));
        &mut *pinned.cast::<u8>()
    };
    let mut pageable = vec![1u8];
    *pinned = 1;
    to_device(a.address(), std::slice::from_ref(pinned), &stream);
    to_device(b.address(), &pageable, &stream);
    *pinned = 2;
    assert_eq!([read(&a), read(&b)], [cuda_sim::FRESH; 2]);
    stream.synchronize().unwrap();
    assert_eq!([read(&a), read(&b)], [2, 1]);
    assert_eq!(sim.report().violations, [] as [String; 0]);
    to_device(b.address(), &pageable, &stream);
    pageable[0] = 2;
    stream.synchronize().unwrap();
    let found = sim.report().violations.join("\n");
    assert!(found.contains("changed before the copy"), "{found}");
    sim.skip_check();
    // SAFETY: allocated above.
    ok(unsafe { sys::cuMemFreeHost(std::ptr::from_mut(pinned).cast()) });
}

#[test]
fn streams_are_ordered_by_events_only() {
    let Some(_sim) = simulated(1, 1 << 20) else { return };
    let device = CudaDevice::open(0).unwrap();
    let _current = device.make_current().unwrap();
    let arenas: Vec<_> = (0..3).map(|_| DeviceArena::new(&device, 1).unwrap()).collect();
    let (first, second) = (Stream::new(&device).unwrap(), Stream::new(&device).unwrap());
    let event = Event::new(&device).unwrap();
    let copy = |to: &DeviceArena| {
        let (to, from) = (to.address(), arenas[0].address());
        // SAFETY: the arenas live until the streams are synchronised.
        ok(unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, 1, second.handle()) });
    };
    to_device(arenas[0].address(), &[5], &first);
    event.record(&first).unwrap();
    copy(&arenas[1]);
    second.wait(&event).unwrap();
    copy(&arenas[2]);
    // Two queries are put off; the third lets the work run.
    assert_eq!([(); 3].map(|()| event.is_complete().unwrap()), [false, false, true]);
    assert_eq!(read(&arenas[0]), 5);
    assert_eq!(read(&arenas[1]), cuda_sim::FRESH);
    second.synchronize().unwrap();
    assert_eq!(read(&arenas[2]), 5);
    first.synchronize().unwrap();
    // The same without the query: synchronising the second stream runs what it waits for.
    to_device(arenas[0].address(), &[6], &first);
    copy(&arenas[1]);
    event.record(&first).unwrap();
    second.wait(&event).unwrap();
    copy(&arenas[2]);
    second.synchronize().unwrap();
    assert_eq!([read(&arenas[1]), read(&arenas[2])], [5, 6]);
}

#[test]
fn files_are_registered_for_reading_only_and_short_runs_of_them_are_not_copied() {
    let Some(mut sim) = simulated(1, 1 << 20) else { return };
    let device = CudaDevice::open(0).unwrap();
    let arena = DeviceArena::new(&device, (64 << 10) + 1).unwrap();
    let stream = Stream::new(&device).unwrap();
    let file = tempfile::tempfile().unwrap();
    file.set_len((64 << 10) + 1).unwrap();
    // SAFETY: nobody else has the file.
    let map = unsafe { memmap2::Mmap::map(&file) }.unwrap();
    let _current = device.make_current().unwrap();
    let start = map.as_ptr().cast_mut().cast();
    // SAFETY: the mapping lives until it is unregistered.
    unsafe {
        assert_eq!(sys::cuMemHostRegister_v2(start, map.len(), 0) as u32, 1);
        ok(sys::cuMemHostRegister_v2(start, map.len(), sys::CU_MEMHOSTREGISTER_READ_ONLY));
        assert_eq!(sys::cuMemHostRegister_v2(start, 1, 0) as u32, 1);
    }
    to_device(arena.address(), &map, &stream);
    stream.synchronize().unwrap();
    assert_eq!(sim.report().violations, [] as [String; 0]);
    to_device(arena.address(), &map[1..], &stream);
    stream.synchronize().unwrap();
    let found = sim.report().violations.join("\n");
    assert!(found.contains("straight out of a file's mapping"), "{found}");
    sim.skip_check();
    // SAFETY: registered above.
    ok(unsafe { sys::cuMemHostUnregister(start) });
}

#[test]
fn peers_are_enabled_once() {
    let Some(sim) = simulated(2, 1 << 20) else { return };
    let (a, b) = (CudaDevice::open(0).unwrap(), CudaDevice::open(1).unwrap());
    let enable = |from: &CudaDevice, to: &CudaDevice| {
        let _current = from.make_current().unwrap();
        // SAFETY: contexts are retained.
        unsafe { sys::cuCtxEnablePeerAccess(to.context(), 0) as u32 }
    };
    // Where it is not to be had, copies go through the host.
    for code in [217, cuda_sim::ERROR_NOT_SUPPORTED] {
        sim.fail("cuCtxEnablePeerAccess", 1, code);
        assert_eq!(a.enable_peer_access(&b), Ok(false));
    }
    sim.fail("cuCtxEnablePeerAccess", 1, cuda_sim::ERROR_UNKNOWN);
    assert!(a.enable_peer_access(&b).is_err());
    assert!(a.enable_peer_access(&b).unwrap());
    assert_eq!((enable(&a, &b), enable(&a, &a)), (704, 201));
    assert!(a.enable_peer_access(&b).unwrap() && b.enable_peer_access(&a).unwrap());
    assert!(a.enable_peer_access(&a).unwrap());
}

#[test]
fn misuse_is_reported() {
    let Some(mut sim) = simulated(2, 1 << 20) else { return };
    let device = CudaDevice::open(0).unwrap();
    let other = CudaDevice::open(1).unwrap();
    let stream = Stream::new(&device).unwrap();
    {
        let _current = device.make_current().unwrap();
        let mut address = 0;
        // SAFETY: misuse on purpose, which the simulator survives.
        unsafe {
            ok(sys::cuMemAlloc_v2(&mut address, 64));
            to_device(address, &[1; 64], &stream);
            ok(sys::cuMemFree_v2(address));
            assert_ne!(sys::cuMemFree_v2(address) as u32, 0);
            assert_ne!(sys::cuMemFree_v2(address + 8) as u32, 0);
        }
    }
    {
        let _current = other.make_current().unwrap();
        // SAFETY: as above.
        let result = unsafe { sys::cuMemsetD8Async(0, 0, 0, stream.handle()) };
        assert_ne!(result as u32, 0);
    }
    let error = stream.synchronize().unwrap_err().to_string();
    assert!(error.contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{error}");
    let found = sim.report().violations.join("\n");
    for expected in [
        "still queued refer to",
        "double free",
        "never allocated",
        "stream of device 0 used while the context of device 1 is current",
        "freed before the copy ran",
    ] {
        assert!(found.contains(expected), "{expected}: {found}");
    }
    sim.skip_check();
}
