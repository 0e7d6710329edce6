//! Exit statuses, the error line, and what happens when a reader goes away.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use crate::fixture::{Folder, fst, names_in, run, write_raw};

#[test]
fn help_and_version_succeed() {
    for args in [&["--help"][..], &["--version"], &["load", "--help"], &["help", "sum"]] {
        let run = run(args);
        assert_eq!((run.status, run.stderr.as_str()), (0, ""), "{args:?}");
        assert!(!run.stdout.is_empty());
    }
}

#[test]
fn wrong_usage_is_status_2() {
    for args in [
        &[][..],
        &["fly"],
        &["inspect"],
        &["sum"],
        &["inspect", "x", "--device", "host"],
        &["load", "x", "--engine", "steam"],
        &["load", "x", "--dtype", "bf17"],
        &["sum", "x", "--dtype", "I8"],
        &["load", "x", "--plot", "drawing.png"],
        &["load", "x", "--deadline", "5"],
        &["load", "x", "--device", "cuda:0", "--cached-copy", "direct"],
        &["load", "x", "--device", "cuda", "--world", "2", "--cached-copy", "staged"],
        &["sum", "x", "--deadline", "5"],
        &["load", "x", "--world", "2", "--deadline", "0"],
        &["load", "x", "--dist", "nccl", "--verify", "sums.json"],
        &["load", "x", "--device", "cuda:many"],
        &["sum", "x", "--slice", "name:0"],
        &["load", "x", "--map", "--engine", "pread"],
        &["load", "x", "--slice", "name:0:0..1", "--world", "2"],
        &["load", "x", "--preset", "llama"],
        &["load", "x", "--fused"],
        &["sum", "x", "--head-dim", "64"],
        &["synth", "x", "--model", "gpt-5"],
        &["synth", "x", "--model", "gpt2", "--shards", "0"],
        &["synth", "x", "--model", "gpt2", "--dtype", "I8"],
        &["synth", "x", "--model", "gpt2", "--shrink", "0"],
        &["synth", "x"],
    ] {
        let run = run(args);
        assert_eq!((run.status, run.stdout.as_str()), (2, ""), "{args:?}");
        assert!(run.stderr.contains("rror: ") || run.stderr.contains("Usage"), "{}", run.stderr);
    }
}

#[test]
fn refusals_say_what_there_is() {
    for (args, told) in [
        (&["load", "x", "--dtype", "bf17"][..], "no such dtype: tensors are converted to"),
        (&["load", "x", "--dtype", "bf17"], "F16, BF16, F32, F64"),
        (&["sum", "x", "--dtype", "I8"], "not I8: "),
        (
            &["synth", "x", "--model", "gpt2", "--shards", "0"],
            "expected a whole number from 1 to 4294967295",
        ),
        (&["load", "x", "--world", "0"], "'--world <N>': expected a whole number from 1 to 4096"),
        (&["load", "x", "--world", "2", "--head-dim", "0"], "expected a whole number, at least 1"),
        (&["synth", "x", "--model", "gpt2", "--shards", "999"], "--shards 999: 999 files cannot"),
        (&["load", "x", "--plot", "drawing.png"], "name a file that ends in .svg"),
        (&["load", "x", "--world", "2", "--verify", "s"], "--verify is for whole tensors"),
    ] {
        let run = run(args);
        assert_eq!((run.status, run.stdout.as_str()), (2, ""), "{args:?}");
        assert!(run.stderr.contains(told), "{}", run.stderr);
    }
}

#[test]
fn a_malformed_pattern_is_told_with_its_place() {
    for command in [&["load"][..], &["sum"], &["inspect"], &["plan", "--world", "2"]] {
        for (pattern, told) in [
            ("layers.{0..11.*", "the { at byte 7 is never closed"),
            ("layers.[0-9", "the [ at byte 7 is never closed"),
            ("layers.{11..0}.*", "\"11..0\" at byte 8 is no range"),
        ] {
            let run = run([command, &["x", "--select", pattern]].concat());
            assert_eq!((run.status, run.stdout.as_str()), (2, ""));
            assert!(run.stderr.contains(pattern) && run.stderr.contains(told), "{}", run.stderr);
        }
    }
}

