//! `fst inspect` against the official parser.

use std::collections::BTreeMap;
use std::io::Read;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use safetensors::SafeTensors;

use crate::fixture::{Folder, fst, lines_shown, on_a_terminal, run, write_raw};

#[test]
fn json_says_what_the_official_parser_says() {
    let folder = Folder::new();
    let args = ["--model", "deepseek-v3", "--layers", "4", "--shrink", "64", "--shards", "3"];
    let path = folder.synth("checkpoint", &args);
    let json = run(["inspect", path.to_str().unwrap(), "--json"]).json();

    let files = json["files"].as_array().unwrap();
    assert_eq!(files.len(), 3);
    let mut official = BTreeMap::new();
    for (index, file) in files.iter().enumerate() {
        let bytes = std::fs::read(file["path"].as_str().unwrap()).unwrap();
        assert_eq!(file["bytes"], bytes.len());
        let (header_len, header) = SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(file["data_start"], header_len + 8);
        assert_eq!(file["metadata"], serde_json::json!(header.metadata()));
        for (name, info) in header.tensors() {
            let (start, end) = info.data_offsets;
            official.insert(
                name,
                serde_json::json!({
                    "dtype": info.dtype.to_string(), "shape": info.shape, "bytes": end - start,
                    "file": index, "offset": header_len + 8 + start,
                }),
            );
        }
    }
    let mut ours = BTreeMap::new();
    for tensor in json["tensors"].as_array().unwrap() {
        let mut tensor = tensor.clone();
        let name = tensor.as_object_mut().unwrap().remove("name").unwrap();
        ours.insert(name.as_str().unwrap().to_owned(), tensor);
    }
    assert_eq!(ours, official);

    let total = |key: &str| -> u64 {
        json["dtypes"].as_array().unwrap().iter().map(|d| d[key].as_u64().unwrap()).sum()
    };
    assert_eq!(json["total"]["tensors"], official.len());
    assert_eq!(json["total"]["tensors"], total("tensors"));
    assert_eq!(json["total"]["bytes"], total("bytes"));
    assert_eq!(json["total"]["elements"], total("elements"));
    assert_eq!(json["total"]["files"], 3);
}

#[test]
fn many_tensors_are_summarized_and_all_lists_them() {
    let folder = Folder::new();
    let path =
        folder.synth("moe", &["--model", "qwen3-30b-a3b", "--layers", "2", "--shrink", "512"]);
    let path = path.to_str().unwrap();
    let summary = run(["inspect", path]).stdout;
    assert!(
        summary.contains("model.layers.{0..1}.mlp.experts.{0..127}.up_proj.weight"),
        "{summary}"
    );
    assert!(summary.lines().count() < 40, "{summary}");
    let all = run(["inspect", path, "--all"]).stdout;
    assert!(all.contains("model.layers.1.mlp.experts.127.up_proj.weight"));
    assert!(all.lines().count() > 700);
}

#[test]
fn metadata_is_shown() {
    let folder = Folder::new();
    let path = folder.join("x.safetensors");
    write_raw(&path, r#"{"__metadata__":{"made by":"a test","long":"LONG"}}"#
        .replace("LONG", &"x".repeat(500)).as_str(), &[]);
    let text = run(["inspect", path.to_str().unwrap()]).stdout;
    assert!(text.contains("made by") && text.contains("a test"), "{text}");
    assert!(text.contains("xxx...") && !text.contains(&"x".repeat(200)), "{text}");
    let json = run(["inspect", path.to_str().unwrap(), "--json"]).json();
    assert_eq!(json["metadata"]["made by"], "a test");
    assert_eq!(json["metadata"]["long"], "x".repeat(500));
}

#[test]
fn select_takes_the_patterns_that_the_summary_shows() {
    let folder = Folder::new();
    let path = folder.synth("c", &["--model", "llama-2-7b", "--layers", "12", "--shrink", "64"]);
    let path = path.to_str().unwrap();
    let summary = run(["inspect", path]).stdout;
    let shown = summary.split("Tensors by name").nth(1).unwrap();
    let rows = shown.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    let mut patterns = 0;
    for row in rows.filter(|row| row.len() > 2 && row[2] == "x") {
        let json = run(["inspect", path, "--json", "--select", row[0]]).json();
        let count: u64 = row[1].replace(',', "").parse().unwrap();
        assert_eq!(json["total"]["tensors"], count, "{row:?}");
        assert_eq!(json["tensors"].as_array().unwrap().len() as u64, count);
        patterns += u64::from(row[0].contains("{0..11}"));
    }
    assert!(patterns >= 9, "{summary}");
}

#[test]
fn what_is_selected_is_what_a_load_would_take() {
    let folder = Folder::new();
    let path = folder.synth("c", &["--model", "llama-2-7b", "--layers", "3", "--shrink", "64"]);
    let path = path.to_str().unwrap();
    let select = ["--select", "*.{1..2}.*", "--select", "*norm*"];
    let of = |command: &str| run([&[command, path, "--json"], &select[..]].concat()).json();
    let (inspect, load) = (of("inspect"), of("load"));
    assert_eq!(inspect["total"]["tensors"], load["tensors"]);
    assert_eq!(inspect["total"]["bytes"], load["bytes"]);
    let plan = run([&["plan", path, "--world", "2", "--json"], &select[..]].concat()).json();
    assert_eq!((&plan["tensors"], &plan["bytes"]), (&load["tensors"], &load["bytes"]));
    let none = run(["inspect", path, "--select", "nothing*"]);
    assert!(none.error().contains("no tensor matches \"nothing*\""), "{}", none.stderr);
}

