//! Memory that a load to a device pins on the host is asked for before anything is read.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod gpu_support;

use std::fs::{self, File};
use std::io::Write;

use std::sync::Arc;

use fst::dist::local_groups;
use fst::{Checkpoint, Destination, Device, Error, Loader, MemoryLimit, Shard};
use gpu_support::simulated_or_skip;

/// A checkpoint of one tensor of bytes, of which the file holds nothing.
fn sparse(path: &std::path::Path, bytes: u64) -> Checkpoint {
    let header =
        format!(r#"{{"w":{{"dtype":"U8","shape":[{bytes}],"data_offsets":[0,{bytes}]}}}}"#);
    let mut file = File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + bytes).unwrap();
    Checkpoint::open(path).unwrap()
}

/// Does something while this process gets so many more bytes of address space, and no more.
fn within<T>(bytes: u64, act: impl FnOnce() -> T) -> T {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmSize:")).unwrap();
    let used = line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024;
    let mut before = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a valid out pointer.
    assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_AS, &mut before) }, 0);
    let limit = libc::rlimit { rlim_cur: used + bytes, ..before };
    // SAFETY: a valid pointer.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &limit) }, 0);
    let result = act();
    // SAFETY: as above.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &before) }, 0);
    result
}

#[test]
fn pinned_memory_counts_before_anything_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let small = sparse(&dir.path().join("small.safetensors"), 1 << 20);
    let large = sparse(&dir.path().join("large.safetensors"), 300 << 20);
    let _sim = simulated_or_skip!(1, 1 << 30);
    let device = Device::cuda(0).unwrap();
    let loader = Loader::new().device(device.clone());
    let arena = fst::gpu::DeviceArena::new(device.as_cuda().unwrap(), 300 << 20).unwrap();
    // A panic needs memory: what comes of it is looked at when there is some.
    let (refused, loaded) = within(90 << 20, || {
        // SAFETY: the arena lives, and nobody else uses it.
        let place = unsafe { Destination::device_bytes(arena.address(), 300 << 20) };
        let refused = [
            loader.load(&large).map(drop),
            loader.stream(&large).map(drop),
            loader.load_into(&large, [("w", place)]).map(drop),
        ];
        // A small load pins little.
        (refused, loader.load(&small).map(|tensors| tensors.len()))
    });
    for result in refused {
        let error = result.unwrap_err();
        let Error::Memory { needed, available, limit } = error else { panic!("{error}") };
        assert_eq!(limit, MemoryLimit::AddressSpace);
        // The whole ring, and little else.
        assert!((96 << 20..98 << 20).contains(&needed), "{needed}");
        assert!(available <= 90 << 20, "{available}");
    }
    assert_eq!(loaded.unwrap(), 1);
}

/// The number of tensors that each of eight ranks on one device loads.
fn by_ranks(device: &Device, checkpoint: &Checkpoint, keep: bool) -> Vec<Result<usize, Error>> {
    let groups = local_groups(&vec![device.clone(); 8]).unwrap();
    let loader = Loader::new().device(device.clone()).keep_pinned(keep).shard(|_| Shard::split(0));
    std::thread::scope(|scope| {
        let load = |group| {
            let loader = loader.clone().group(Arc::new(group));
            scope.spawn(move || loader.load(checkpoint).map(|tensors| tensors.len()))
        };
        let ranks: Vec<_> = groups.into_iter().map(load).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn memory_that_ranks_pin_counts_together_less_what_is_kept() {
    // Or else each thread takes address space for allocations of its own.
    // SAFETY: no more than a setting.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = sparse(&dir.path().join("small.safetensors"), 1 << 20);
    let sim = simulated_or_skip!(1, 1 << 30);
    let device = Device::cuda(0).unwrap();
    // Room for their stacks, and each alone has room for its ring of 8 MiB.
    let results = within(76 << 20, || by_ranks(&device, &checkpoint, false));
    let errors: Vec<Error> = results.into_iter().map(|result| result.unwrap_err()).collect();
    let told = errors.iter().filter_map(|error| match error {
        Error::Memory { needed, limit: MemoryLimit::AddressSpace, .. } => Some(*needed),
        _ => None,
    });
    assert!(told.clone().count() > 0, "{errors:?}");
    told.for_each(|needed| assert!((64 << 20..68 << 20).contains(&needed), "{needed}"));
    assert_eq!(sim.calls("cuMemHostRegister_v2"), 0);
    // As a load has kept its rings, another needs no more.
    by_ranks(&device, &checkpoint, true).into_iter().for_each(|result| {
        assert_eq!(result.unwrap(), 1);
    });
    // Not all: a rank that is late may take what another has left.
    assert!(fst::gpu::kept_bytes() >= 32 << 20);
    let results = within(76 << 20, || by_ranks(&device, &checkpoint, true));
    results.into_iter().for_each(|result| assert_eq!(result.unwrap(), 1));
    fst::gpu::release_kept();
}