#[test]
fn bad_input_is_status_1_and_one_line_that_names_it() {
    let folder = Folder::new();
    let missing = folder.join("missing.safetensors");
    let short = folder.join("short.safetensors");
    std::fs::write(&short, [1, 2, 3]).unwrap();
    let hole = folder.join("hole.safetensors");
    write_raw(&hole, r#"{"a b":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#, &[0, 0]);
    let empty = folder.join("empty");
    std::fs::create_dir(&empty).unwrap();
    for command in ["inspect", "sum", "load"] {
        for path in [&missing, &short, &hole, &empty] {
            for json in [&[][..], &["--json"]] {
                let run = run([&[command, path.to_str().unwrap()], json].concat());
                let error = run.error();
                assert!(error.starts_with(&format!("{}: ", path.display())), "{error}");
            }
        }
    }
    let run = run(["inspect", hole.to_str().unwrap()]);
    assert!(run.error().contains("a b"), "{}", run.stderr);
}

#[test]
fn names_cannot_break_the_error_line_or_steer_the_terminal() {
    let folder = Folder::new();
    let path = folder.join("evil\n\u{1b}[31m.safetensors");
    write_raw(&path, r#"{"x\ny":{"dtype":"U9","shape":[],"data_offsets":[0,1]}}"#, &[0]);
    let run_on = run([std::ffi::OsStr::new("inspect"), path.as_os_str()]);
    let error = run_on.error();
    assert!(!error.contains('\u{1b}'), "{error:?}");

    write_raw(&path, r#"{"x\u001b]y":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#, &[0]);
    let run = run([std::ffi::OsStr::new("inspect"), path.as_os_str()]);
    assert_eq!(run.status, 0, "{}", run.stderr);
    assert!(run.stdout.chars().all(|c| c == '\n' || !c.is_control()), "{:?}", run.stdout);
}

#[test]
fn what_steers_text_is_shown_escaped() {
    let folder = Folder::new();
    // Shown as "gnp.exe" written from the right, were it obeyed.
    let (name, shown) = ("a\u{202e}exe.png\u{2066}\u{feff}", "a\\u{202e}exe.png\\u{2066}\\u{feff}");
    let path = folder.join("x\u{202e}.safetensors");
    let header = format!(
        r#"{{"__metadata__":{{"{name}":"{name}"}},"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#
    );
    write_raw(&path, &header, &[0; 4]);
    let text = path.to_str().unwrap();
    let hidden = |text: &str| text.contains(['\u{202e}', '\u{2066}', '\u{feff}']);
    let slice = format!("{name}:3:0..1");
    for args in [
        &["inspect", text][..],
        &["inspect", text, "--all"],
        &["sum", text],
        &["load", text],
        &["load", text, "--map"],
        &["doctor", text],
        &["load", text, "--slice", &slice],
        &["load", text, "--select", "\u{202e}none"],
        &["load", text, "--world", "2"],
    ] {
        let run = run(args);
        assert!(!hidden(&run.stdout) && !hidden(&run.stderr), "{args:?}: {}", run.stdout);
        assert!((run.stdout + &run.stderr).contains("\\u{202e}"), "{args:?}");
    }
    assert!(run(["sum", text]).stdout.ends_with(&format!("  {shown}\n")));
    for args in [&["inspect", text, "--json"][..], &["sum", text, "--json"]] {
        let run = run(args);
        assert!(!hidden(&run.stdout) && run.stdout.contains("\\u202e"), "{}", run.stdout);
        assert_eq!(run.json()["tensors"][0]["name"], name);
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let folder = Folder::new();
    // More than a pipe holds.
    let path =
        folder.synth("moe", &["--model", "qwen3-30b-a3b", "--layers", "6", "--shrink", "512"]);
    let mut child = fst(["inspect", path.to_str().unwrap(), "--all"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    lines.read_line(&mut line).unwrap();
    drop(lines);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
}

#[test]
fn a_full_standard_output_is_an_error() {
    let folder = Folder::new();
    let path = folder.synth("gpt2", &["--model", "gpt2", "--layers", "1", "--shrink", "64"]);
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let output = fst(["inspect", path.to_str().unwrap()]).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().starts_with("error: standard output: "));
}

#[test]
fn quiet_commands_print_only_what_was_asked_for() {
    let folder = Folder::new();
    let path = folder.join("c");
    let path = path.to_str().unwrap();
    let silent = |args: &[&str]| {
        let run = run(args);
        assert_eq!((run.status, &*run.stdout, &*run.stderr), (0, "", ""), "{args:?}");
    };
    silent(&["-q", "synth", path, "--model", "gpt2", "--layers", "1", "--shrink", "64"]);
    silent(&["load", path, "-q"]);
    silent(&["load", path, "--world", "2", "--quiet"]);
    silent(&["sum", path, "-q", "-o", folder.join("sums").to_str().unwrap()]);
    let sums = run(["sum", path, "-q", "--select", "wte.*"]);
    assert_eq!((sums.stdout.lines().count(), &*sums.stderr), (1, ""));
    assert!(run(["load", path, "-q", "--json"]).json()["tensors"].as_u64() > Some(0));
    assert_eq!(run(["load", "-q", folder.join("none").to_str().unwrap()]).status, 1);
}

#[test]
fn scripts_get_errors_as_json_too() {
    let folder = Folder::new();
    let missing = folder.join("missing");
    let missing = missing.to_str().unwrap();
    for args in [
        &["load", missing, "--json"][..],
        &["sum", missing, "--json"],
        &["inspect", missing, "--json"],
        &["plan", missing, "--world", "2", "--json"],
        &["doctor", missing, "--json"],
        &["load", missing, "--json", "--fused"],
    ] {
        let run = run(args);
        let line =
            run.stderr.strip_prefix("error: ").and_then(|line| line.strip_suffix('\n')).unwrap();
        let document: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
        assert_eq!(document, serde_json::json!({ "error": line }), "{args:?}");
        assert_eq!(run.status, if args.contains(&"--fused") { 2 } else { 1 });
    }
}

#[test]
fn shells_and_man_know_the_commands() {
    for shell in ["bash", "zsh", "fish"] {
        let script = run(["completions", shell]);
        assert!(script.status == 0 && script.stdout.contains("allow-missing"), "{shell}");
    }
    let folder = Folder::new();
    let path = folder.join("man");
    std::fs::create_dir(&path).unwrap();
    assert_eq!(run(["man", path.to_str().unwrap()]).status, 0);
    let pages = names_in(&path);
    assert!(
        ["fst.1", "fst-load.1", "fst-synth.1"].iter().all(|page| pages.contains(&(*page).into()))
    );
    let page = std::fs::read_to_string(path.join("fst-load.1")).unwrap();
    assert!(
        page.starts_with(".ie") && page.contains("FST-LOAD") && page.contains("no\\-progress"),
        "{page}"
    );
    let missing = folder.join("none");
    assert!(run(["man", missing.to_str().unwrap()]).error().starts_with(missing.to_str().unwrap()));
}
