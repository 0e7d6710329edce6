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
        &["plan", path, "--world", "4", "--storage-gb-s", "-1"],
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
