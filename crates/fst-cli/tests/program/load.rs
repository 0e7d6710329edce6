//! `fst load`: what it reports, and the demonstration.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::Child;
use std::time::{Duration, Instant};

use sha2::Digest as _;

use crate::fixture::{Folder, fst, interrupted, names_in, run};

#[test]
fn json_has_what_scripts_rely_on() {
    let folder = Folder::new();
    let args = ["--model", "llama-2-7b", "--layers", "2", "--shrink", "32", "--shards", "2"];
    let path = folder.synth("c", &args);
    let path = path.to_str().unwrap();
    let total = run(["inspect", path, "--json"]).json()["total"].clone();
    for engine in ["auto", "uring", "pread", "mmap"] {
        let json = run(["load", path, "--engine", engine, "--json"]).json();
        assert_eq!(json["tensors"], total["tensors"]);
        assert_eq!(json["bytes"], total["bytes"]);
        assert_eq!(json["device"], "host");
        assert_eq!(json["engine_asked"], engine);
        assert!(["uring", "pread", "mmap"].contains(&json["engine"].as_str().unwrap()));
        let seconds = json["seconds"].as_f64().unwrap();
        let rate = json["gb_per_s"].as_f64().unwrap();
        let expected = json["bytes"].as_f64().unwrap() / 1e9 / seconds;
        assert!(seconds > 0.0 && (rate / expected - 1.0).abs() < 1e-6, "{json}");
        let stages = json["stages"].as_object().unwrap();
        assert_eq!(stages["read"]["bytes"], json["bytes_read"]);
        assert!(stages["read"]["seconds"].as_f64().unwrap() <= seconds);
    }
    // Engines that always work are used when asked for.
    for engine in ["pread", "mmap"] {
        let json = run(["load", path, "--engine", engine, "--json"]).json();
        assert_eq!(json["engine"], engine);
    }
}

