//! `fst doctor`: says something about every machine and every checkpoint.

use crate::fixture::{Folder, run};

#[test]
fn json_describes_the_machine() {
    let json = run(["doctor", "--json"]).json();
    assert!(json["cores"].as_u64().unwrap() > 0);
    assert!(json["memory"]["total"].as_u64() >= json["memory"]["available"].as_u64());
    assert!(json["path"].is_null());
    // What it promises is what a load then does.
    let folder = Folder::new();
    let path = folder.synth("c", &["--model", "gpt2", "--layers", "0", "--shrink", "64"]);
    let load = run(["load", path.to_str().unwrap(), "--json"]).json();
    assert_eq!(load["engine"], json["auto"]["engine"]);
    let uring = json["io_uring"]["available"].as_bool().unwrap();
    assert_eq!(json["auto"]["engine"] == "uring", uring);
}

#[test]
fn a_path_is_judged() {
    let folder = Folder::new();
    let args = ["--model", "gpt2", "--layers", "1", "--shrink", "16", "--shards", "2"];
    let path = folder.synth("c", &args);
    let json = run(["doctor", path.to_str().unwrap(), "--json"]).json();
    assert_eq!(json["path"]["files"], 2);
    let bytes = json["path"]["bytes"].as_u64().unwrap();
    assert!(json["path"]["resident_bytes"].as_u64().unwrap() <= bytes);
    assert!(!json["path"]["verdict"].as_str().unwrap().is_empty());

    let text = run(["doctor", path.to_str().unwrap()]);
    assert_eq!((text.status, text.stderr.as_str()), (0, ""));
    for part in ["This machine", "io_uring", "huge pages", "page cache", path.to_str().unwrap()] {
        assert!(text.stdout.contains(part), "no {part} in {}", text.stdout);
    }
    let there = &json["path"]["file_system"];
    assert!(text.stdout.contains(there["kind"].as_str().unwrap()), "{}", text.stdout);
    assert!(there["place"] == "local" || there["place"] == "memory", "{there}");
    // What is not installed takes one short line each.
    if json["nccl"]["library"].is_null() && json["cuda"]["devices"].as_array().unwrap().is_empty() {
        assert!(json["nccl"]["reason"].as_str().unwrap().contains("libnccl.so.2: "), "{json}");
        let line = text.stdout.lines().find(|line| line.contains("NCCL")).unwrap();
        assert!(line.ends_with("not installed: looked for libnccl.so.2, libnccl.so"), "{line}");
    }
    let missing = folder.join("missing");
    let missing = missing.to_str().unwrap();
    assert!(run(["doctor", missing]).error().starts_with(missing));
}
