//! Host memory that is kept for the next load. One test: it looks at the whole process.

#![allow(clippy::unwrap_used)]

mod load_support;

use std::path::{Path, PathBuf};

use fst::{Checkpoint, Dtype, Loader, Tensor};
use load_support::*;
use safetensors::tensor::{Dtype as OfficialDtype, TensorView};

/// So many tensors of 4 MiB and small ones between them.
fn write(dir: &Path, name: &str, count: usize, seed: u64) -> PathBuf {
    let path = dir.join(name);
    let data: Vec<(String, Vec<u8>)> = (0..2 * count)
        .map(|i| {
            (format!("t{i:03}"), noise(if i % 2 == 0 { 4 << 20 } else { 5000 }, seed + i as u64))
        })
        .collect();
    let views = data.iter().map(|(name, data)| {
        (name.clone(), TensorView::new(OfficialDtype::BF16, vec![data.len() / 2], data).unwrap())
    });
    safetensors::serialize_to_file(views, None, &path).unwrap();
    path
}

/// Minor faults and time in the system so far, of all threads.
fn usage() -> (i64, f64) {
    // SAFETY: an all-zero `rusage` is one, and the call fills it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        assert_eq!(libc::getrusage(libc::RUSAGE_SELF, &mut usage), 0);
        usage
    };
    (usage.ru_minflt, usage.ru_stime.tv_sec as f64 + usage.ru_stime.tv_usec as f64 / 1e6)
}

#[test]
fn a_second_load_takes_what_the_first_left() {
    let dir = tempfile::tempdir().unwrap();
    // The second is larger in all and in each arena.
    let paths =
        [write(dir.path(), "a.safetensors", 30, 1), write(dir.path(), "b.safetensors", 31, 2)];
    let checkpoints = paths.each_ref().map(|path| Checkpoint::open(path).unwrap());
    let bytes = checkpoints[0].byte_len();
    let bound = 1 << 30;
    let same = |tensors: &[Tensor], wide: bool, which: usize| {
        let plain = Loader::new();
        let plain = if wide { plain.dtype(Dtype::F32) } else { plain };
        let loaded = plain.load(&checkpoints[which]).unwrap();
        assert_eq!(tensors.len(), loaded.len());
        for tensor in tensors {
            assert!(tensor.bytes().unwrap() == loaded.get(tensor.name()).unwrap().bytes().unwrap());
        }
    };
    let want = official(&paths[1..]);
    for wide in [false, true] {
        let loader = Loader::new().keep_memory(bound);
        let loader = if wide { loader.dtype(Dtype::F32) } else { loader };
        let load = |which: usize, way: usize| -> Vec<Tensor> {
            let (loader, checkpoint) = (loader.clone(), &checkpoints[which]);
            match way {
                0 => loader.load(checkpoint).unwrap().into_iter().collect(),
                1 => {
                    let loading = loader.start(checkpoint).unwrap();
                    loading.finish().unwrap();
                    std::iter::from_fn(|| loading.next()).map(Result::unwrap).collect()
                }
                _ => {
                    let stream = loader.memory_budget(512 << 20).stream(checkpoint).unwrap();
                    stream.map(Result::unwrap).collect()
                }
            }
        };
        for way in 0..3 {
            fst::io::release_kept();
            let mut costs = Vec::new();
            for which in [0, 1, 1] {
                let before = usage();
                let tensors = load(which, way);
                let after = usage();
                costs.push((after.0 - before.0, after.1 - before.1));
                same(&tensors, wide, which);
                if !wide && which == 1 {
                    for tensor in &tensors {
                        assert!(tensor.bytes().unwrap() == want[tensor.name()].2);
                    }
                }
                let in_use = fst::io::kept_bytes();
                assert!(in_use < bytes / 2, "{in_use} bytes are kept beside those in use");
                drop(tensors);
                let kept = fst::io::kept_bytes();
                assert!((bytes..=bound).contains(&kept), "{kept} of {bytes} bytes");
            }
            println!("wide {wide}, way {way}: {costs:?}");
            let (first, last) = (costs[0].0, costs[2].0);
            assert!(last < first / 2 + 500, "{costs:?}");
        }
    }
    // Memory checks count what is kept; who needs it gets it. What other processes take and give back meanwhile
    // shows as well: so it is tried again.
    let available = || fst::AvailableMemory::now().unwrap().bytes;
    let unchanged = (0..20).any(|_| {
        drop(Loader::new().keep_memory(bound).load(&checkpoints[0]).unwrap());
        let (kept, before) = (fst::io::kept_bytes(), available());
        assert!(kept >= bytes, "{kept} of {bytes} bytes");
        assert_eq!(fst::io::release_kept(), kept);
        available().abs_diff(before) < kept / 2
    });
    assert!(unchanged, "what is kept does not count as available");
    // The bound holds, whoever dropped what.
    let loader = Loader::new().keep_memory(40 << 20);
    let tensors: Vec<Tensor> = loader.load(&checkpoints[0]).unwrap().into_iter().collect();
    for tensor in tensors {
        drop(tensor);
        assert!(fst::io::kept_bytes() <= 40 << 20);
    }
    assert!(fst::io::kept_bytes() > 30 << 20);
    fst::io::release_kept();
}