/// Keys that a load's JSON has, whatever is loaded.
fn keys(json: &serde_json::Value) -> BTreeSet<&str> {
    for key in ["tensors", "bytes", "seconds", "gb_per_s"] {
        assert!(json[key].is_number(), "{key}: {json}");
    }
    for key in ["engine", "device"] {
        assert!(json[key].is_string(), "{key}: {json}");
    }
    for (name, stage) in json["stages"].as_object().unwrap() {
        assert!(stage["seconds"].is_number() && stage["bytes"].is_u64(), "{name}: {stage}");
    }
    assert!(json["stages"]["open"].is_object(), "{json}");
    json.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn all_loads_have_one_shape_in_json() {
    let folder = Folder::new();
    let path = folder.synth("c", &["--model", "llama-2-7b", "--layers", "1", "--shrink", "32"]);
    let path = path.to_str().unwrap();
    let sums = folder.join("sums.json");
    let sums = sums.to_str().unwrap();
    assert_eq!(run(["sum", path, "-o", sums]).status, 0);
    let plain = run(["load", path, "--json"]).json();
    for extra in [
        &["--map"][..],
        &["--map", "--dtype", "F32"],
        &["--verify", sums],
        &["--select", "*norm*", "--dtype", "F32"],
    ] {
        let json = run([&["load", path, "--json"], extra].concat()).json();
        assert_eq!(keys(&json), keys(&plain), "{extra:?}");
    }
    let select = ["--select", "*.0.*"];
    for extra in [&[][..], &["--dtype", "F32"], &select] {
        let json = run([&["load", path, "--world", "2", "--json"], extra].concat()).json();
        assert!(keys(&json).is_superset(&keys(&plain)), "{extra:?}");
        let ranks = json["ranks"].as_array().unwrap();
        for rank in ranks {
            assert!(keys(rank).is_superset(&keys(&plain)), "{extra:?}: {rank}");
        }
        for key in ["tensors", "bytes", "bytes_read", "bytes_asked"] {
            let sum: u64 = ranks.iter().map(|rank| rank[key].as_u64().unwrap()).sum();
            assert_eq!(json[key], sum, "{key}");
        }
        let slowest = ranks.iter().find(|rank| rank["seconds"] == json["seconds"]).unwrap();
        assert_eq!(json["stages"], slowest["stages"]);
        let rate = json["bytes"].as_f64().unwrap() / json["seconds"].as_f64().unwrap() / 1e9;
        assert!((json["gb_per_s"].as_f64().unwrap() / rate - 1.0).abs() < 1e-6, "{json}");
    }
    // What ranks share of a selection is that selection.
    let some = run([&["inspect", path, "--json"], &select[..]].concat()).json();
    let json = run([&["load", path, "--world", "2", "--json"], &select[..]].concat()).json();
    assert_eq!(json["checkpoint_bytes"], some["total"]["bytes"]);
}

#[test]
fn select_loads_what_matches_and_no_more() {
    let folder = Folder::new();
    let path = folder.synth("c", &["--model", "llama-2-7b", "--layers", "3", "--shrink", "32"]);
    let path = path.to_str().unwrap();
    let select = ["--select", "*.1.*", "--select", "*norm*"];
    let json = run([&["load", path, "--json"], &select[..]].concat()).json();
    // Ten tensors of layer 1, two norms of each other layer, the final one.
    assert_eq!(json["tensors"], 10 + 2 * 2 + 1);
    let all = run(["load", path, "--json"]).json();
    assert!(json["bytes_read"].as_u64() < all["bytes_read"].as_u64());

    let layers = run(["load", path, "--json", "--select", "model.layers.{0..1}.*norm*"]).json();
    assert_eq!(layers["tensors"], 4);

    let none = run(["load", path, "--select", "nothing*"]);
    assert!(none.error().starts_with(&format!("{path}: ")), "{}", none.stderr);
    assert!(none.error().contains("nothing*"));
}

#[test]
fn slices_load_no_more_than_they_name() {
    let folder = Folder::new();
    let path = folder.synth("c", &["--model", "gpt2", "--layers", "1", "--shrink", "16"]);
    let path = path.to_str().unwrap();
    let name = "wte.weight";
    let whole = run(["load", path, "--select", name, "--json"]).json();
    let shape = run(["inspect", path, "--select", name, "--json"]).json();
    let columns = shape["tensors"][0]["shape"][1].as_u64().unwrap();
    let half = format!("{name}:1:0..{}", columns / 2);
    let part = run(["load", path, "--select", name, "--slice", &half, "--json"]).json();
    assert_eq!(part["bytes"].as_u64().unwrap() * 2, whole["bytes"].as_u64().unwrap());
    let wrong = run(["load", path, "--slice", "wte.weight:7:0..1"]);
    assert!(wrong.error().contains("wte.weight"), "{}", wrong.stderr);
}

#[test]
fn dtype_changes_the_size() {
    let folder = Folder::new();
    let path = folder.synth("c", &["--model", "falcon-40b", "--layers", "1", "--shrink", "64"]);
    let path = path.to_str().unwrap();
    let plain = run(["load", path, "--json"]).json();
    let wide = run(["load", path, "--json", "--dtype", "F32"]).json();
    assert_eq!(wide["bytes"].as_u64(), plain["bytes"].as_u64().map(|bytes| 2 * bytes));
    assert_eq!(wide["bytes_asked"], plain["bytes_asked"]);
}

#[test]
fn map_brings_everything_in_without_reading() {
    let folder = Folder::new();
    let path = folder.synth("c", &["--model", "llama-2-7b", "--layers", "2", "--shrink", "32"]);
    let path = path.to_str().unwrap();
    let total = run(["inspect", path, "--json"]).json()["total"].clone();
    let json = run(["load", path, "--map", "--json"]).json();
    assert_eq!(json["bytes"], total["bytes"]);
    assert_eq!((&json["engine"], &json["bytes_read"]), (&"mmap".into(), &0.into()));
    assert_eq!(json["stages"]["populate"]["bytes"], total["bytes"]);
    // What must be converted is read.
    let json = run(["load", path, "--map", "--dtype", "F64", "--json"]).json();
    assert_eq!(json["bytes_read"], json["stages"]["read"]["bytes"]);
    assert!(json["bytes_read"].as_u64() > Some(0));
    let text = run(["load", path, "--map"]);
    for part in ["populate", " mapped in ", "all in memory after", "in the page cache before"] {
        assert!(text.stdout.contains(part), "no {part} in {}", text.stdout);
    }
    // No byte was moved, and no rate is that of storage.
    assert!(!text.stdout.contains("GB/s"), "{}", text.stdout);
    // What is read has a rate, the whole has none.
    let text = run(["load", path, "--map", "--dtype", "F64"]).stdout;
    let headline = text.lines().nth(1).unwrap();
    assert!(headline.ends_with("none could be mapped, all were read"), "{text}");
    assert!(text.contains("GB/s") && !headline.contains("GB/s"), "{text}");
    // Columns of a tensor are no run of bytes: that one is read.
    let slice = "lm_head.weight:1:0..3";
    let json = run(["load", path, "--map", "--slice", slice, "--json"]).json();
    let read = run(["load", path, "--slice", slice, "--select", "lm_head.weight", "--json"]).json();
    let mapped = json["mapped_bytes"].as_u64().unwrap();
    assert!(mapped > 0);
    assert_eq!(json["bytes"].as_u64().unwrap(), mapped + read["bytes"].as_u64().unwrap());
    let text = run(["load", path, "--map", "--slice", slice]).stdout;
    let headline = text.lines().nth(1).unwrap();
    assert!(
        headline.contains(" mapped, ") && headline.contains(" read, as they are cut,"),
        "{text}"
    );
    assert!(!headline.contains("GB/s"), "{text}");
    if text.contains("in flight") {
        assert!(text.contains("reading  what is not mapped: "), "{text}");
    }
}

/// Pages come in by calls that nothing can end: nobody waits for them.
/// A checkpoint of one tensor of so many bytes, of which nothing is on the drive.
fn hole(folder: &Folder, len: u64) -> PathBuf {
    let path = folder.join("large.safetensors");
    let header = format!(r#"{{"a":{{"dtype":"U8","shape":[{len}],"data_offsets":[0,{len}]}}}}"#);
    crate::fixture::write_raw(&path, &header, &[]);
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(8 + header.len() as u64 + len).unwrap();
    path
}

#[test]
fn ctrl_c_ends_a_mapping() {
    let folder = Folder::new();
    // Half a minute's work.
    let path = hole(&folder, 64 << 30);
    // Some pages have come.
    let came = |child: &Child| {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let resident = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim().strip_suffix(" kB")?.parse::<u64>().ok()
        };
        resident("RssFile:").max(resident("RssShmem:")).is_some_and(|kb| kb > 64 << 10)
    };
    let stopped = std::cell::Cell::new(Instant::now());
    let output = interrupted(
        || fst(["load", path.to_str().unwrap(), "--map"]),
        |child| {
            stopped.set(Instant::now());
            came(child)
        },
    );
    let took = stopped.get().elapsed();
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert_eq!(output.status.code(), Some(130));
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "cancelled\n");
}