#[test]
fn a_selection_is_counted_alone() {
    let folder = Folder::new();
    let args = ["--model", "llama-2-7b", "--layers", "3", "--shrink", "64", "--shards", "3"];
    let path = folder.synth("c", &args);
    let path = path.to_str().unwrap();
    let all = run(["inspect", path, "--json"]).json();
    // The tensors of the last file.
    let last: Vec<&str> = (all["tensors"].as_array().unwrap().iter())
        .filter(|tensor| tensor["file"] == 2)
        .map(|tensor| tensor["name"].as_str().unwrap())
        .take(2)
        .collect();
    let select = ["--select", last[0], "--select", last[1]];
    let some = run([&["inspect", path, "--json"], &select[..]].concat()).json();
    assert_eq!((&some["total"]["tensors"], &some["total"]["files"]), (&2.into(), &1.into()));
    let files = some["files"].as_array().unwrap();
    assert_eq!((files.len(), &files[0]["path"]), (1, &all["files"][2]["path"]));
    assert_eq!((&files[0]["tensors"], &files[0]["bytes"]), (&2.into(), &all["files"][2]["bytes"]));
    assert_eq!(files[0]["tensor_bytes"], some["total"]["bytes"]);
    for tensor in some["tensors"].as_array().unwrap() {
        assert_eq!(tensor["file"], 0);
        let whole = all["tensors"].as_array().unwrap();
        let same = whole.iter().find(|other| other["name"] == tensor["name"]).unwrap();
        assert_eq!((&tensor["offset"], &tensor["bytes"]), (&same["offset"], &same["bytes"]));
    }
    let text = run([&["inspect", path], &select[..]].concat()).stdout;
    let (count, files) = (all["total"]["tensors"].as_u64().unwrap(), "in 3 files");
    assert!(text.contains("  2 tensors, ") && text.contains("in 1 file\n"), "{text}");
    assert!(text.contains(&format!("  of {count} tensors, ")) && text.contains(files), "{text}");
    let text = run(["inspect", path]).stdout;
    assert!(!text.contains("  of "), "{text}");
}

#[test]
fn one_signal_ends_what_no_load_heeds() {
    let folder = Folder::new();
    let args = ["--model", "qwen3-30b-a3b", "--shrink", "64", "--layers", "8"];
    let path = folder.synth("many", &args);
    let mut program = fst(["inspect", path.to_str().unwrap(), "--json"]);
    let mut child = program.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    // The program fills the pipe, which nobody reads on, and waits there.
    let mut output = child.stdout.take().unwrap();
    output.read_exact(&mut [0]).unwrap();
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("the program goes on after a signal");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert_eq!(status.code(), Some(130));
}

#[test]
fn a_hangup_that_nohup_ignores_stays_ignored() {
    let folder = Folder::new();
    let args = ["--model", "qwen3-30b-a3b", "--shrink", "64", "--layers", "8"];
    let path = folder.synth("many", &args);
    // The program inherits what its shell ignores.
    let mut child = std::process::Command::new("sh")
        .args(["-c", "trap '' HUP; exec \"$0\" inspect \"$1\" --json"])
        .args([fst([""; 0]).get_program(), path.as_os_str()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // It waits for the pipe, which is full, when the terminal goes away.
    let mut output = child.stdout.take().unwrap();
    output.read_exact(&mut [0]).unwrap();
    kill_process(Pid::from_child(&child), Signal::HUP).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(50));
    output.read_to_end(&mut Vec::new()).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn rows_fit_the_terminal_and_there_are_not_too_many() {
    let folder = Folder::new();
    let path = folder.join("long.safetensors");
    // Words that are no numbers: each name is a pattern of its own.
    let word = |i: usize| {
        let letter = |n: usize| char::from(b'a' + (n % 26) as u8);
        [letter(i / 676), letter(i / 26), letter(i)].iter().collect::<String>()
    };
    let name = |i: usize| format!("{}.{}", word(i), "a_rather_long_part_of_a_name.".repeat(4));
    let entry = |i: usize| {
        format!(r#""{}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{}]}}"#, name(i), i + 1)
    };
    let header = format!("{{{}}}", (0..1000).map(entry).collect::<Vec<_>>().join(","));
    write_raw(&path, &header, &[0; 1000]);
    let path = path.to_str().unwrap();
    let lines = lines_shown(&on_a_terminal(80, &["inspect", path]));
    assert!((200..250).contains(&lines.len()), "{} lines", lines.len());
    assert!(lines.iter().all(|line| line.chars().count() <= 80), "{lines:#?}");
    assert!(lines.iter().any(|line| line.contains("... and 800 more (--all lists each)")));
    assert!(lines.iter().any(|line| line.contains("aac.") && line.contains("[1]")));
    // Whole names where no terminal cuts them, and all of them when asked for.
    let all = run(["inspect", path, "--all"]).stdout;
    assert!((0..1000).all(|i| all.contains(&name(i))));
}
