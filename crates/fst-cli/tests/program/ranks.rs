//! `fst load --world`, `fst sum --world` and `fst plan`.

use serde_json::{Value, json};

use crate::fixture::{Folder, run};
use crate::slices::sums_of_slices;

const LLAMA: [&str; 8] =
    ["--model", "llama-2-7b", "--layers", "1", "--shrink", "10", "--shards", "2"];

#[test]
fn sums_of_shards_are_those_of_slices_of_the_official_reader() {
    let folder = Folder::new();
    let path = folder.synth("llama", &LLAMA);
    let expected = sums_of_slices(&path, 3);
    let path = path.to_str().unwrap();
    for preset in ["llama", "auto"] {
        let sums = run(["sum", path, "--world", "3", "--preset", preset, "--json"]).json();
        let sums = sums["tensors"].as_array().unwrap();
        assert_eq!(sums.len(), expected.len());
        for sum in sums {
            let rank = sum["rank"].as_u64().unwrap() as usize;
            let name = sum["name"].as_str().unwrap().to_owned();
            assert_eq!(*sum, expected[&(rank, name)]);
        }
    }
    let text = run(["sum", path, "--world", "3"]);
    assert_eq!((text.status, text.stdout.lines().count()), (0, expected.len()));
}

#[test]
fn loads_by_ranks_report_each_rank() {
    let folder = Folder::new();
    let path = folder.synth("llama", &LLAMA);
    let path = path.to_str().unwrap();
    let report = run(["load", path, "--world", "4", "--preset", "llama", "--json"]).json();
    for key in ["tensors", "bytes", "seconds", "gb_per_s"] {
        assert!(report[key].as_f64().unwrap() > 0.0, "{key}");
    }
    assert!(report["stages"]["read"]["seconds"].as_f64().unwrap() > 0.0);
    assert_eq!((&report["world"], &report["device"]), (&json!(4), &json!("host")));
    let ranks = report["ranks"].as_array().unwrap();
    let of = |key: &str| ranks.iter().map(|rank| rank[key].as_u64().unwrap()).collect::<Vec<_>>();
    assert_eq!(of("rank"), [0, 1, 2, 3]);
    for key in ["tensors", "bytes", "kept", "read", "sent", "received"] {
        assert_eq!(report[key].as_u64().unwrap(), of(key).iter().sum::<u64>(), "{key}");
    }
    // What is sent arrives, and nobody receives what it does not keep.
    assert_eq!(report["sent"], report["received"]);
    for (kept, received) in of("kept").into_iter().zip(of("received")) {
        assert!(received <= kept);
    }
    // Each byte is read once; a file's ragged edges may cost pages.
    let whole = report["checkpoint_bytes"].as_u64().unwrap();
    let read = report["read"].as_u64().unwrap();
    assert!((whole..whole + whole / 20).contains(&read), "{read} of {whole}");

    let text = run(["load", path, "--world", "2"]);
    assert_eq!(text.status, 0, "{}", text.stderr);
    assert!(text.stdout.contains("2 ranks (preset llama)"), "{}", text.stdout);
    let fused = run(["load", path, "--world", "2", "--fused", "--json"]).json();
    // Query, key and value are one, gate and up are one.
    assert_eq!(report["ranks"][0]["tensors"].as_u64().unwrap() - 3, fused["ranks"][0]["tensors"]);
}

#[test]
fn plans_tell_what_loads_then_do() {
    let folder = Folder::new();
    let path = folder.synth("llama", &LLAMA);
    let path = path.to_str().unwrap();
    let plan = run(["plan", path, "--world", "4", "--preset", "llama", "--json"]).json();
    let load = run(["load", path, "--world", "4", "--preset", "llama", "--json"]).json();
    let ranks = |report: &Value| report["ranks"].as_array().unwrap().clone();
    assert_eq!(ranks(&plan).len(), 4);
    for (plan, load) in ranks(&plan).into_iter().zip(ranks(&load)) {
        for key in ["rank", "kept", "sent", "received"] {
            assert_eq!(plan[key], load[key], "{key}");
        }
    }
    assert_eq!(plan["bytes"], load["checkpoint_bytes"]);
    assert_eq!(plan["digest"].as_str().unwrap().len(), 64);
    assert!(plan["predicted"]["seconds"].as_f64().unwrap() > 0.0);

    let rates = ["--storage-gb-s", "2", "--link-gb-s", "50", "--net-gb-s", "25"];
    let more = [&["plan", path, "--world", "64", "--nodes", "8", "--json"], &rates[..]].concat();
    let slow = run(more).json();
    let seconds = slow["predicted"]["storage_seconds"].as_f64().unwrap();
    assert!(seconds >= slow["bytes"].as_f64().unwrap() / 2e9, "{seconds}");
    let all = slow["alternatives"]["everyone_reads_all"]["seconds"].as_f64().unwrap();
    assert!(all > 60.0 * seconds, "{all} and {seconds}");

    let text = run(["plan", path, "--world", "64"]);
    assert_eq!((text.status, text.stderr.as_str()), (0, ""));
    for part in ["64 ranks", "preset llama", "receives", "Predicted", "every rank reads everything"]
    {
        assert!(text.stdout.contains(part), "{part}: {}", text.stdout);
    }
}