#[test]
fn text_reports_size_rate_engine_and_stages() {
    let folder = Folder::new();
    let path = folder.synth("c", &["--model", "gpt2", "--layers", "1", "--shrink", "16"]);
    let run = run(["load", path.to_str().unwrap()]);
    assert_eq!((run.status, run.stderr.as_str()), (0, ""));
    for part in ["17 tensors", "on host in", "GB/s", "engine", "Stages", "read"] {
        assert!(run.stdout.contains(part), "no {part} in {}", run.stdout);
    }
    assert!(!run.stdout.contains('\u{1b}'), "colours in a pipe");
}

#[test]
fn text_tells_wall_clock_from_added_up_time() {
    let folder = Folder::new();
    let path = folder.synth("c", &["--model", "gpt2", "--layers", "2", "--shrink", "4"]);
    let path = path.to_str().unwrap();
    let all = run(["load", path]).stdout;
    for part in ["Stages, one after the other", "Within read, added up over threads", "in flight"] {
        assert!(all.contains(part), "no {part} in {all}");
    }
    assert!(all.contains(", as asked for") && all.contains("in the page cache before"), "{all}");
    // The tensors in between are read over.
    let some = run(["load", path, "--select", "*bias*"]).stdout;
    assert!(some.contains("between them"), "{some}");
    let mapped = run(["load", path, "--map"]).stdout;
    assert!(mapped.contains("0 B of the ") && !mapped.contains("in flight"), "{mapped}");
}

