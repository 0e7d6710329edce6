//! Cached files to devices under the simulated driver: straight out of the page cache or through
//! staging memory, and what the report says of it. What is measured is known to the process: one
//! test measures, and the others say which way to take.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod gpu_support;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use fst::{CachedCopy, Device, Dtype, Loader};
use fst_tests::{crowded_checkpoint, hold_in_cache};
use gpu_support::{MEMORY, assert_same, machine, open, simulated_or_skip};

#[test]
fn cached_files_travel_straight_out_of_the_page_cache() {
    let dir = tempfile::tempdir().unwrap();
    let paths = crowded_checkpoint(dir.path());
    let _held = hold_in_cache(&paths);
    let checkpoint = open(&paths);
    for dtype in [None, Some(Dtype::F32)] {
        let mut loader = Loader::new().slice("huge", 1, 3..1500);
        if let Some(dtype) = dtype {
            loader = loader.dtype(dtype);
        }
        let host = loader.load(&checkpoint).unwrap();
        let sim = machine();
        let loader = loader.device(Device::cuda(0).unwrap()).cached_copy(CachedCopy::Registered);
        let tensors = loader.load(&checkpoint).unwrap();
        assert_same(&tensors, &host, &dtype);
        let report = tensors.report();
        let copy = report.device_copy.as_ref().unwrap();
        if let Some(refused) = copy.refused.as_ref().filter(|_| sim.is_none()) {
            println!("SKIPPED: this driver refuses to register file mappings: {refused}");
            return;
        }
        // All of it is in the page cache.
        assert_eq!(copy.registered_bytes + copy.staged_bytes, report.bytes_read, "{copy:?}");
        // Short runs are staged.
        assert!(copy.registered_bytes > 0 && copy.staged_bytes > 0, "{copy:?}");
        assert_eq!(copy.refused, None);
        assert!(copy.streams > 0 && copy.copy_calls > 0, "{copy:?}");
        assert!((1..256 << 20).contains(&copy.pinned_bytes), "{copy:?}");
        assert_eq!(report.bytes_asked, host.report().bytes_asked);
        assert_eq!(report.stage("read.mapped").unwrap().bytes, copy.registered_bytes);
        // The ring for short runs, and the file that has others. A slice's rows are short; what is
        // converted is cut on the device.
        if let Some(sim) = &sim {
            assert_eq!(copy.launches > 0, dtype.is_some(), "{copy:?}");
            assert!((2 << 20..18 << 20).contains(&copy.pinned_bytes), "{copy:?}");
            assert_eq!(sim.calls("register:file"), 1 + u64::from(dtype.is_some()));
        }
        let staged = loader.clone().cached_copy(CachedCopy::Staged).load(&checkpoint).unwrap();
        let copy = staged.report().device_copy.clone().unwrap();
        assert_eq!((copy.registered_bytes, copy.staged_bytes), (0, report.bytes_read));
        // Streams stage, whatever is asked for.
        let mut stream = loader.memory_budget(64 << 20).stream(&checkpoint).unwrap();
        assert_eq!((&mut stream).filter_map(Result::ok).count(), host.len());
        assert_eq!(stream.report().unwrap().device_copy.unwrap().registered_bytes, 0);
    }
}

#[test]
fn a_refused_registration_is_staged_and_told() {
    let dir = tempfile::tempdir().unwrap();
    let paths = crowded_checkpoint(dir.path());
    let _held = hold_in_cache(&paths);
    let checkpoint = open(&paths);
    let host = Loader::new().load(&checkpoint).unwrap();
    {
        let sim = simulated_or_skip!(1, MEMORY);
        sim.set("read_only_register", 0);
        let loader = Loader::new().device(Device::cuda(0).unwrap());
        let tensors = loader.cached_copy(CachedCopy::Registered).load(&checkpoint).unwrap();
        assert_same(&tensors, &host, &"refused");
        let copy = tensors.report().device_copy.clone().unwrap();
        assert_eq!((copy.registered_bytes, copy.staged_bytes), (0, tensors.report().bytes_read));
        assert!(copy.refused.unwrap().contains("CUDA_ERROR_NOT_SUPPORTED"));
        assert!(copy.reason.contains("refused"), "{}", copy.reason);
    }
    // Nothing is tried where it is known before.
    {
        let sim = simulated_or_skip!(1, MEMORY);
        sim.set("read_only_register", 0);
        let loader = Loader::new().device(Device::cuda(0).unwrap());
        let tensors = loader.cached_copy(CachedCopy::Measured).load(&checkpoint).unwrap();
        assert_same(&tensors, &host, &"not tried");
        let copy = tensors.report().device_copy.clone().unwrap();
        assert!(copy.refused.is_some() && copy.registered_bytes == 0, "{copy:?}");
        // Those of one pipeline.
        assert_eq!(copy.streams, fst::gpu::PipelineOptions::default().streams);
    }
    // A refusal in the midst of a load: what was registered stays, the rest is staged.
    let path = dir.path().join("long.safetensors");
    fst_tests::write(&path, &[("long", safetensors::Dtype::U8, vec![40 << 20])]);
    let _held = hold_in_cache(std::slice::from_ref(&path));
    let checkpoint = open(&[path]);
    let host = Loader::new().load(&checkpoint).unwrap();
    let sim = simulated_or_skip!(1, MEMORY);
    let loader = Loader::new().device(Device::cuda(0).unwrap());
    // Of three windows.
    sim.fail("register:file", 2, cuda_sim::ERROR_OUT_OF_MEMORY);
    let tensors = loader.cached_copy(CachedCopy::Registered).load(&checkpoint).unwrap();
    assert_same(&tensors, &host, &"partly refused");
    let copy = tensors.report().device_copy.clone().unwrap();
    assert!(copy.registered_bytes > 0 && copy.staged_bytes > 0, "{copy:?}");
    assert!(copy.refused.is_some());
}