#[test]
fn plans_tell_which_rates_were_measured_and_which_given() {
    let folder = Folder::new();
    let path = folder.synth("llama", &LLAMA);
    let path = path.to_str().unwrap();
    let plan =
        |more: &[&str]| run([&["plan", path, "--world", "4", "--json"], more].concat()).json();
    let rates = |plan: &Value| {
        ["storage", "node_link", "net_link"].map(|link| {
            let rate = &plan["rates"][link];
            assert!(rate["gb_per_s"].as_f64().unwrap() > 0.0, "{link}: {rate}");
            rate["source"].as_str().unwrap().to_owned()
        })
    };
    let default = plan(&[]);
    assert_eq!(rates(&default), ["default"; 3]);
    assert_eq!(default["rates"].get("measured"), None);
    let measured = plan(&["--measure"]);
    // What was in memory says nothing of storage, and is not called that.
    let cached =
        measured["rates"]["measured"]["resident"].as_f64().is_some_and(|share| share >= 0.5);
    let source = if cached { "page cache" } else { "measured" };
    assert_eq!(rates(&measured), [source, "measured", "default"]);
    for link in ["storage", "node_link"] {
        assert_ne!(measured["rates"][link]["gb_per_s"], default["rates"][link]["gb_per_s"]);
    }
    let how = &measured["rates"]["measured"];
    assert_eq!((&how["read_bytes"], &how["copy_ranks"]), (&measured["bytes"], &json!(4)));
    // The prediction is made with what was measured: reading cannot be faster than the storage.
    let storage = measured["rates"]["storage"]["gb_per_s"].as_f64().unwrap() * 1e9;
    let least = measured["bytes"].as_f64().unwrap() / storage;
    let predicted = measured["predicted"]["storage_seconds"].as_f64().unwrap();
    assert!((least * 0.999..least * 1.5).contains(&predicted), "{predicted}, at least {least}");
    let link = measured["rates"]["node_link"]["gb_per_s"].as_f64().unwrap();
    assert!((0.01..1000.0).contains(&link), "{link}");
    let given = plan(&["--measure", "--storage-gb-s", "3.5", "--net-gb-s", "7"]);
    assert_eq!(rates(&given), ["given", "measured", "given"]);
    assert_eq!(given["rates"]["storage"]["gb_per_s"], json!(3.5));
    let given = plan(&["--measure", "--storage-gb-s", "3.5", "--link-gb-s", "7"]);
    assert_eq!(rates(&given), ["given", "given", "default"]);

    let text = run(["plan", path, "--world", "4", "--measure", "--net-gb-s", "7"]);
    for part in [
        &*format!("GB/s ({source}) per storage"),
        "GB/s (measured) per link",
        "7.00 GB/s (given) between nodes",
        if cached { "memory by one reader of" } else { "storage by one reader of" },
        "links by copies between 4 ranks in host memory",
    ] {
        assert!(text.stdout.contains(part), "{part}: {}", text.stdout);
    }
}

#[test]
fn plans_warn_of_presets_that_do_not_fit() {
    let folder = Folder::new();
    let path = folder.synth("llama", &LLAMA);
    let path = path.to_str().unwrap();
    let plan = |preset: &str, world: &str| {
        let run = run(["plan", path, "--world", world, "--preset", preset, "--json"]);
        assert_eq!(run.status, 0, "{}", run.stderr);
        run.stderr
    };
    for preset in ["llama", "moe", "auto"] {
        assert_eq!(plan(preset, "4"), "", "{preset}");
    }
    for preset in ["gpt2", "falcon", "bloom", "gpt-neox", "opt", "replicate"] {
        let warning = plan(preset, "4");
        let start = format!("warning: {path}: preset {preset} cuts ");
        assert!(warning.starts_with(&start) && warning.lines().count() == 1, "{warning}");
        // There is nothing to cut.
        assert_eq!(plan(preset, "1"), "");
    }
    for command in ["load", "sum"] {
        let run = run([command, path, "--world", "2", "--preset", "gpt2", "--json"]);
        assert_eq!(run.status, 0, "{}", run.stderr);
        assert!(
            run.stderr.starts_with("warning: ") && run.stderr.lines().count() == 1,
            "{command}"
        );
    }
}

