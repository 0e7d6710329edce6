//! `fst sum` against SHA-256 of what the official reader gives.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::slice::IndexOp;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::fixture::{Folder, Run, fst, interrupted, lines_shown, names_in, on_a_terminal, run};

const ENGINES: [&str; 4] = ["auto", "uring", "pread", "mmap"];

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Name, dtype, shape and sum of each tensor in a folder's files, as the official reader has them.
fn official(folder: &Path) -> BTreeMap<String, Value> {
    let mut sums = BTreeMap::new();
    for name in names_in(folder).iter().filter(|name| name.ends_with(".safetensors")) {
        let bytes = std::fs::read(folder.join(name)).unwrap();
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let sum = json!({
                "name": name, "dtype": view.dtype().to_string(), "shape": view.shape(),
                "sha256": sha256(view.data()),
            });
            sums.insert(name, sum);
        }
    }
    sums
}

/// The same as `fst sum --json` has them.
fn ours(args: &[&str]) -> BTreeMap<String, Value> {
    let json = run([&["sum", "--json"], args].concat()).json();
    let sums = json["tensors"].as_array().unwrap();
    let by_name: BTreeMap<String, Value> =
        sums.iter().map(|sum| (sum["name"].as_str().unwrap().to_owned(), sum.clone())).collect();
    assert_eq!(by_name.len(), sums.len());
    by_name
}

#[test]
fn every_model_through_every_engine() {
    let folder = Folder::new();
    for model in fst_cli::models::MODELS {
        let args = ["--model", model.name(), "--layers", "1", "--shrink", "40", "--shards", "2"];
        let path = folder.synth(model.name(), &args);
        let official = official(&path);
        assert_eq!(official.len(), model.first_layers(1).len());
        for engine in ENGINES {
            let ours = ours(&[path.to_str().unwrap(), "--engine", engine]);
            assert!(ours == official, "{} through {engine}", model.name());
        }
    }
}

#[test]
fn mixtures_of_experts_with_all_their_small_tensors() {
    let folder = Folder::new();
    for (model, layers, tensors) in [("deepseek-v3", "4", 1621), ("qwen3-30b-a3b", "48", 18_867)] {
        let args = ["--model", model, "--layers", layers, "--shrink", "64", "--shards", "3"];
        let path = folder.synth(model, &args);
        let official = official(&path);
        assert_eq!(official.len(), tensors);
        for engine in ENGINES {
            let ours = ours(&[path.to_str().unwrap(), "--engine", engine]);
            assert!(ours == official, "{model} through {engine}");
        }
    }
}

#[test]
fn converted_tensors_are_summed_as_converted() {
    let folder = Folder::new();
    let args = ["--model", "falcon-40b", "--layers", "1", "--shrink", "64", "--dtype", "BF16"];
    let path = folder.synth("c", &args);
    let mut wide = BTreeMap::new();
    for name in names_in(&path).iter().filter(|name| name.ends_with(".safetensors")) {
        let bytes = std::fs::read(path.join(name)).unwrap();
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            // A BF16 is the upper half of an F32.
            let wider = |half: &[u8]| [0, 0, half[0], half[1]];
            let bytes: Vec<u8> = view.data().chunks_exact(2).flat_map(wider).collect();
            let sum = json!({
                "name": name, "dtype": "F32", "shape": view.shape(), "sha256": sha256(&bytes),
            });
            wide.insert(name, sum);
        }
    }
    assert!(ours(&[path.to_str().unwrap(), "--dtype", "f32"]) == wide);
}

