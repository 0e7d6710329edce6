//! The GPU check's program under the simulated driver, on a few megabytes: every part runs, all
//! tensors come to the sum that their files have, and the table has what it should. The figures
//! mean nothing here.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};
use std::process::Command;

use cuda_sim::{Report, Sim};
use fst_benches::gpu::record::{Record, read};
use fst_cli::models::Model;
use fst_cli::synth::{Recipe, Watch};

fn check(folder: &Path, args: &[&str]) {
    output(folder, args, &[]);
}

/// What the program prints, with more in its environment.
fn output(folder: &Path, args: &[&str], environment: &[(&str, &str)]) -> String {
    let sim = Sim::load().expect("the simulator");
    let report = folder.join("report");
    let output = Command::new(env!("CARGO_BIN_EXE_fst-gpu-check"))
        .args(args)
        .envs(sim.environment(&report))
        .env("FST_SIM_MEMORY", (256 << 20).to_string())
        .env("FST_SIM_KERNELS", fst_cuda_sim_kernels::LIBRARY)
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    let left = Report::parse(&std::fs::read_to_string(&report).unwrap());
    assert_eq!(left.faults(), [""; 0], "{args:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn synth(folder: &Path, model: &str, dtype: fst::Dtype) -> (PathBuf, String) {
    let model = Model::find(model).unwrap();
    let recipe = Recipe::new(model).layers(1).shrink(16).shards(2).dtype(dtype);
    recipe.write(folder, &Watch::default()).unwrap();
    let checkpoint = fst::Checkpoint::open(folder).unwrap();
    let tensors = fst::Loader::new().load(&checkpoint).unwrap();
    let mut sum = 0u64;
    for tensor in &tensors {
        for word in tensor.bytes().unwrap().chunks(8) {
            let mut whole = [0; 8];
            whole[..word.len()].copy_from_slice(word);
            sum = sum.wrapping_add(u64::from_le_bytes(whole));
        }
    }
    (folder.to_owned(), sum.to_string())
}

#[test]
fn every_part_runs_under_the_simulated_driver() {
    // Not in the system's folder for temporary files: that may be a tmpfs, which is never cold.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (big, sum) = synth(&dir.path().join("big-disk"), "llama-2-7b", fst::Dtype::BF16);
    let (small, _) = synth(&dir.path().join("f8"), "llama-2-7b", fst::Dtype::F8E4M3);
    let runs = dir.path().join("runs.jsonl");
    let (big, small, out) =
        (big.to_str().unwrap(), small.to_str().unwrap(), runs.to_str().unwrap());
    for part in ["warm", "cold", "start", "sweep"] {
        check(dir.path(), &["run", part, big, "--out", out, "--rounds", "2"]);
    }
    check(dir.path(), &["run", "cast", big, small, "--out", out, "--rounds", "1"]);

    let runs: Vec<Record> = read(&runs).unwrap();
    let failed: Vec<&Record> = runs.iter().filter(|run| run.error.is_some()).collect();
    assert!(failed.is_empty(), "{failed:#?}");
    let of = |workload: &str, contender: &str| {
        let found = |run: &&Record| run.workload == workload && run.contender == contender;
        runs.iter().filter(found).collect::<Vec<_>>()
    };
    for workload in ["big-disk warm", "big-disk cold", "big-disk process start"] {
        let ours = of(workload, "fst");
        assert_eq!(ours.len(), 2, "{workload}");
        for run in ours {
            assert_eq!(run.sum.as_deref(), Some(sum.as_str()), "{workload}");
            assert!(run.seconds > 0.0 && run.bytes > 0);
        }
    }
    assert_eq!(of("big-disk warm", "pinned copy (limit)").len(), 2);
    assert_eq!(of("big-disk cold", "direct reads (limit)").len(), 2);
    let casts = [of("cast big-disk warm", "fst to F32"), of("cast f8 warm", "fst to BF16")];
    for cast in casts {
        assert_eq!(cast.len(), 1);
        assert!(cast[0].sum.is_some());
    }
    // Twice the bytes for 16-bit elements in 32 bits.
    let (plain, wide) = (of("cast big-disk warm", "fst"), of("cast big-disk warm", "fst to F32"));
    assert_eq!(wide[0].bytes, 2 * plain[0].bytes);
    assert!(runs.iter().any(|run| run.workload == "sweep big-disk cold"));

    let table = fst_benches::gpu::table::summarise(dir.path()).unwrap();
    assert!(!table.contains("SUMS DIFFER"), "{table}");
    assert!(table.contains("warm, rate against the best peer"), "{table}");
}

#[test]
fn ranks_on_one_device_keep_what_ranks_in_host_memory_do() {
    let dir = tempfile::tempdir().unwrap();
    let (model, _) = synth(&dir.path().join("model"), "llama-2-7b", fst::Dtype::BF16);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let sim = Sim::load().expect("the simulator");
    let nccl = sim.path().with_file_name("libnccl_sim.so");
    let preload = format!("{}:{}", sim.path().display(), nccl.display());
    let environment = [
        ("LD_PRELOAD", preload.as_str()),
        ("FST_SIM_MEMORY", "2147483648"),
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", &port.to_string()),
    ];
    let told = output(dir.path(), &["ranks", model.to_str().unwrap()], &environment);
    let lines: Vec<&str> = told.lines().collect();
    assert_eq!(lines.len(), 2, "{told}");
    assert_eq!(lines[0], "4 ranks on cuda:0: the sums agree");
    assert!(lines[1].starts_with("a rank over NCCL 22304 on cuda:0: "), "{told}");
}
