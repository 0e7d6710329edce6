//! `fst --dist mpi` under Open MPI's `mpirun`: several processes, on an address of this machine.
//!
//! Without `mpirun` it fails: whoever asks for the feature has MPI.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[allow(dead_code, reason = "shared with the tests of the program without MPI")]
#[path = "program/fixture.rs"]
mod fixture;
#[path = "program/slices.rs"]
mod slices;

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use fixture::{Folder, run};
use slices::sums_of_slices;

const LLAMA: [&str; 8] =
    ["--model", "llama-2-7b", "--layers", "1", "--shrink", "10", "--shards", "2"];

/// However a job of ranks ends, it ends by then.
const BOUND: Duration = Duration::from_secs(60);

/// `mpirun` for so many ranks; what they run is still to be said.
fn mpirun(world: usize) -> Command {
    let mut command = Command::new("mpirun");
    command
        .args(["--allow-run-as-root", "--oversubscribe"])
        .args(["--host", &format!("127.0.0.1:{world}")])
        .args(["--mca", "btl_tcp_if_include", "lo"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Every rank runs the program with these arguments.
fn start(world: usize, args: &[&str]) -> Child {
    let mut command = mpirun(world);
    command.args(["-n", &world.to_string(), env!("CARGO_BIN_EXE_fst")]).args(args);
    command.spawn().unwrap()
}

/// Waits for the end, which must come within [`BOUND`].
fn finish(mut job: Child) -> Output {
    let start = Instant::now();
    while job.try_wait().unwrap().is_none() {
        if start.elapsed() > BOUND {
            job.kill().unwrap();
            panic!("ranks hang: {:?}", job.wait_with_output());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    job.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{output:?}");
    // Rank 0 alone speaks.
    serde_json::from_slice(&output.stdout).expect("one JSON document")
}

#[test]
fn sums_over_mpi_are_those_of_slices_of_the_official_reader() {
    let folder = Folder::new();
    let path = folder.synth("llama", &LLAMA);
    let name = path.to_str().unwrap();
    for world in [2, 4] {
        let args = ["sum", name, "--dist", "mpi", "--preset", "llama", "--json"];
        let sums = json(&finish(start(world, &args)));
        let expected = sums_of_slices(&path, world);
        let sums = sums["tensors"].as_array().unwrap();
        assert_eq!(sums.len(), expected.len());
        for sum in sums {
            let rank = sum["rank"].as_u64().unwrap() as usize;
            let tensor = sum["name"].as_str().unwrap().to_owned();
            assert_eq!(*sum, expected[&(rank, tensor)]);
        }
        // Threads of one process come to the same.
        let threads = run(["sum", name, "--world", &world.to_string()]);
        let processes = finish(start(world, &["sum", name, "--dist", "mpi"]));
        assert_eq!(text(&processes.stdout), threads.stdout);
    }
}

#[test]
fn loads_over_mpi_move_what_the_plan_says() {
    let folder = Folder::new();
    let path = folder.synth("llama", &LLAMA);
    let path = path.to_str().unwrap();
    for world in [2, 4] {
        let plan = run(["plan", path, "--world", &world.to_string(), "--json"]).json();
        let load = json(&finish(start(world, &["load", path, "--dist", "mpi", "--json"])));
        // What travelled is what it was: stages are an object, as they are of threads.
        let threads = run(["load", path, "--world", &world.to_string(), "--json"]).json();
        for (load, threads) in [(&load, &threads), (&load["ranks"][1], &threads["ranks"][1])] {
            let keys = |of: &Value| of.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
            assert_eq!(keys(load), keys(threads));
            assert!(load["stages"]["read"]["seconds"].is_number(), "{load}");
        }
        for rank in 0..world {
            for key in ["rank", "kept", "sent", "received"] {
                assert_eq!(load["ranks"][rank][key], plan["ranks"][rank][key], "{key}");
            }
        }
        let (whole, read) = (load["checkpoint_bytes"].as_u64(), load["read"].as_u64());
        let (whole, read) = (whole.unwrap(), read.unwrap());
        assert!((whole..whole + whole / 20).contains(&read), "{read} of {whole}");
    }
}

/// The process of a rank, once it is there.
fn process_of(mpirun: u32, rank: usize) -> Option<Pid> {
    let own = |entry: std::fs::DirEntry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let status = std::fs::read_to_string(entry.path().join("status")).ok()?;
        let parent = format!("PPid:\t{mpirun}\n");
        let environment = std::fs::read(entry.path().join("environ")).ok()?;
        let variable = format!("OMPI_COMM_WORLD_RANK={rank}");
        let is_rank = environment.split(|byte| *byte == 0).any(|v| v == variable.as_bytes());
        let program = std::fs::read_link(entry.path().join("exe")).ok()?;
        let runs = program == Path::new(env!("CARGO_BIN_EXE_fst"));
        (runs && is_rank && status.contains(&parent)).then(|| Pid::from_raw(pid))?
    };
    std::fs::read_dir("/proc").unwrap().find_map(|entry| own(entry.ok()?))
}

/// Bytes of a process's own memory, or `None` once it is gone.
fn memory_of(pid: Pid) -> Option<u64> {
    let path = format!("/proc/{}/status", pid.as_raw_nonzero());
    let status = std::fs::read_to_string(path).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kb| kb << 10)
}

fn wait_for<T>(what: &str, job: &mut Child, mut ask: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert_eq!(job.try_wait().unwrap(), None, "the job ended before {what}");
        assert!(start.elapsed() < BOUND, "no {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// `mpirun` sees a rank die, names it, and ends the others; none hangs in an exchange.
#[test]
fn a_rank_killed_in_mid_load_ends_all_and_is_named() {
    let folder = Folder::new();
    let path = folder.synth("llama", &["--model", "llama-2-7b", "--layers", "2", "--shrink", "2"]);
    let path = path.to_str().unwrap();
    let world = 3;
    let args = ["load", path, "--dist", "mpi", "--preset", "llama", "--json"];
    let whole = json(&finish(start(world, &args)));
    for killed in 0..world {
        let mut job = start(world, &args);
        let mpirun = job.id();
        let mut ranks = Vec::new();
        for rank in 0..world {
            ranks.push(wait_for("ranks", &mut job, || process_of(mpirun, rank)));
        }
        // Some of its tensors have come, not all: stopped here, it is in mid-load when it dies.
        let keeps = whole["ranks"][killed]["kept"].as_u64().unwrap();
        let some = || (memory_of(ranks[killed])? > keeps / 2).then_some(());
        wait_for("tensors", &mut job, some);
        kill_process(ranks[killed], Signal::STOP).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(job.try_wait().unwrap(), None, "rank {killed} had loaded all");
        let died = Instant::now();
        kill_process(ranks[killed], Signal::KILL).unwrap();
        let output = finish(job);
        let took = died.elapsed();
        assert!(took < Duration::from_secs(20), "rank {killed}: {took:?}");
        assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
        let told = text(&output.stderr);
        assert!(told.contains(&format!("process rank {killed} ")), "{told}");
        assert!(told.contains("signal 9 (Killed)"), "{told}");
        for (rank, pid) in ranks.into_iter().enumerate() {
            let gone = process_of(mpirun, rank).is_none_or(|now| now != pid);
            assert!(gone, "rank {rank} outlived rank {killed}");
        }
    }
}

/// A rank that neither comes nor goes is waited for as long as was said, not for the usual two minutes.
#[test]
fn a_rank_that_stands_still_is_waited_for_until_the_deadline() {
    let folder = Folder::new();
    let path = folder.synth("llama", &["--model", "llama-2-7b", "--layers", "2", "--shrink", "2"]);
    let path = path.to_str().unwrap();
    let args = ["load", path, "--dist", "mpi", "--preset", "llama", "--deadline", "3"];
    let mut job = start(2, &args);
    let mpirun = job.id();
    let still = wait_for("ranks", &mut job, || process_of(mpirun, 1));
    // It has begun to load: before that, it is MPI itself that waits for its ranks.
    wait_for("tensors", &mut job, || (memory_of(still)? > 64 << 20).then_some(()));
    kill_process(still, Signal::STOP).unwrap();
    let stopped = Instant::now();
    let other = process_of(mpirun, 0).unwrap();
    wait_for("end of the other rank", &mut job, || {
        process_of(mpirun, 0).is_none_or(|now| now != other).then_some(())
    });
    let took = stopped.elapsed().as_secs_f64();
    let _ = kill_process(still, Signal::CONT);
    let output = finish(job);
    assert!((2.0..20.0).contains(&took), "{took} s: {output:?}");
    assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
}

/// Ranks that are given two checkpoints, or one that is not there, are refused; all end.
#[test]
fn ranks_that_do_not_have_the_same_checkpoint_end_together() {
    let folder = Folder::new();
    let path = folder.synth("a", &LLAMA);
    let other = folder.synth("b", &[&LLAMA[..], &["--seed", "1"]].concat());
    let missing = folder.join("c");
    for (other, told) in [
        (&other, "the plan of rank 1 differs from that of rank 0"),
        (&missing, "cannot open: No such file or directory"),
    ] {
        let part = |path: &Path| {
            let program = ["-n", "1", env!("CARGO_BIN_EXE_fst"), "load"];
            let args = [path.to_str().unwrap(), "--dist", "mpi", "--json"];
            program.into_iter().chain(args).map(str::to_owned).collect::<Vec<_>>()
        };
        let mut command = mpirun(2);
        command.args(part(&path)).arg(":").args(part(other));
        let output = finish(command.spawn().unwrap());
        assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
        assert!(text(&output.stderr).contains(told), "{output:?}");
    }
}