#[test]
fn the_bar_of_a_selection_knows_its_end() {
    let folder = Folder::new();
    let path = folder.synth("c", &["--model", "gpt2", "--layers", "1", "--shrink", "2"]);
    let path = path.to_str().unwrap();
    let bytes = run(["inspect", path, "--select", "wte.*", "--json"]).json()["total"]["bytes"]
        .as_f64()
        .unwrap();
    let total = format!("/{:.2} MB", bytes / 1e6);
    let shown = on_a_terminal(120, &["sum", path, "--select", "wte.*"]);
    assert!(shown.contains("summing") && shown.contains(&total), "{total} in {shown:?}");
    assert!(!shown.contains("/0 B"), "{shown:?}");
    // It fits a narrow terminal, and is gone at the end.
    let narrow = lines_shown(&on_a_terminal(60, &["sum", path]));
    assert!(narrow.iter().all(|line| line.chars().count() <= 60 || line.len() > 66), "{narrow:?}");
    assert!(!narrow.last().unwrap().contains("summing"), "{narrow:?}");
    // What is converted counts as it is then.
    let shown = on_a_terminal(120, &["sum", path, "--select", "wte.*", "--dtype", "F64"]);
    assert!(shown.contains("summing") && !shown.contains(&total), "{shown:?}");
}

/// Ctrl-C in the midst of a long sum.
#[test]
fn ctrl_c_ends_a_sum() {
    let folder = Folder::new();
    let path = folder.synth("c", &["--model", "llama-2-7b", "--layers", "1", "--shrink", "2"]);
    let output = interrupted(
        || fst(["sum", path.to_str().unwrap()]),
        |child| {
            // Tensors have come.
            let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
            let own = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
            own.and_then(|text| text.trim().strip_suffix(" kB"))
                .is_some_and(|kb| kb.parse::<u64>().unwrap() >= 10_000)
        },
    );
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    assert_eq!((output.stdout, output.stderr), (Vec::new(), b"cancelled\n".to_vec()));
}

#[test]
fn real_shapes_in_more_than_one_block() {
    let folder = Folder::new();
    let path = folder.synth("gpt2", &["--model", "gpt2", "--layers", "1"]);
    let official = official(&path);
    for engine in ENGINES {
        assert!(ours(&[path.to_str().unwrap(), "--engine", engine]) == official, "{engine}");
    }
}