#[test]
fn a_trace_has_every_byte_and_no_overlap_on_a_track() {
    let folder = Folder::new();
    let args = ["--model", "llama-2-7b", "--layers", "2", "--shrink", "8", "--shards", "2"];
    let path = folder.synth("c", &args);
    let path = path.to_str().unwrap();
    let trace = folder.join("trace.json");
    let plot = folder.join("plot.svg");
    for extra in [&[][..], &["--dtype", "F32"], &["--engine", "pread"], &["--map"]] {
        let files = ["--trace", trace.to_str().unwrap(), "--plot", plot.to_str().unwrap()];
        let json = run([&["load", path, "--json"], &files[..], extra].concat()).json();
        let text = std::fs::read_to_string(&trace).unwrap();
        let document: serde_json::Value = serde_json::from_str(&text).unwrap();
        let events = document["traceEvents"].as_array().unwrap();
        let end = json["seconds"].as_f64().unwrap() * 1e6;
        let mut tracks: BTreeMap<u64, Vec<(f64, f64)>> = BTreeMap::new();
        let (mut bytes, mut names) = (0, BTreeSet::new());
        for event in events {
            if event["ph"] == "M" {
                names.insert(event["tid"].as_u64().unwrap_or_default());
                continue;
            }
            let number = |key: &str| event[key].as_f64().unwrap();
            tracks
                .entry(event["tid"].as_u64().unwrap())
                .or_default()
                .push((number("ts"), number("ts") + number("dur")));
            assert!(number("ts") + number("dur") <= end + 1.0, "{event} after {end}");
            if event["cat"] == "read" {
                bytes += event["args"]["bytes"].as_u64().unwrap();
                assert!(event["args"]["file"].as_str().unwrap().starts_with(path));
            }
        }
        assert_eq!(Some(bytes), json["bytes_read"].as_u64(), "{extra:?}");
        for (track, slices) in &mut tracks {
            assert!(names.contains(track), "track {track} has no name");
            slices.sort_by(|a, b| a.0.total_cmp(&b.0));
            for pair in slices.windows(2) {
                assert!(pair[0].1 <= pair[1].0 + 0.002, "{extra:?}: overlap on track {track}");
            }
        }
        let svg = std::fs::read_to_string(&plot).unwrap();
        let way = if extra == ["--map"] { "populate" } else { "GB/s" };
        assert!(svg.starts_with("<svg") && svg.contains(way), "{svg}");
        assert!(svg.contains("polyline") && svg.trim_end().ends_with("</svg>"));
    }
    let text = run(["load", path, "--trace", trace.to_str().unwrap()]);
    assert!(text.stdout.contains("perfetto") && text.stdout.contains("trace.json"));
    let bad = run(["load", path, "--trace", "/no/such/folder/trace.json"]);
    assert!(bad.error().starts_with("/no/such/folder/trace.json: "), "{}", bad.stderr);
}

#[test]
fn what_cannot_be_done_here_is_an_error() {
    let folder = Folder::new();
    let path = folder.synth("c", &["--model", "gpt2", "--layers", "0", "--shrink", "64"]);
    let path = path.to_str().unwrap();
    let gds = run(["load", path, "--engine", "gds"]);
    assert!(gds.error().starts_with(&format!("{path}: ")), "{}", gds.stderr);
    // No machine has as many.
    let cuda = run(["load", path, "--device", "cuda:4000"]);
    assert!(cuda.error().contains("cuda:4000"), "{}", cuda.stderr);
}

