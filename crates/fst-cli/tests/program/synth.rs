//! `fst synth`: what it makes, what it refuses, what it leaves behind.

use std::collections::BTreeMap;

use safetensors::SafeTensors;
use serde_json::Value;

use crate::fixture::{Folder, fst, interrupted, names_in, run};

/// Small enough for a test, with every tensor of one layer.
const SMALL: [&str; 4] = ["--layers", "1", "--shrink", "64"];

#[test]
fn the_official_reader_reads_every_model() {
    let folder = Folder::new();
    for model in fst_cli::models::MODELS {
        let name = model.name();
        let path = folder.synth(name, &[&["--model", name, "--shards", "1"], &SMALL[..]].concat());
        assert_eq!(names_in(&path), ["model.safetensors"]);
        let bytes = std::fs::read(path.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let mut ours: Vec<String> = model.first_layers(1).into_iter().map(|t| t.name).collect();
        let mut official: Vec<String> = file.names().into_iter().map(ToOwned::to_owned).collect();
        ours.sort();
        official.sort();
        assert_eq!(ours, official);
        std::fs::remove_dir_all(path).unwrap();
    }
}

#[test]
fn a_sharded_checkpoint_has_an_index_that_agrees() {
    let folder = Folder::new();
    let path =
        folder.synth("c", &[&["--model", "llama-2-7b", "--shards", "3"], &SMALL[..]].concat());
    assert_eq!(
        names_in(&path),
        [
            "model-00001-of-00003.safetensors",
            "model-00002-of-00003.safetensors",
            "model-00003-of-00003.safetensors",
            "model.safetensors.index.json"
        ]
    );
    let text = std::fs::read_to_string(path.join("model.safetensors.index.json")).unwrap();
    let index: Value = serde_json::from_str(&text).unwrap();
    let mut total = 0;
    let mut map = BTreeMap::new();
    for name in &names_in(&path)[..3] {
        let bytes = std::fs::read(path.join(name)).unwrap();
        for (tensor, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            total += view.data().len();
            map.insert(tensor, name.clone());
        }
    }
    assert_eq!(index["metadata"]["total_size"], total);
    assert_eq!(index["weight_map"], serde_json::json!(map));
}

#[test]
fn the_same_seed_gives_the_same_bytes_whatever_the_cut() {
    let folder = Folder::new();
    let tensors = |name: &str, args: &[&str]| {
        let path = folder.synth(name, &[&["--model", "falcon-40b"], &SMALL[..], args].concat());
        let mut tensors = BTreeMap::new();
        for name in names_in(&path).iter().filter(|name| name.ends_with(".safetensors")) {
            let bytes = std::fs::read(path.join(name)).unwrap();
            for (tensor, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
                tensors.insert(tensor, view.data().to_vec());
            }
        }
        tensors
    };
    let one = tensors("one", &["--seed", "7"]);
    assert_eq!(tensors("two", &["--seed", "7", "--shards", "2"]), one);
    let other = tensors("other", &["--seed", "8"]);
    assert!(one.iter().all(|(name, bytes)| other[name] != *bytes));
}

#[test]
fn dtype_changes_floating_point_tensors() {
    let folder = Folder::new();
    let args = [&["--model", "llama-2-70b", "--dtype", "BF16"], &SMALL[..]].concat();
    let path = folder.synth("c", &args);
    let json = run(["inspect", path.to_str().unwrap(), "--json"]).json();
    let dtypes = json["dtypes"].as_array().unwrap();
    assert_eq!(dtypes.len(), 1);
    assert_eq!(dtypes[0]["dtype"], "BF16");
}

#[test]
fn nothing_is_overwritten() {
    let folder = Folder::new();
    let path = folder.synth("c", &[&["--model", "gpt2"], &SMALL[..]].concat());
    let before = std::fs::read(path.join("model.safetensors")).unwrap();
    let args = ["synth", path.to_str().unwrap(), "--model", "gpt2", "--layers", "0"];
    let again = run(args);
    assert!(again.error().contains("already exists"), "{}", again.stderr);
    assert_eq!(std::fs::read(path.join("model.safetensors")).unwrap(), before);
    assert_eq!(names_in(&path), ["model.safetensors"]);

    let left = folder.join("left by a killed run");
    std::fs::create_dir(&left).unwrap();
    std::fs::write(left.join("model.safetensors.partial"), "x").unwrap();
    let run_on = run(["synth", left.to_str().unwrap(), "--model", "gpt2", "--layers", "0"]);
    assert!(run_on.error().contains("model.safetensors.partial: already exists"));
    assert_eq!(names_in(&left), ["model.safetensors.partial"]);

    let file = folder.join("file");
    std::fs::write(&file, "").unwrap();
    let run = run(["synth", file.to_str().unwrap(), "--model", "gpt2"]);
    assert!(run.error().starts_with(file.to_str().unwrap()));
}

#[test]
fn a_folder_that_cannot_be_made_is_an_error() {
    // Nobody makes folders there, not even the superuser.
    let run = run(["synth", "/proc/fst-test", "--model", "gpt2"]);
    assert!(run.error().starts_with("/proc/fst-test: "), "{}", run.stderr);
}

#[test]
fn a_limit_on_file_size_ends_it_cleanly() {
    let folder = Folder::new();
    let path = folder.join("c");
    // As a full drive: the write fails midway. The shell ignores the signal that comes with it.
    let status = format!(
        "trap '' XFSZ; ulimit -f 2000; exec {} synth {} --model gpt2 --layers 1",
        env!("CARGO_BIN_EXE_fst"),
        path.display()
    );
    let output = std::process::Command::new("sh").args(["-c", &status]).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.starts_with(&format!("error: {}", path.display())), "{stderr}");
    assert!(stderr.contains("File too large"), "{stderr}");
    assert!(!path.exists(), "{:?}", names_in(&path));
}

