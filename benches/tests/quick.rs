//! The harness end to end on a few megabytes: every contender that can run here gives the same tensors,
//! and page-cache states are confirmed.
#![allow(clippy::unwrap_used, reason = "a test's helper may fail loudly")]

use std::path::Path;

use clap::Parser;
use fst_benches::app::{self, Args};
use fst_benches::memory;
use fst_benches::report::Results;

fn run(extra: &[&str]) -> (tempfile::TempDir, anyhow::Result<Option<Results>>) {
    // Beside the sources: a temporary folder may be a tmpfs, whose files cannot be cold.
    let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let (data, out) = (folder.path().join("data"), folder.path().join("out"));
    let paths = ["--data", data.to_str().unwrap(), "--out", out.to_str().unwrap()];
    let args = Args::parse_from([&["load", "--quick"], &paths[..], extra].concat());
    let results = app::run(&args, Path::new(env!("CARGO_BIN_EXE_fst-bench-contender")));
    (folder, results)
}

#[test]
fn every_contender_gives_the_same_tensors() {
    let (folder, results) = run(&[]);
    let results = results.unwrap().unwrap();
    for skipped in &results.skipped {
        eprintln!("not covered: {skipped}");
    }
    assert!(!results.runs.is_empty());
    for run in &results.runs {
        assert_eq!(run.error, None, "{} {}", run.workload, run.label);
        assert!(run.measurement.as_ref().unwrap().seconds > 0.0);
    }
    for name in ["results.json", "results.md", "quick-llama-cold.svg", "quick-open-warm.svg"] {
        assert!(folder.path().join("out").join(name).is_file(), "{name}");
    }
    let json = std::fs::read_to_string(folder.path().join("out/results.json")).unwrap();
    let read: Results = serde_json::from_str(&json).unwrap();
    assert_eq!(read.runs.len(), results.runs.len());
}

#[test]
fn idle_memory_is_what_the_kernel_says_or_does_not_count() {
    let args =
        ["--free-memory", "idle", "--workload", "quick-llama", "--contender", "fst", "--warm"];
    let (_folder, results) = run(&args);
    if memory::returned_bytes().is_none() {
        assert!(format!("{:#}", results.unwrap_err()).contains("reported_kib"));
        return;
    }
    let results = results.unwrap().unwrap();
    assert!(!results.runs.is_empty());
    for run in &results.runs {
        let share = run.taken_back.unwrap();
        assert!((0.0..=1.0).contains(&share), "{share}");
        assert!(!run.state_confirmed || share >= memory::TAKEN_BACK, "{share}");
    }
    let page = results.markdown();
    assert!(page.contains("Free memory was idle"), "{page}");
}

#[test]
fn wrong_names_are_refused() {
    let error = |args: &[&str]| format!("{:#}", run(args).1.unwrap_err());
    assert!(error(&["--workload", "nonsense"]).contains("no workload named nonsense"));
    assert!(error(&["--contender", "nonsense"]).contains("no contender begins with nonsense"));
}