#[test]
fn more_than_there_is_memory_for_is_refused_before_it_is_read() {
    let folder = Folder::new();
    let path = hole(&folder, 8 << 40);
    let start = format!("{}: needs 8.80 TB of memory, and ", path.display());
    let args = ["load", path.to_str().unwrap()];
    for more in [&[][..], &["--engine", "mmap"], &["--dtype", "F32"]] {
        let run = run([&args, more].concat());
        assert!(run.error().starts_with(&start), "{more:?}: {}", run.stderr);
    }
    // Two ranks that keep all of it count together, wherever they get to know it.
    for command in ["load", "sum"] {
        let run = run([command, args[1], "--world", "2", "--preset", "llama"]);
        let start = format!("{}: needs ", path.display());
        let error = run.stderr.lines().last().unwrap().strip_prefix("error: ").unwrap();
        assert!(error.starts_with(&start) && error.contains("memory"), "{command}: {error}");
    }
}

#[test]
fn a_limit_of_the_process_counts() {
    let folder = Folder::new();
    let path = hole(&folder, 500 << 20);
    let limited = |args: &[&str]| {
        let program = fst(args);
        let limit = "ulimit -v 400000 && exec \"$0\" \"$@\"";
        let mut shell = std::process::Command::new("sh");
        // The allocator would reserve 64 MiB of addresses for each thread.
        shell.env("MALLOC_ARENA_MAX", "1");
        shell.args(["-c", limit]).arg(program.get_program()).args(program.get_args());
        shell.output().unwrap()
    };
    let path = path.to_str().unwrap();
    for more in [&[][..], &["--world", "1", "--preset", "llama"], &["--slice", "a:0:0..450000000"]]
    {
        let output = limited(&[&["load", path], more].concat());
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{more:?}: {error}");
        assert!(error.contains("needs ") && error.contains("RLIMIT_AS"), "{more:?}: {error}");
    }
    // Sums need no more for a large tensor than for a small one, whatever becomes of its bytes.
    let output = limited(&["sum", path]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{error}");
    let mut sum = sha2::Sha256::new();
    (0..500).for_each(|_| sum.update([0; 1 << 20]));
    let sum: String = sum.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("{sum}  a\n"));
    // Whoever says so gets as far as memory goes.
    let output = limited(&["load", path, "--no-memory-check"]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && !error.contains("needs"), "{error}");
}

#[test]
fn files_of_a_checkpoint_are_not_written_over() {
    let folder = Folder::new();
    let path = folder.synth("c", &["--model", "gpt2", "--layers", "0", "--shrink", "16"]);
    let file = path.join("model.safetensors");
    let link = folder.join("link.svg");
    std::os::unix::fs::symlink(&file, &link).unwrap();
    let before = std::fs::read(&file).unwrap();
    let (path, file) = (path.to_str().unwrap(), file.to_str().unwrap());
    for args in [
        ["sum", path, "-o", file],
        ["load", path, "--trace", file],
        ["load", path, "--plot", link.to_str().unwrap()],
    ] {
        let run = run(args);
        let told = format!("{}: belongs to a checkpoint, and is not written over", args[3]);
        assert_eq!(run.error(), told, "{}", run.stderr);
    }
    assert!(std::fs::read(file).unwrap() == before);
}

#[test]
fn a_file_cut_short_is_an_error_that_names_it() {
    let folder = Folder::new();
    let path = folder.synth("c", &["--model", "gpt2", "--layers", "0", "--shrink", "16"]);
    let file = path.join("model.safetensors");
    let len = std::fs::metadata(&file).unwrap().len();
    std::fs::File::options().write(true).open(&file).unwrap().set_len(len - 1).unwrap();
    let run = run(["load", path.to_str().unwrap()]);
    assert!(run.error().starts_with(file.to_str().unwrap()), "{}", run.stderr);
    let told = " is 1 byte shorter than its header says, as after an interrupted download";
    assert!(run.error().contains(told), "{}", run.stderr);
    // Nor is a checkpoint given twice two checkpoints.
    let path = folder.synth("d", &["--model", "gpt2", "--layers", "0", "--shrink", "16"]);
    let path = path.to_str().unwrap();
    let twice = crate::fixture::run(["load", path, path]);
    assert!(twice.error().ends_with("model.safetensors: given twice"), "{}", twice.stderr);
}

