//! Nothing is held twice: the largest resident set of a process that gets every tensor.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::path::Path;
use std::process::Command;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use fst::Dtype;
use support::{given, write_file};

/// Tensors of the file and their bytes.
const COUNT: usize = 20;
const BYTES: u64 = 5_000_000;

/// What a process may need beside the tensors.
const REST: u64 = 32 << 20;

fn resident(line: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let found = status.lines().find_map(|text| text.strip_prefix(line)).unwrap();
    found.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// The process that is measured.
#[test]
#[ignore = "runs in a process of its own, which the test below starts"]
fn child() {
    let path = std::env::var("FST_CANDLE_FILE").unwrap();
    let loader = std::env::var("FST_CANDLE_LOADER").unwrap();
    let dtype: DType = std::env::var("FST_CANDLE_DTYPE").unwrap().parse().unwrap();
    let before = resident("VmRSS:");
    let vb = match &*loader {
        // SAFETY: nobody changes the file.
        "candle" => unsafe {
            VarBuilder::from_mmaped_safetensors(&[path], dtype, &Device::Cpu).unwrap()
        },
        _ => fst_candle::var_builder(path, dtype, &Device::Cpu).unwrap(),
    };
    let model: Vec<Tensor> =
        (0..COUNT).map(|i| vb.get((2500, 1000), &format!("t{i}")).unwrap()).collect();
    drop(vb);
    println!("peak={}", resident("VmHWM:") - before);
    drop(model);
}

fn peak(loader: &str, dtype: &str, path: &Path) -> u64 {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "child", "--nocapture"])
        .env("FST_CANDLE_FILE", path)
        .env("FST_CANDLE_LOADER", loader)
        .env("FST_CANDLE_DTYPE", dtype)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let found = text.lines().find_map(|line| line.split_once("peak="));
    found.unwrap_or_else(|| panic!("{text}")).1.parse().unwrap()
}

#[test]
fn half_of_what_candle_needs() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let tensors: Vec<_> =
        (0..COUNT).map(|i| given(&format!("t{i}"), Dtype::BF16, &[2500, 1000])).collect();
    write_file(&path, &tensors);
    drop(tensors);
    let all = COUNT as u64 * BYTES;
    let (ours, theirs) = (peak("fst", "bf16", &path), peak("candle", "bf16", &path));
    assert!(ours >= all && ours < all + REST, "{ours}");
    assert!(theirs >= 2 * all, "{theirs}");
    let (ours, theirs) = (peak("fst", "f32", &path), peak("candle", "f32", &path));
    assert!(ours >= 2 * all && ours < 2 * all + REST, "{ours}");
    assert!(theirs >= 3 * all, "{theirs}");
}