#[test]
fn both_ways_are_measured_on_blocks_of_the_load() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("long.safetensors");
    fst_tests::write(&path, &[("long", safetensors::Dtype::U8, vec![40 << 20])]);
    let _held = hold_in_cache(std::slice::from_ref(&path));
    let checkpoint = open(&[path]);
    let host = Loader::new().load(&checkpoint).unwrap();
    let _sim = machine();
    let loader = Loader::new().device(Device::cuda(0).unwrap());
    let before = loader.load(&checkpoint).unwrap().report().device_copy.clone().unwrap();
    assert_eq!(
        (before.reason.as_str(), before.registered_bytes),
        ("too little is cached to measure", 0)
    );
    let loader = loader.cached_copy(CachedCopy::Measured);
    let tensors = loader.load(&checkpoint).unwrap();
    assert_same(&tensors, &host, &"measured");
    let report = tensors.report();
    let copy = report.device_copy.as_ref().unwrap();
    println!("{copy:?}");
    if copy.refused.is_some() {
        assert_eq!(copy.staged_bytes, report.bytes_read);
        return;
    }
    let (registered, staged) = (copy.registered_rate.unwrap(), copy.staged_rate.unwrap());
    assert!(registered > 0.0 && staged > 0.0);
    assert_eq!(copy.registered_bytes + copy.staged_bytes, report.bytes_read);
    // Staging comes first, and only the last quarter is tried the other way.
    let quarter = report.bytes_read / 4;
    assert!((quarter..quarter + (4 << 20)).contains(&copy.registered_bytes), "{copy:?}");
    assert_eq!(report.stage("read.mapped").unwrap().bytes, copy.registered_bytes);
    // The next load knows.
    let tensors = loader.cached_copy(CachedCopy::Auto).load(&checkpoint).unwrap();
    let again = tensors.report().device_copy.clone().unwrap();
    assert_eq!(again.reason, "measured by an earlier load");
    assert_eq!(again.registered_bytes > 0, registered > staged);
    assert_eq!(again.registered_rate, Some(registered));
}

/// Puts a part of a file out of the page cache.
fn evict(path: &Path, start: u64, len: u64) {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    // SAFETY: advice on an open file touches no memory of this process.
    unsafe {
        libc::posix_fadvise(file.as_raw_fd(), start as i64, len as i64, libc::POSIX_FADV_DONTNEED)
    };
}

#[test]
fn files_of_which_some_are_cached_arrive_by_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    // The last one is shorter than where a part of the first lies. Too little for others to go by
    // what is measured here.
    let paths: Vec<_> = [("a", 14 << 20), ("b", 6 << 20), ("c", 1 << 20)]
        .into_iter()
        .map(|(name, len)| {
            let path = dir.path().join(format!("{name}.safetensors"));
            fst_tests::write(&path, &[(name, safetensors::Dtype::U8, vec![len])]);
            path
        })
        .collect();
    let host = Loader::new().load(&open(&paths)).unwrap();
    for (file, start, len) in [(0, 0, 0), (1, 0, 0), (2, 0, 0), (0, 8 << 20, 4 << 20)] {
        for way in [CachedCopy::Registered, CachedCopy::Measured] {
            paths.iter().for_each(|path| drop(std::fs::read(path).unwrap()));
            evict(&paths[file], start, len);
            let checkpoint = open(&paths);
            let _sim = machine();
            let loader = Loader::new().device(Device::cuda(0).unwrap()).cached_copy(way);
            let tensors = loader.load(&checkpoint).unwrap();
            assert_same(&tensors, &host, &(file, start, way));
            let report = tensors.report();
            let copy = report.device_copy.clone().unwrap();
            assert_eq!(copy.registered_bytes + copy.staged_bytes, report.bytes_read, "{copy:?}");
        }
    }
    // One cached block, of which there is nothing to measure the second way on.
    let checkpoint = open(&paths[2..]);
    let _sim = machine();
    let loader = Loader::new().device(Device::cuda(0).unwrap()).cached_copy(CachedCopy::Measured);
    assert_eq!(loader.load(&checkpoint).unwrap().len(), 1);
}