#[test]
fn the_demonstration_loads_a_gigabyte_and_cleans_up() {
    let folder = Folder::new();
    let temporary = folder.join("tmp");
    std::fs::create_dir(&temporary).unwrap();
    let output = fst(["load", "--json"]).env("TMPDIR", &temporary).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!((900_000_000..1_100_000_000).contains(&json["bytes"].as_u64().unwrap()), "{json}");
    assert!(names_in(&temporary).is_empty());
}

#[test]
fn ctrl_c_ends_the_demonstration_and_cleans_up() {
    let folder = Folder::new();
    let temporary = folder.join("tmp");
    std::fs::create_dir(&temporary).unwrap();
    let demonstration = || {
        let mut command = fst(["load"]);
        command.env("TMPDIR", &temporary);
        command
    };
    let output = interrupted(demonstration, |_| !names_in(&temporary).is_empty());
    assert_eq!(output.status.code(), Some(130));
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "cancelled\n");
    assert!(names_in(&temporary).is_empty(), "{:?}", names_in(&temporary));
}

#[test]
fn what_makes_no_sense_is_refused_before_a_demonstration_is_made() {
    let folder = Folder::new();
    for (option, status, named) in [
        (["--select", "*norm*"], 2, "PATH"),
        (["--slice", "lm_head.weight:0:0..1"], 2, "PATH"),
        (["--verify", "sums.json"], 2, "PATH"),
        (["--preset", "llama"], 2, "--preset is for several ranks"),
        (["--deadline", "5"], 2, "--deadline is for several ranks"),
        (["--cached-copy", "staged"], 2, "give --device cuda:N"),
        // No machine has as many.
        (["--device", "cuda:4000"], 1, "cuda:4000: "),
    ] {
        // Anything made would be made there.
        let output = fst([&["load"], &option[..]].concat())
            .env("TMPDIR", folder.join("nowhere"))
            .output()
            .unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(status), "{told}");
        assert!(told.contains(named), "{told}");
    }
}

#[test]
fn several_runs_are_reported_by_their_median_and_spread() {
    let folder = Folder::new();
    let path = folder.synth("c", &["--model", "gpt2", "--layers", "1", "--shrink", "8"]);
    let path = path.to_str().unwrap();
    let json = run(["load", path, "--runs", "4", "--json"]).json();
    let runs = json["runs"].as_array().unwrap();
    let mut seconds: Vec<f64> = runs.iter().map(|run| run["seconds"].as_f64().unwrap()).collect();
    seconds.sort_by(f64::total_cmp);
    assert_eq!((runs.len(), &json["seconds"]), (4, &seconds[2].into()));
    assert_eq!(json["bytes"], run(["inspect", path, "--json"]).json()["total"]["bytes"]);
    let text = run(["load", path, "--runs", "3"]);
    assert!(text.stdout.contains("3 runs, of which the above is the median"), "{}", text.stdout);
    assert_eq!(text.stderr, "");
    assert!(run(["load", path, "--json"]).json().get("runs").is_none());

    // Cold runs read storage, where the system can forget files; where not, that is said.
    let cold = run(["load", path, "--cold", "--runs", "2", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&cold.stdout).unwrap();
    let (resident, files) = (json["resident_bytes"].as_u64(), json["file_bytes"].as_u64().unwrap());
    let warm = resident.is_some_and(|resident| resident > files / 100);
    assert_eq!(cold.stderr.contains("stayed in the page cache"), warm, "{}", cold.stderr);
    if !warm && resident.is_some() {
        assert!(json["stages"]["read.cached"]["bytes"].as_u64().unwrap_or(0) < files / 2, "{json}");
    }
}