#[test]
fn files_of_the_official_writer_with_odd_sizes() {
    let folder = Folder::new();
    let path = folder.join("odd");
    std::fs::create_dir(&path).unwrap();
    let data: Vec<u8> =
        (0..30_000u32).map(|i| i.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
    let view = |dtype, shape: &[usize], len| TensorView::new(dtype, shape.to_vec(), &data[..len]);
    let tensors = [
        ("scalar", view(Dtype::F64, &[], 8)),
        ("empty", view(Dtype::F32, &[3, 0], 0)),
        ("odd", view(Dtype::U8, &[4097], 4097)),
        ("small", view(Dtype::I8, &[3], 3)),
        ("half", view(Dtype::BF16, &[5, 1001], 10_010)),
        ("packed", view(Dtype::F4, &[2, 3], 3)),
        ("a name with spaces: and colons", view(Dtype::I64, &[7], 56)),
    ];
    let tensors = tensors.map(|(name, view)| (name, view.unwrap()));
    safetensors::serialize_to_file(tensors, None, &path.join("model.safetensors")).unwrap();
    let official = official(&path);
    assert_eq!(official.len(), 7);
    for engine in ENGINES {
        assert_eq!(ours(&[path.to_str().unwrap(), "--engine", engine]), official, "{engine}");
    }
}

#[test]
fn text_has_a_line_per_tensor_in_the_order_of_the_file() {
    let folder = Folder::new();
    let path = folder.synth("c", &["--model", "gpt2", "--layers", "1", "--shrink", "64"]);
    let text = run(["sum", path.to_str().unwrap()]).stdout;
    let bytes = std::fs::read(path.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut views = file.tensors();
    views.sort_by_key(|(_, view)| view.data().as_ptr());
    let expected: String =
        views.iter().map(|(name, view)| format!("{}  {name}\n", sha256(view.data()))).collect();
    assert_eq!(text, expected);
}

/// The slow way: element by element.
fn slice(view: &TensorView<'_>, dim: usize, range: std::ops::Range<usize>) -> Vec<u8> {
    let width = view.dtype().bitsize() / 8;
    let inner: usize = view.shape()[dim + 1..].iter().product();
    let mut bytes = Vec::new();
    for (index, element) in view.data().chunks(width).enumerate() {
        if range.contains(&(index / inner % view.shape()[dim])) {
            bytes.extend_from_slice(element);
        }
    }
    bytes
}

#[test]
fn slices_are_those_of_the_official_bytes() {
    let folder = Folder::new();
    let path = folder.synth("c", &["--model", "gpt2", "--layers", "1", "--shrink", "8"]);
    let bytes = std::fs::read(path.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let whole = official(&path);
    let cuts = [
        ("wte.weight", 0, 7..5000),
        ("wpe.weight", 1, 3..50),
        ("h.0.mlp.c_fc.weight", 1, 0..1),
        ("h.0.attn.bias", 2, 100..128),
        ("h.0.ln_1.weight", 0, 5..5),
    ];
    let mut expected = whole.clone();
    let mut args = vec![path.to_str().unwrap().to_owned()];
    for (name, dim, range) in cuts {
        let view = file.tensor(name).unwrap();
        let mut shape = view.shape().to_vec();
        shape[dim] = range.len();
        let entry = expected.get_mut(name).unwrap();
        entry["shape"] = json!(shape);
        entry["sha256"] = json!(sha256(&slice(&view, dim, range.clone())));
        args.extend(["--slice".into(), format!("{name}:{dim}:{}..{}", range.start, range.end)]);
    }
    // Columns of some rows, and these in another order than that of the file.
    let (name, view) = ("h.0.mlp.c_proj.weight", file.tensor("h.0.mlp.c_proj.weight").unwrap());
    let rows = [40..60, 3..9].map(|rows| view.slice((rows, 1..20)).unwrap());
    let bytes: Vec<u8> = rows.into_iter().flatten().flatten().copied().collect();
    let entry = expected.get_mut(name).unwrap();
    entry["shape"] = json!([26, 19]);
    entry["sha256"] = json!(sha256(&bytes));
    for slice in ["0:40..60", "1:1..20", "0:3..9"] {
        args.extend(["--slice".into(), format!("{name}:{slice}")]);
    }
    for engine in ENGINES {
        let mut args: Vec<&str> = args.iter().map(String::as_str).collect();
        args.extend(["--engine", engine]);
        assert_eq!(ours(&args), expected, "{engine}");
    }
}

#[test]
fn slices_that_do_not_exist_are_errors() {
    let folder = Folder::new();
    let path = folder.synth("c", &["--model", "gpt2", "--layers", "0", "--shrink", "64"]);
    let path = path.to_str().unwrap();
    for slice in ["nope:0:0..1", "wte.weight:2:0..1", "wte.weight:0:0..99999999"] {
        let run = run(["sum", path, "--slice", slice]);
        let name = slice.split(':').next().unwrap();
        let error = run.error();
        assert!(error.starts_with(&format!("{path}: ")) && error.contains(name), "{error}");
    }
}

#[test]
fn a_changed_byte_changes_the_sum() {
    let folder = Folder::new();
    let path = folder.synth("c", &["--model", "gpt2", "--layers", "0", "--shrink", "64"]);
    let before = ours(&[path.to_str().unwrap()]);
    let file = path.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let (header_len, header) = SafeTensors::read_metadata(&bytes).unwrap();
    bytes[8 + header_len + header.info("wpe.weight").unwrap().data_offsets.0 + 100] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let after = ours(&[path.to_str().unwrap()]);
    for (name, sum) in &before {
        assert_eq!(after[name] == *sum, name != "wpe.weight", "{name}");
    }
}

#[test]
fn a_manifest_is_written_and_loads_are_held_to_it() {
    let folder = Folder::new();
    let path = folder.synth("c", &["--model", "gpt2", "--layers", "1", "--shrink", "16"]);
    let path_text = path.to_str().unwrap();
    let manifest = folder.join("sums.json");
    let manifest_text = manifest.to_str().unwrap();
    let written = run(["sum", path_text, "-o", manifest_text]);
    assert_eq!((written.status, written.stderr.as_str()), (0, ""));
    assert!(written.stdout.contains("17 sums written to"), "{}", written.stdout);
    let text = std::fs::read_to_string(&manifest).unwrap();
    assert_eq!(text, run(["sum", path_text, "--json"]).stdout);

    for extra in [&[][..], &["--map"], &["--engine", "pread"], &["--select", "*ln_f*"]] {
        let load = ["load", path_text, "--verify", manifest_text, "--json"];
        let json = run([&load, extra].concat()).json();
        assert_eq!(json["stages"]["verify"]["bytes"], json["bytes"], "{extra:?}");
    }

    let out = run(["load", path_text, "--verify", manifest_text]).stdout;
    assert!(out.ends_with(&format!("\n17 tensors verified by {manifest_text}\n")), "{out}");

    // One bit of one tensor.
    let file = path.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&file, bytes).unwrap();
    for extra in [&[][..], &["--map"]] {
        let bad = run([&["load", path_text, "--verify", manifest_text], extra].concat());
        // With the file, which is to be fetched again.
        let start = format!("{}: tensor ", file.display());
        assert!(bad.error().starts_with(&start), "{}", bad.stderr);
        assert!(bad.error().contains("the manifest says"), "{}", bad.stderr);
    }

    std::fs::write(&manifest, "{").unwrap();
    let bad = run(["load", path_text, "--verify", manifest_text]);
    assert!(bad.error().starts_with(&format!("{manifest_text}: not a manifest")), "{}", bad.stderr);
    let none = run(["load", path_text, "--verify", "/no/such/file"]);
    assert!(none.error().starts_with("/no/such/file: cannot read"), "{}", none.stderr);
    assert_eq!(run(["load", "--verify", manifest_text]).status, 2);
}

#[test]
fn loads_are_held_to_the_text_of_sums_too() {
    let folder = Folder::new();
    let path = folder.synth("c", &["--model", "gpt2", "--layers", "1", "--shrink", "16"]);
    let path = path.to_str().unwrap();
    let sums = folder.join("sums.txt");
    let sums_text = sums.to_str().unwrap();
    let verify =
        |extra: &[&str]| run([&["load", path, "--verify", sums_text, "--json"], extra].concat());
    let text = run(["sum", path]).stdout;
    std::fs::write(&sums, &text).unwrap();
    let json = verify(&[]).json();
    assert_eq!(json["stages"]["verify"]["bytes"], json["bytes"]);
    let some = run(["sum", path, "--select", "*ln_f*"]).stdout;
    std::fs::write(&sums, some).unwrap();
    assert_eq!(verify(&["--select", "*ln_f*"]).json()["tensors"], 2);
    assert!(verify(&[]).error().contains("the manifest"), "tensors without sums are no error");

    let first = if text.starts_with('0') { "1" } else { "0" };
    std::fs::write(&sums, format!("{first}{}", &text[1..])).unwrap();
    let bad = verify(&[]);
    assert!(bad.error().contains("the manifest says"), "{}", bad.stderr);
    std::fs::write(&sums, "SHA256 (wte.weight) = 00\n").unwrap();
    let bad = verify(&[]);
    assert!(bad.error().starts_with(&format!("{sums_text}: not sums: line 1 ")), "{}", bad.stderr);
    assert!(bad.error().contains("fst sum -o FILE"), "{}", bad.stderr);
}

#[test]
fn sums_of_a_selection_end_with_its_size() {
    let folder = Folder::new();
    let path = folder.synth("c", &["--model", "llama-2-7b", "--layers", "1", "--shrink", "10"]);
    let path = path.to_str().unwrap();
    let select = ["--select", "*norm*"];
    let load = run([&["load", path, "--json"], &select[..]].concat()).json();
    let all = run(["sum", path]).stdout.lines().count();
    let text = run([&["sum", path], &select[..]].concat()).stdout;
    let bytes = load["bytes"].as_f64().unwrap() / 1e3;
    assert_eq!(text.lines().last().unwrap(), format!("# 3 of {all} tensors, {bytes:.1} kB"));
    assert_eq!(text.lines().count(), 4);
    // Norms are kept by every rank.
    let text = run([&["sum", path, "--world", "2"], &select[..]].concat()).stdout;
    assert_eq!(text.lines().last().unwrap(), format!("# 6 shards, {:.1} kB", 2.0 * bytes));
}

#[test]
fn sums_go_to_standard_output_for_a_dash() {
    let folder = Folder::new();
    let path = folder.synth("c", &["--model", "gpt2", "--layers", "0", "--shrink", "16"]);
    let (path, file) = (path.to_str().unwrap(), folder.join("sums.json"));
    assert_eq!(run(["sum", path, "-o", file.to_str().unwrap()]).status, 0);
    let told = run(["sum", path, "-o", "-"]);
    assert_eq!((told.status, told.stdout), (0, std::fs::read_to_string(file).unwrap()));
}

#[test]
fn models_of_the_hub_are_found_by_id_and_held_to_its_sums() {
    let folder = Folder::new();
    let made = folder.synth("made", &["--model", "gpt2", "--layers", "1", "--shrink", "16"]);
    let made = made.join(&names_in(&made)[0]);
    let sum = sha256(&std::fs::read(&made).unwrap());
    // As `hf download org/name` leaves it.
    let model = folder.join("hub/models--org--name");
    let snapshot = model.join("snapshots/abc");
    for part in ["blobs", "refs", "snapshots/abc"] {
        std::fs::create_dir_all(model.join(part)).unwrap();
    }
    std::fs::write(model.join("refs/main"), "abc").unwrap();
    let blob = model.join("blobs").join(&sum);
    std::fs::rename(made, &blob).unwrap();
    let link = format!("../../blobs/{sum}");
    std::os::unix::fs::symlink(link, snapshot.join("model.safetensors")).unwrap();

    let with = |args: &[&str]| {
        let mut command = fst(args);
        command.env_remove("HF_HUB_CACHE").env("HF_HOME", folder.join(""));
        Run::of(command.output().unwrap())
    };
    for command in [&["load"][..], &["sum"], &["inspect"], &["plan", "--world", "2"], &["doctor"]] {
        let run = with(&[command, &["org/name"]].concat());
        assert_eq!((run.status, &*run.stderr), (0, ""), "{command:?}");
    }
    let whole = with(&["sum", "--hub", "org/name"]).stdout;
    assert!(
        whole.starts_with(&format!("{sum}  ")) && whole.contains("# 1 file as the hub recorded")
    );
    let json = with(&["sum", "--hub", "org/name", "--json"]).json();
    assert_eq!(json["files"][0]["sum"], json["files"][0]["recorded"]);
    let other = with(&["load", "org/other"]);
    for part in ["org/other: no such file or folder", "hf download org/other", "hub"] {
        assert!(other.error().contains(part), "{}", other.error());
    }

    // A small file is a git object.
    let bytes = std::fs::read(&blob).unwrap();
    let mut git = sha1::Sha1::new_with_prefix(format!("blob {}\0", bytes.len()));
    git.update(&bytes);
    let id: String = git.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    let object = model.join("blobs").join(&id);
    std::fs::rename(&blob, &object).unwrap();
    let file = snapshot.join("model.safetensors");
    std::fs::remove_file(&file).unwrap();
    std::os::unix::fs::symlink(format!("../../blobs/{id}"), &file).unwrap();
    assert!(with(&["sum", "--hub", "org/name"]).stdout.starts_with(&format!("{id}  ")));

    // One bit of it is no longer what it was.
    let mut bytes = bytes;
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&object, &bytes).unwrap();
    let run = with(&["sum", "--hub", "org/name"]);
    assert!(run.error().contains("model.safetensors: is damaged") && run.error().contains(&id));
    // Nobody recorded anything of this one.
    let run = with(&["sum", "--hub", object.to_str().unwrap()]);
    assert!(run.error().contains("recorded no sum"), "{}", run.stderr);
}
