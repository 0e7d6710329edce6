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

/// Whether it still runs the program; one that is dead and not yet waited for does not.
fn is_alive(pid: Pid) -> bool {
    let program = std::fs::read_link(format!("/proc/{}/exe", pid.as_raw_nonzero()));
    program.is_ok_and(|program| program == Path::new(env!("CARGO_BIN_EXE_fst")))
}

/// Bytes of a process's own memory, or `None` once it is gone.
fn memory_of(pid: Pid) -> Option<u64> {
    let path = format!("/proc/{}/status", pid.as_raw_nonzero());
    let status = std::fs::read_to_string(path).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kb| kb << 10)
}

/// The answer, or `None` if the job ends before there is one.
fn wait_for<T>(what: &str, job: &mut Child, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return Some(answer);
        }
        if job.try_wait().unwrap().is_some() {
            return None;
        }
        assert!(start.elapsed() < BOUND, "no {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Starts ranks and kills one that has some of its tensors; the processes of all, and what came of it.
/// `None` if the load was over by then.
fn killed_in_mid_load(
    world: usize,
    args: &[&str],
    killed: usize,
    keeps: u64,
) -> Option<(Vec<Pid>, Output)> {
    let mut job = start(world, args);
    let mpirun = job.id();
    let find = |rank| wait_for("ranks", &mut job, || process_of(mpirun, rank));
    let ranks: Option<Vec<Pid>> = (0..world).map(find).collect();
    if let Some(ranks) = &ranks {
        let rank = ranks[killed];
        let some = || (memory_of(rank)? > keeps / 2).then_some(());
        if wait_for("tensors", &mut job, some).is_some() {
            // The others get as far as they can without it. Neither call finds one that is gone.
            let _ = kill_process(rank, Signal::STOP);
            std::thread::sleep(Duration::from_millis(300));
            let _ = kill_process(rank, Signal::KILL);
        }
    }
    let output = finish(job);
    ranks.filter(|_| output.stdout.is_empty()).map(|ranks| (ranks, output))
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
        let keeps = whole["ranks"][killed]["kept"].as_u64().unwrap();
        let caught = (0..20).find_map(|_| killed_in_mid_load(world, &args, killed, keeps));
        let (ranks, output) = caught.expect("a load that is under way");
        assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
        let told = text(&output.stderr);
        assert!(told.contains(&format!("process rank {killed} ")), "{told}");
        assert!(told.contains("signal 9 (Killed)"), "{told}");
        for (rank, pid) in ranks.into_iter().enumerate() {
            // `mpirun` does not wait for those that it kills.
            let died = Instant::now();
            while is_alive(pid) {
                assert!(died.elapsed() < BOUND, "rank {rank} outlived rank {killed}");
                std::thread::sleep(Duration::from_millis(5));
            }
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
    // A load that was over before anybody stood still says nothing.
    let once = || {
        let mut job = start(2, &args);
        let mpirun = job.id();
        let still = wait_for("ranks", &mut job, || process_of(mpirun, 1));
        let other = wait_for("ranks", &mut job, || process_of(mpirun, 0));
        // It has begun to load: before that, it is MPI itself that waits for its ranks.
        let begun = || (memory_of(still?)? > 64 << 20).then_some(());
        wait_for("tensors", &mut job, begun);
        still.map(|pid| kill_process(pid, Signal::STOP));
        let stopped = Instant::now();
        wait_for("end of the other rank", &mut job, || {
            process_of(mpirun, 0).is_none_or(|now| Some(now) != other).then_some(())
        });
        let took = stopped.elapsed().as_secs_f64();
        still.map(|pid| kill_process(pid, Signal::CONT));
        let output = finish(job);
        (!output.status.success()).then_some((took, output))
    };
    let (took, output) = (0..20).find_map(|_| once()).expect("a load that is under way");
    assert!((1.0..60.0).contains(&took), "{took} s: {output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
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