#[test]
fn ctrl_c_leaves_nothing_behind() {
    let folder = Folder::new();
    let path = folder.join("c");
    let program = || {
        let _ = std::fs::remove_dir_all(&path);
        fst(["synth", path.to_str().unwrap(), "--model", "llama-2-7b", "--layers", "1"])
    };
    let is_under_way = |_: &_| path.exists() && !names_in(&path).is_empty();
    let output = interrupted(program, is_under_way);
    assert_eq!(output.status.code(), Some(130));
    assert!(!path.exists(), "{:?}", names_in(&path));
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_written() {
    let folder = Folder::new();
    let path = folder.join("c");
    // 5.4 TB.
    let args = ["--model", "deepseek-v3", "--dtype", "F64", "--json"];
    let space = rustix::fs::statvfs(folder.join("")).unwrap();
    let free = space.f_bavail * space.f_frsize;
    assert!(free < 5 << 40, "SKIPPED: this machine has room for anything");
    let run = run([&["synth", path.to_str().unwrap()], &args[..]].concat());
    let error = run.error();
    assert!(error.starts_with(&format!("{}: no room for ", path.display())), "{error}");
    assert!(error.contains("bytes are free"), "{error}");
    assert!(!path.exists());
}

/// Seconds of a processor that this thread has had.
fn processor_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// It once took a minute to cut these into files.
#[test]
fn ninety_thousand_tensors_take_seconds() {
    let start = processor_seconds();
    let model = fst_cli::models::Model::find("deepseek-v3").unwrap();
    let plan = fst_cli::synth::Recipe::new(model).shrink(512).plan().unwrap();
    assert_eq!(plan.iter().map(|shard| shard.tensors.len()).sum::<usize>(), 91_991);
    let took = processor_seconds() - start;
    assert!(took < 5.0, "{took} s");
}

#[test]
fn more_layers_than_a_model_has_are_refused() {
    let folder = Folder::new();
    let path = folder.join("c");
    let run = run(["synth", path.to_str().unwrap(), "--model", "gpt2", "--layers", "13"]);
    assert_eq!(run.status, 2, "{}", run.stderr);
    assert!(run.stderr.contains("--layers 13: gpt2 has 12 layers"), "{}", run.stderr);
    assert!(!path.exists());
}
