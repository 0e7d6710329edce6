//! Loads in the background by several ranks, against slices of what the official reader gives.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod dist_support;
mod gpu_support;

use std::sync::Arc;
use std::time::Duration;

use dist_support::{ByName, LONG, Values, assert_same, expected, official, synth};
use fst::dist::group::HostCopier;
use fst::{
    CancelToken, Checkpoint, Device, DistError, Dtype, Error, Group, Loader, LocalGroup, Preset,
    Tensor,
};

fn value(tensor: &Tensor) -> (String, Values) {
    let bytes = tensor.to_host().unwrap().bytes().unwrap().to_vec();
    let (dtype, shape) = (tensor.dtype().to_string(), tensor.shape().to_vec());
    (tensor.name().to_owned(), Values { dtype, shape, bytes })
}

/// What each rank's `run` gives, on a thread of its own.
fn on_ranks<T: Send>(
    groups: impl IntoIterator<Item = Arc<dyn Group>>,
    run: impl Fn(usize, Arc<dyn Group>) -> T + Sync,
) -> Vec<T> {
    std::thread::scope(|scope| {
        let run = &run;
        let ranks = groups.into_iter().enumerate();
        let ranks: Vec<_> =
            ranks.map(|(rank, group)| scope.spawn(move || run(rank, group))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn local(world: u32) -> Vec<Arc<dyn Group>> {
    let groups = LocalGroup::with(world, HostCopier, LONG);
    groups.into_iter().map(|group| Arc::new(group) as Arc<dyn Group>).collect()
}

#[test]
fn shards_come_by_name_and_as_they_land() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    synth(&path, "llama-2-7b", |recipe| recipe.layers(1).shrink(16).shards(2).dtype(Dtype::BF16));
    let all = official(&path);
    let _sim = gpu_support::machine();
    for world in [1, 3] {
        for wide in [false, true] {
            for device in [Device::host(), Device::cuda(0).unwrap()] {
                let groups = match device.as_cuda() {
                    None => local(world),
                    Some(_) => {
                        let devices = vec![device.clone(); world as usize];
                        let groups = fst::dist::local_groups(&devices).unwrap();
                        groups.into_iter().map(|group| Arc::new(group) as _).collect()
                    }
                };
                let results = on_ranks(groups, |rank, group| {
                    let checkpoint = Checkpoint::open(&path).unwrap();
                    let loader = Loader::new().device(device.clone()).group(group.clone());
                    let loader = loader.preset(Preset::llama()).staging(8 << 20);
                    let loader = if wide { loader.dtype(Dtype::F32) } else { loader };
                    let mut found = ByName::new();
                    // A rank takes them by name, from the last on; others as they come.
                    if rank == 1 {
                        let loading = loader.start(&checkpoint).unwrap();
                        let expected = expected("llama", &all, rank, world as usize);
                        assert_eq!(loading.remaining(), expected.len());
                        found.extend(
                            expected.keys().rev().map(|n| value(&loading.take(n).unwrap())),
                        );
                        assert!(loading.next().is_none());
                        let report = loading.finish().unwrap();
                        assert_eq!(report.bytes, loading.byte_len());
                        assert_eq!(report.rank.unwrap().rank, 1);
                    } else {
                        let mut stream = loader.stream(&checkpoint).unwrap();
                        found.extend((&mut stream).map(|tensor| value(&tensor.unwrap())));
                        assert_eq!(stream.report().unwrap().tensors, found.len());
                    }
                    // The group is free again.
                    assert_eq!(loader.load(&checkpoint).unwrap().len(), found.len());
                    found
                });
                for (rank, found) in results.into_iter().enumerate() {
                    let mut expected = expected("llama", &all, rank, world as usize);
                    for value in expected.values_mut().filter(|v| wide && v.dtype == "BF16") {
                        // Every bfloat16 is the upper half of a float.
                        let wide = value.bytes.chunks_exact(2).flat_map(|b| [0, 0, b[0], b[1]]);
                        (value.bytes, value.dtype) = (wide.collect(), "F32".to_owned());
                    }
                    assert_same(&found, &expected, &format!("{device}, rank {rank} of {world}"));
                }
            }
        }
    }
}

#[test]
fn a_rank_that_leaves_ends_the_load_of_all() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    synth(&path, "llama-2-7b", |recipe| recipe.layers(1).shrink(16));
    let checkpoint = Checkpoint::open(&path).unwrap();
    // By dropping its load before the others begin, by its token, and by a plan of its own.
    for way in 0..3 {
        let results = on_ranks(local(2), |rank, group| {
            let token = CancelToken::new();
            let mut loader = Loader::new().group(group).cancel(token.clone());
            if rank == 1 {
                match way {
                    0 => {}
                    1 => token.cancel(),
                    _ => loader = loader.select("model.layers.0.*"),
                }
            }
            let loading = match loader.start(&checkpoint) {
                Ok(loading) => loading,
                Err(error) => return Err(error),
            };
            if (rank, way) == (1, 0) {
                loading.cancel();
            }
            loop {
                match loading.next_timeout(Duration::from_secs(60)) {
                    Ok(Some(_)) => {}
                    Ok(None) => return loading.finish().map(drop),
                    Err(error) => return Err(error),
                }
            }
        });
        // A rank may have been done before the other left.
        let errors: Vec<_> = results.iter().map(|result| result.as_ref().err()).collect();
        if way > 0 {
            assert!(errors.iter().all(Option::is_some), "{errors:?}");
        }
        assert_eq!(errors[0].is_some(), errors[1].is_some(), "{errors:?}");
    }
}

#[test]
fn what_a_group_cannot_do_is_said_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    synth(&path, "gpt2", |recipe| recipe.layers(1).shrink(12));
    let checkpoint = Checkpoint::open(&path).unwrap();
    let group = local(1).remove(0);
    let loader = Loader::new().group(group);
    let error = loader.clone().memory_budget(1 << 30).start(&checkpoint).unwrap_err();
    assert!(matches!(error, Error::Dist(DistError::LoadOnly { .. })), "{error}");
    let error = loader.clone().select("none").start(&checkpoint).unwrap_err();
    assert!(matches!(error, Error::Select(fst::SelectError::NoMatch { .. })), "{error}");
}
