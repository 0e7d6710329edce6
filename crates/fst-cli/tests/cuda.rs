//! The program with a CUDA device: a simulated one, brought in by the environment.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;
use std::process::{Command, Output};

use cuda_sim::{Report, Sim};

fn fst(args: &[&str], folder: &Path) -> (Output, Report) {
    fst_in(args, folder, &[])
}

/// With more in its environment.
fn fst_in(args: &[&str], folder: &Path, environment: &[(&str, &str)]) -> (Output, Report) {
    let report = folder.join("report");
    let sim = Sim::load().expect("the simulator");
    let output = Command::new(env!("CARGO_BIN_EXE_fst"))
        .args(args)
        .envs(sim.environment(&report))
        .env("FST_SIM_DEVICES", "2")
        .env("FST_SIM_MEMORY", (1u64 << 30).to_string())
        .env("FST_SIM_KERNELS", fst_cuda_sim_kernels::LIBRARY)
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    let left = Report::parse(&std::fs::read_to_string(&report).unwrap_or_default());
    (output, left)
}

fn json(output: &Output) -> serde_json::Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn synth(dir: &Path) -> String {
    let model = dir.join("model").to_str().unwrap().to_owned();
    let output = Command::new(env!("CARGO_BIN_EXE_fst"))
        .args(["synth", &model, "--model", "llama-2-7b", "--layers", "2", "--shrink", "8"])
        .args(["--shards", "2"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    model
}

#[test]
fn sums_on_a_device_agree_with_sums_on_the_host() {
    let dir = tempfile::tempdir().unwrap();
    let model = synth(dir.path());
    let slice = "model.layers.0.self_attn.o_proj.weight:1:3..100";
    for extra in [&[][..], &["--slice", slice]] {
        let on = |device: &str| {
            let mut args = vec!["sum", &model, "--json", "--device", device];
            args.extend_from_slice(extra);
            let (output, left) = fst(&args, dir.path());
            assert_eq!(left.faults(), [""; 0]);
            json(&output)
        };
        let host = on("host");
        assert!(host["tensors"].as_array().unwrap().len() > 10);
        assert_eq!(on("cuda:0"), host);
        assert_eq!(on("cuda:1"), host);
    }
}

#[test]
fn loads_to_a_device_report_it_and_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let model = synth(dir.path());
    let args = ["load", &model, "--device", "cuda:0", "--dtype", "F32", "--json"];
    let (output, left) = fst(&args, dir.path());
    let report = json(&output);
    assert_eq!(report["device"], "cuda:0");
    assert_eq!(left.faults(), [""; 0]);
    assert!(left.copied_bytes > 0);

    let (output, _) = fst(&["load", &model, "--device", "cuda:7"], dir.path());
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.starts_with("error: cuda:7: ") && stderr.lines().count() == 1, "{stderr}");
}

#[test]
fn loads_to_a_device_tell_how_cached_files_got_there() {
    let dir = tempfile::tempdir().unwrap();
    let model = synth(dir.path());
    let load = |extra: &[&str], environment: &[(&str, &str)]| {
        let args = [&["load", &model, "--device", "cuda:0"], extra].concat();
        let (output, left) = fst_in(&args, dir.path(), environment);
        assert_eq!(left.faults(), [""; 0]);
        output
    };
    // Just written; what the page cache lost meanwhile is staged.
    for way in ["registered", "staged", "auto"] {
        let report = json(&load(&["--json", "--cached-copy", way], &[]));
        let copy = &report["device_copy"];
        let bytes = |key: &str| copy[key].as_u64().unwrap();
        assert_eq!(copy["asked"], way);
        assert_eq!(bytes("registered_bytes") + bytes("staged_bytes"), report["bytes_read"]);
        assert_eq!(bytes("registered_bytes") > 0, way == "registered", "{copy}");
        assert!(!copy["reason"].as_str().unwrap().is_empty() && copy["refused"].is_null());
        assert!(copy["staged_gb_per_s"].is_null(), "{copy}");
    }
    let copy = json(&load(&["--json", "--cached-copy", "measured"], &[]))["device_copy"].clone();
    for rate in ["registered_gb_per_s", "staged_gb_per_s"] {
        assert!(copy[rate].as_f64().unwrap() > 0.0, "{copy}");
    }
    let text = |extra: &[&str], environment: &[(&str, &str)]| {
        let output = load(extra, environment);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let out = text(&[], &[]);
    assert!(out.contains(" through pinned memory (too little is cached to measure)"), "{out}");
    let out = text(&["--cached-copy", "registered"], &[]);
    // Tensors of a few bytes are staged.
    for told in ["20.8 MB straight out of the page cache", "(registered mappings were asked for)"] {
        assert!(out.contains(told), "{out}");
    }

    let (output, _) = fst(&["load", &model, "--json"], dir.path());
    assert!(json(&output)["device_copy"].is_null());
    let (output, _) = fst(&["load", &model, "--cached-copy", "staged"], dir.path());
    assert_eq!(output.status.code(), Some(2));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("give --device cuda:N"), "{stderr}");
}

