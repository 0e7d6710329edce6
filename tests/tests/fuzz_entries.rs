//! The fuzz targets' entries on a stable toolchain: all seeds, and a bounded number of mutations
//! of each. `fuzz/` itself needs cargo-fuzz and a nightly toolchain.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::Path;

#[allow(unreachable_pub)]
#[path = "../../fuzz/src/format.rs"]
mod entries;
#[allow(unreachable_pub)]
#[path = "../../fuzz/src/planner.rs"]
mod planner;
#[path = "format_support/rng.rs"]
mod rng;

use rng::Rng;

/// Runs `entry` over the seeds of `target` and mutations of them.
fn run(target: &str, mutations: usize, entry: impl Fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds").join(target);
    let mut seeds: Vec<Vec<u8>> =
        fs::read_dir(folder).unwrap().map(|item| fs::read(item.unwrap().path()).unwrap()).collect();
    seeds.sort();
    assert!(seeds.len() > 5, "the seeds are part of the repository");
    let mut rng = Rng(7);
    for seed in &seeds {
        entry(seed);
        for _ in 0..mutations {
            let mut bytes = seed.clone();
            for _ in 0..1 + rng.below(4) {
                mutate(&mut bytes, &seeds, &mut rng);
            }
            entry(&bytes);
        }
    }
}

/// One change as fuzzers make them: bytes set, put in, taken out, and parts of other seeds.
fn mutate(bytes: &mut Vec<u8>, seeds: &[Vec<u8>], rng: &mut Rng) {
    let at = rng.below(bytes.len() + 1);
    let end = (at + rng.below(9)).min(bytes.len());
    match rng.below(5) {
        0 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte = rng.next() as u8),
        1 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << rng.below(8)),
        2 => drop(bytes.drain(at..end)),
        3 => {
            let copy = bytes[at..end].to_vec();
            let to = rng.below(bytes.len() + 1);
            bytes.splice(to..to, copy);
        }
        _ => {
            let other = &seeds[rng.below(seeds.len())];
            let from = rng.below(other.len() + 1);
            let part = &other[from..(from + rng.below(40)).min(other.len())];
            bytes.splice(at..end, part.iter().copied());
        }
    }
}

#[test]
fn decoder() {
    run("decoder", 2_000, entries::decoder);
}

#[test]
fn checkpoint_index() {
    let folder = entries::IndexFolder::new();
    run("checkpoint_index", 200, |json| folder.checkpoint_index(json));
}

#[test]
fn folder() {
    run("folder", 100, entries::folder);
}

#[test]
fn planner() {
    run("planner", 5_000, planner::planner);
}
