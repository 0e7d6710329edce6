//! `fst --dist nccl` by several processes, each with a simulated CUDA device and a simulated NCCL that
//! hands its messages over in files.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../../fst-dist/tests/port/mod.rs"]
mod port;

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use cuda_sim::{Report, Sim};
use port::Port;
use serde_json::Value;

/// However ranks end, they end by then.
const BOUND: Duration = Duration::from_secs(60);

/// Starts the ranks of a program as torchrun does.
fn launch(
    world: usize,
    args: impl Fn(usize) -> Vec<String>,
    folder: &Path,
    port: &Port,
) -> Vec<Child> {
    let sim = Sim::load().expect("the simulator");
    let nccl = sim.path().with_file_name("libnccl_sim.so");
    let preload = format!("{}:{}", sim.path().display(), nccl.display());
    let start = |rank: usize| {
        Command::new(env!("CARGO_BIN_EXE_fst"))
            .args(args(rank))
            .args(["--dist", "nccl"])
            .envs(sim.environment(&folder.join(format!("report-{rank}"))))
            .env("FST_SIM_DEVICES", world.to_string())
            .env("FST_SIM_MEMORY", (1u64 << 30).to_string())
            .env("FST_SIM_KERNELS", fst_cuda_sim_kernels::LIBRARY)
            .env("FST_SIM_NCCL_FOLDER", folder)
            .env("LD_PRELOAD", &preload)
            .env("RANK", rank.to_string())
            .env("WORLD_SIZE", world.to_string())
            .env("LOCAL_RANK", rank.to_string())
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", port.number().to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    (0..world).map(start).collect()
}

/// What the ranks said, all of them in time.
fn finish(ranks: Vec<Child>) -> Vec<Output> {
    let began = Instant::now();
    let wait = |mut rank: Child| {
        while rank.try_wait().unwrap().is_none() {
            if began.elapsed() > BOUND {
                rank.kill().unwrap();
                panic!("a rank hangs: {:?}", rank.wait_with_output());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        rank.wait_with_output().unwrap()
    };
    ranks.into_iter().map(wait).collect()
}

fn synth(folder: &Path) -> String {
    let model = folder.join("model").to_str().unwrap().to_owned();
    let output = Command::new(env!("CARGO_BIN_EXE_fst"))
        .args(["synth", &model, "--model", "llama-2-7b", "--layers", "1", "--shrink", "10"])
        .args(["--shards", "2"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    model
}

/// What rank 0 tells; the others say nothing.
fn told(outputs: &[Output]) -> Value {
    for (rank, output) in outputs.iter().enumerate() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "rank {rank}: {stderr}");
        assert!(rank == 0 || output.stdout.is_empty(), "rank {rank}: {output:?}");
    }
    serde_json::from_slice(&outputs[0].stdout).unwrap()
}

fn assert_nothing_left(world: usize, folder: &Path) {
    for rank in 0..world {
        let report = std::fs::read_to_string(folder.join(format!("report-{rank}"))).unwrap();
        assert_eq!(Report::parse(&report).faults(), [""; 0], "rank {rank}");
    }
}

#[test]
fn processes_keep_what_ranks_of_one_process_keep() {
    let dir = tempfile::tempdir().unwrap();
    let model = synth(dir.path());
    for world in [2, 4] {
        let count = world.to_string();
        let args = |command: &str| {
            [command, &model, "--preset", "llama", "--json"].map(str::to_owned).to_vec()
        };
        let alone = Command::new(env!("CARGO_BIN_EXE_fst"))
            .args(args("sum"))
            .args(["--world", &count])
            .output()
            .unwrap();
        let outputs = finish(launch(world, |_| args("sum"), dir.path(), &Port::new()));
        assert_eq!(told(&outputs), told(&[alone]), "{world} processes");
        assert_nothing_left(world, dir.path());

        let report = told(&finish(launch(world, |_| args("load"), dir.path(), &Port::new())));
        assert_eq!(report["world"], world);
        // What is sent arrives, by NCCL, and nobody receives what it does not keep.
        assert_eq!(report["sent"], report["received"]);
        assert!(report["received"].as_u64().unwrap() > 0);
        for (rank, figures) in report["ranks"].as_array().unwrap().iter().enumerate() {
            assert_eq!(figures["device"], format!("cuda:{rank}"));
            assert!(figures["received"].as_u64() <= figures["kept"].as_u64(), "{figures}");
        }
        assert_nothing_left(world, dir.path());
    }
}

#[test]
fn a_process_with_another_plan_is_named_by_all() {
    let dir = tempfile::tempdir().unwrap();
    let model = synth(dir.path());
    let args = |rank: usize| {
        let preset = if rank == 1 { "gpt2" } else { "llama" };
        ["load", &model, "--preset", preset].map(str::to_owned).to_vec()
    };
    for (rank, output) in finish(launch(3, args, dir.path(), &Port::new())).iter().enumerate() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "rank {rank}: {stderr}");
        let words = "the plan of rank 1 differs from that of rank 0";
        assert!(stderr.contains(words), "rank {rank}: {stderr}");
    }
}