#[test]
fn the_doctor_sees_devices() {
    let dir = tempfile::tempdir().unwrap();
    let (output, _) = fst(&["doctor", "--json"], dir.path());
    let report = json(&output);
    assert_eq!(report["cuda"]["devices"].as_array().unwrap().len(), 2);
    assert_eq!(report["cuda"]["devices"][1]["device"], "cuda:1");
}

#[test]
fn ranks_keep_their_shards_on_devices() {
    let dir = tempfile::tempdir().unwrap();
    let model = synth(dir.path());
    let on = |command: &str, device: &str| {
        let mut args = vec![command, &model, "--json", "--device", device];
        args.extend(["--world", "3", "--preset", "llama"]);
        let (output, left) = fst(&args, dir.path());
        assert_eq!(left.faults(), [""; 0]);
        json(&output)
    };
    let host = on("sum", "host");
    assert!(host["tensors"].as_array().unwrap().len() > 30);
    // All on one, and in turn on the two that there are.
    for (device, devices) in [("cuda:1", ["cuda:1"; 3]), ("cuda", ["cuda:0", "cuda:1", "cuda:0"])] {
        assert_eq!(on("sum", device), host);
        let report = on("load", device);
        let ranks = report["ranks"].as_array().unwrap();
        for (key, value) in
            json(&fst(&["load", &model, "--json"], dir.path()).0).as_object().unwrap()
        {
            assert_eq!(report[key].is_object(), value.is_object(), "{key}");
            assert!(report.get(key).is_some() && ranks.iter().all(|rank| rank.get(key).is_some()));
        }
        let found: Vec<&str> = ranks.iter().map(|rank| rank["device"].as_str().unwrap()).collect();
        assert_eq!(found, devices);
        assert_eq!(report["device"], if device == "cuda" { "cuda:0,cuda:1" } else { device });
    }
}

#[test]
fn a_rank_over_nccl_is_on_the_gpu_of_its_process() {
    let dir = tempfile::tempdir().unwrap();
    let model = synth(dir.path());
    let sim = Sim::load().expect("the simulator");
    let nccl = sim.path().with_file_name("libnccl_sim.so");
    let preload = format!("{}:{}", sim.path().display(), nccl.display());
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let port = port.to_string();
    let launched = [
        ("LD_PRELOAD", preload.as_str()),
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("LOCAL_RANK", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", &port),
    ];
    for (device, used) in [
        (&[][..], "cuda:1"),
        (&["--device", "cuda"], "cuda:1"),
        (&["--device", "cuda:0"], "cuda:0"),
    ] {
        let args = [&["load", &model, "--json", "--dist", "nccl"], device].concat();
        let (output, left) = fst_in(&args, dir.path(), &launched);
        assert_eq!(json(&output)["device"], used);
        assert_eq!(left.faults(), [""; 0]);
    }
    let args = ["sum", &model, "--json", "--dist", "nccl"];
    let (over_nccl, left) = fst_in(&args, dir.path(), &launched);
    assert_eq!(left.faults(), [""; 0]);
    let (alone, _) = fst(&["sum", &model, "--json", "--world", "1"], dir.path());
    assert_eq!(json(&over_nccl), json(&alone));

    let (output, _) = fst(&["load", &model, "--dist", "nccl"], dir.path());
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.starts_with("error: ") && stderr.contains("RANK is not set"), "{stderr}");
    for told in ["torchrun --no-python", "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR", "SLURM_PROCID"] {
        assert!(stderr.contains(told), "{stderr}");
    }

    // Over NCCL nothing goes to the host, and who asks for that is told.
    for command in ["load", "sum"] {
        let args = [command, &model, "--dist", "nccl", "--device", "host"];
        let (output, _) = fst_in(&args, dir.path(), &launched);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains("leave --device out"), "{stderr}");
    }

    // A rank that does not come is waited for as long as was said.
    let mut launched = launched;
    launched[2] = ("WORLD_SIZE", "2");
    let began = std::time::Instant::now();
    let args = ["load", &model, "--dist", "nccl", "--deadline", "2"];
    let (output, _) = fst_in(&args, dir.path(), &launched);
    let took = began.elapsed().as_secs_f64();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!((1.9..30.0).contains(&took), "{took} s: {stderr}");
}