#[test]
fn rates_that_are_none_are_wrong_usage() {
    for flag in ["--storage-gb-s", "--link-gb-s", "--net-gb-s"] {
        for rate in ["-1", "0", "-0", "NaN", "inf", "-inf", "1e300", "1e-320"] {
            let run = run(["plan", "nowhere", "--world", "4", flag, rate]);
            assert_eq!((run.status, run.stdout.as_str()), (2, ""), "{rate}: {}", run.stderr);
            let words = "a rate is a number of GB/s above zero";
            assert!(run.stderr.contains(flag) && run.stderr.contains(words), "{}", run.stderr);
        }
        let run = run(["plan", "nowhere", "--world", "4", flag, "fast"]);
        assert_eq!((run.status, run.stderr.contains(flag)), (2, true), "{}", run.stderr);
    }
}

#[test]
fn what_cannot_be_done_is_said() {
    let folder = Folder::new();
    let path = folder.synth("llama", &LLAMA);
    let path = path.to_str().unwrap();
    for args in [
        &["load", path, "--world", "0"][..],
        &["load", path, "--world", "2", "--preset", "nonsense"],
        &["load", path, "--world", "2", "--map"],
        &["load", path, "--world", "2", "--dist", "mpi"],
        &["sum", path, "--world", "2", "--slice", "lm_head.weight:0:0..1"],
        &["plan", path],
        &["plan", path, "--world", "4", "--nodes", "3"],
    ] {
        let run = run(args);
        assert_eq!((run.status, run.stdout.as_str()), (2, ""), "{args:?}: {}", run.stderr);
    }
    // Heads that cannot be shared by three ranks, and such as there are none.
    for (world, elements) in [("3", "205"), ("2", "7")] {
        let wrong = run(["load", path, "--world", world, "--head-dim", elements]);
        assert!(wrong.error().starts_with(path), "{}", wrong.error());
        assert!(wrong.error().contains("_proj.weight"), "{}", wrong.error());
    }

    let other = folder.join("other.safetensors");
    crate::fixture::write_raw(
        &other,
        r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}"#,
        &[1, 2],
    );
    let unknown = run(["load", other.to_str().unwrap(), "--world", "2"]);
    assert!(unknown.error().contains("no preset fits"), "{}", unknown.error());
}

/// Runs a command line of the program under limits that the shell sets.
fn under(limits: &str, arguments: &str, path: &std::path::Path) -> std::process::Output {
    let program = env!("CARGO_BIN_EXE_fst");
    let line = format!("{limits}; exec {program} {arguments} '{}'", path.display());
    std::process::Command::new("sh").args(["-c", &line]).output().unwrap()
}

#[test]
fn more_files_than_may_be_open_are_no_hindrance_to_ranks() {
    let folder = Folder::new();
    let many = ["--model", "llama-2-7b", "--layers", "8", "--shrink", "64", "--shards", "60"];
    let path = folder.synth("many", &many);
    // Ranks share what they open, and direct reads leave descriptors to others. A soft limit is raised.
    for (limits, arguments) in [
        ("ulimit -n 128", "load --world 4 --preset llama"),
        ("ulimit -n 100", "load --world 2 --preset llama"),
        ("ulimit -n 100", "load"),
        ("ulimit -Sn 40", "load --world 4 --preset llama"),
        ("ulimit -n 40", "doctor"),
    ] {
        // Out of the page cache, so that the files are opened for direct reads as well.
        for file in std::fs::read_dir(&path).unwrap() {
            let file = std::fs::File::open(file.unwrap().path()).unwrap();
            file.sync_all().unwrap();
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        }
        let output = under(limits, arguments, &path);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{limits}, {arguments}: {stderr}");
    }
    for arguments in ["load", "load --world 2 --preset llama"] {
        let output = under("ulimit -n 40", arguments, &path);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        let advice = "no more than 40 files open at once; raise the limit, as with `ulimit -n`";
        assert!(stderr.contains(advice), "{arguments}: {stderr}");
    }
}

#[test]
fn text_and_json_of_converted_ranks_have_the_same_bytes() {
    let folder = Folder::new();
    let args = ["--model", "llama-2-7b", "--layers", "1", "--shrink", "16"];
    let path = folder.synth("c", &args);
    let load =
        ["load", path.to_str().unwrap(), "--dtype", "F64", "--world", "2", "--preset", "llama"];
    let json: serde_json::Value =
        serde_json::from_str(&run([&load[..], &["--json"]].concat()).stdout).unwrap();
    let megabytes = format!("{:.1} MB", json["bytes"].as_f64().unwrap() / 1e6);
    let text = run(load).stdout;
    assert!(text.lines().nth(1).unwrap().contains(&megabytes), "{megabytes}: {text}");
    assert!(text.lines().any(|line| line.contains(" all ") && line.contains(&megabytes)), "{text}");
}
