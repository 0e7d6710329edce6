//! Tensors by name within a budget: what somebody waits for does not stay behind what nobody asked for.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod gpu_support;

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use fst::{Checkpoint, Device, Dtype, Engine, Loader, Request};
use fst_tests::write;
use gpu_support::{assert_same_bytes, machine};

/// Tensors of so many KiB, in one file.
fn tensors(dir: &Path, count: usize, kib: usize) -> Checkpoint {
    let names: Vec<&'static str> = (0..count).map(|i| &*format!("t{i:03}").leak()).collect();
    let specs: Vec<fst_tests::Spec> =
        names.iter().map(|name| (*name, safetensors::Dtype::F32, vec![kib, 256])).collect();
    write(&dir.join("model.safetensors"), &specs);
    Checkpoint::open(dir).unwrap()
}

#[test]
fn any_order_goes_through_a_budget_that_holds_little_of_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = tensors(dir.path(), 48, 2048);
    let all = Loader::new().load(&checkpoint).unwrap();
    let names: Vec<&str> = all.iter().map(|tensor| tensor.name()).collect();
    let backwards = |at: usize| names.len() - 1 - at;
    let strided = |at: usize| at * 29 % names.len();
    let orders: [&(dyn Fn(usize) -> usize + Sync); 2] = [&backwards, &strided];
    let _sim = machine();
    // An eighth of the model. A half of each tensor's rows passes through scratch memory, as do conversions.
    let halves = names.iter().step_by(2).map(|name| Request::new(*name).slice(1, 0..128));
    let rest = names.iter().skip(1).step_by(2).map(|name| Request::new(*name));
    let mixed = Loader::new().request(halves.chain(rest));
    for device in [Device::host(), Device::cuda(0).unwrap()] {
        for (case, loader) in
            [Loader::new(), Loader::new().dtype(Dtype::BF16), mixed.clone()].into_iter().enumerate()
        {
            let loaded = loader.load(&checkpoint).unwrap();
            // On a device tensors bring more neighbours than an order that jumps makes use of.
            let orders = if device.is_host() { &orders[..] } else { &orders[..1] };
            for (order, workers) in orders.iter().zip([1, 3]) {
                let budget = 24 << 20;
                let loader = loader.clone().device(device.clone()).memory_budget(budget);
                let loader = loader.engine(Engine::Pread).workers(workers);
                let loader = loader.stall_timeout(Duration::from_secs(20));
                let loading = loader.start(&checkpoint).unwrap();
                let next = AtomicUsize::new(0);
                std::thread::scope(|scope| {
                    for _ in 0..2 {
                        scope.spawn(|| {
                            while let at = next.fetch_add(1, Ordering::Relaxed)
                                && at < names.len()
                            {
                                let name = names[order(at)];
                                let tensor = loading.take(name);
                                let tensor =
                                    tensor.unwrap_or_else(|e| panic!("{case} {name}: {e}"));
                                assert_same_bytes(&tensor, &loaded);
                            }
                        });
                    }
                });
                loading.finish().unwrap();
                assert!(loading.peak_bytes() <= budget);
            }
        }
    }
}

#[test]
fn small_tensors_bring_their_neighbours() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = tensors(dir.path(), 600, 64);
    let all = Loader::new().load(&checkpoint).unwrap();
    let names: Vec<&str> = all.iter().map(|tensor| tensor.name()).collect();
    let loader = Loader::new().memory_budget(16 << 20).stall_timeout(Duration::from_secs(20));
    let loading = loader.start(&checkpoint).unwrap();
    // Layers in another order than that of the file.
    for layer in names.chunks(8).rev() {
        for name in layer {
            assert_same_bytes(&loading.take(name).unwrap(), &all);
        }
    }
    assert!(loading.finish().is_ok() && loading.peak_bytes() <= 16 << 20);
    // Held tensors and a budget for all: nothing is held back.
    let loading = loader.clone().memory_budget(1 << 30).start(&checkpoint).unwrap();
    loading.finish().unwrap();
    assert!(names.iter().all(|name| loading.try_get(name).unwrap().is_some()));
    // Who polls gets what is asked for.
    let loading = loader.start(&checkpoint).unwrap();
    let last = names.last().unwrap();
    while loading.try_get(last).unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
}
