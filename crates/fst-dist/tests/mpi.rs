//! `MpiGroup`: this program starts itself under `mpirun` with 2, 3 and 4 processes, which run the
//! battery, load a plan from a file, and see one another fail.
//!
//! Without `mpirun` it fails: whoever asks for the feature has MPI.

#![allow(clippy::unwrap_used, clippy::panic)]

mod conformance;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, ExitCode, Output};
use std::time::{Duration, Instant};

use fst_dist::group::{Control, MpiGroup};
use fst_dist::{Cause, Planner, ReadInto, Reader, Shard, TensorDesc, Topology, load_host};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    if let [_, flag, scene, path] = &args[..]
        && flag == "--scene"
    {
        return act(scene, path);
    }
    // `cargo test NAME` and `-- --list` address the tests of other files.
    if args.iter().any(|arg| arg == "--list") {
        return ExitCode::SUCCESS;
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("mpi");
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("data");
    std::fs::write(&path, bytes(0..6_000_000)).unwrap();
    let path = path.to_str().unwrap();
    for world in [2, 3, 4] {
        // Of two ranks, one hangs and none is left to wait for it.
        let scenes = ["battery", "load", "outwait", "outwait-none"];
        for scene in &scenes[..if world == 2 { 3 } else { 4 }] {
            let output = mpirun(world, scene, path);
            assert!(output.status.success(), "{scene} of {world}: {output:?}");
            println!("{scene} with {world} processes ... ok");
        }
    }
    for (scene, cause) in [
        ("fail-0", "rank 0: reading tensor rows"),
        ("fail-2", "rank 2: reading tensor rows"),
        ("silent", "waited 300ms"),
        ("differ", "the plan of rank 1 differs from that of rank 0"),
    ] {
        let start = Instant::now();
        let output = mpirun(3, scene, path);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let lines: Vec<&str> = text.lines().filter(|line| line.contains("says: ")).collect();
        assert_eq!(lines.len(), 3, "{scene}: {output:?}");
        assert!(lines.iter().all(|line| line.contains(cause)), "{scene}: {lines:?}");
        assert!(start.elapsed() < Duration::from_secs(20), "{scene}");
        println!("{scene} ... ok");
    }
    for dying in 0..3 {
        let scene = format!("kill-{dying}");
        // A killed process: mpirun names it and ends the others.
        let start = Instant::now();
        let output = mpirun(3, &scene, path);
        assert!(!output.status.success());
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(told.contains(&format!("process rank {dying} ")), "{told}");
        assert!(told.contains("signal 9 (Killed)"), "{told}");
        // Where a launcher lets the others live, they meet their deadline.
        let output = mpirun_with(3, &["--enable-recovery"], &scene, path);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let lines: Vec<&str> = text.lines().filter(|line| line.contains("says: ")).collect();
        assert_eq!(lines.len(), 2, "{scene}: {output:?}");
        let named = format!("for rank {dying}");
        assert!(lines.iter().all(|line| line.contains(&named)), "{scene}: {lines:?}");
        assert!(start.elapsed() < Duration::from_secs(40), "{scene}");
        println!("{scene} ... ok");
    }
    std::fs::remove_dir_all(&folder).unwrap();
    ExitCode::SUCCESS
}

fn mpirun(world: u32, scene: &str, path: &str) -> Output {
    mpirun_with(world, &[], scene, path)
}

fn mpirun_with(world: u32, options: &[&str], scene: &str, path: &str) -> Output {
    Command::new("mpirun")
        .args(options)
        .args(["--allow-run-as-root", "--oversubscribe", "-n", &world.to_string()])
        .args(["--host", &format!("127.0.0.1:{world}"), "--mca", "btl_tcp_if_include", "lo"])
        .arg(std::env::current_exe().unwrap())
        .args(["--scene", scene, path])
        .output()
        .unwrap()
}

fn bytes(range: std::ops::Range<u64>) -> Vec<u8> {
    range.map(|at| (at.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as u8).collect()
}

/// Reads the file, or fails, or is killed while the others wait for what it was to read.
struct OneFile {
    file: File,
    fails: bool,
    dies: bool,
}

impl Reader for OneFile {
    fn read(&self, ranges: &mut [ReadInto<'_>]) -> Result<(), (usize, Cause)> {
        if self.dies {
            let me = std::process::id().to_string();
            Command::new("kill").args(["-9", &me]).status().unwrap();
        }
        for (index, range) in ranges.iter_mut().enumerate() {
            if self.fails {
                return Err((index, "no such sector".into()));
            }
            self.file.read_exact_at(range.into, range.offset).map_err(|e| (index, e.into()))?;
        }
        Ok(())
    }
}

/// What one process does.
fn act(scene: &str, path: &str) -> ExitCode {
    let deadline = Duration::from_millis(match scene {
        "silent" => 300,
        "outwait" | "outwait-none" => 800,
        _ if scene.starts_with("kill") => 2_000,
        _ => 60_000,
    });
    let group = MpiGroup::init(deadline).unwrap();
    let rank = group.rank();
    let result = match scene {
        "battery" => conformance::run(&group),
        "outwait" => conformance::outwait(&group, &conformance::HostScratch::default()),
        "outwait-none" => conformance::outwait_none(&group, &conformance::HostScratch::default()),
        "silent" if rank == 1 => {
            // Until it hears that the others have given up.
            let start = Instant::now();
            while group.failure().is_none() && start.elapsed() < Duration::from_secs(60) {
                std::thread::sleep(Duration::from_millis(1));
            }
            group.barrier().map_err(|error| error.to_string())
        }
        "silent" => group.barrier().map_err(|error| error.to_string()),
        _ => load(&group, scene, path),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("rank {rank} says: {error}");
            ExitCode::FAILURE
        }
    }
}

fn load(group: &MpiGroup, scene: &str, path: &str) -> Result<(), String> {
    let (rank, world) = (group.rank(), group.world_size());
    let (rows, columns) = ([1000, 1500], [750, 2000]);
    let tensor = |name: &str, shape: [u64; 2], start: u64| {
        let (name, shape) = (name.to_owned(), shape.to_vec());
        TensorDesc { name, bits: 16, shape, shard: 0, file_range: start..start + 3_000_000 }
    };
    let tensors = [tensor("rows", rows, 0), tensor("columns", columns, 3_000_000)];
    // Everything is read once and sent on: direct reads are not what is tested here.
    let day = if scene == "differ" && rank == 1 { "another" } else { "one" };
    let plan = Planner::new(Topology::one_node(world))
        .budget(1 << 20)
        .fingerprint(day)
        .plan(tensors, |t| if t.name == "rows" { Shard::replicate() } else { Shard::split(1) })
        .unwrap();
    let view = plan.rank(rank);
    let mut outputs: Vec<Vec<u8>> =
        view.outputs().iter().map(|o| vec![0; o.bytes as usize]).collect();
    let mut slices: Vec<&mut [u8]> = outputs.iter_mut().map(|o| &mut o[..]).collect();
    let fails = scene == format!("fail-{rank}");
    let dies = scene == format!("kill-{rank}");
    let reader = OneFile { file: File::open(path).unwrap(), fails, dies };
    load_host(&view, group, reader, &mut slices).map_err(|error| error.to_string())?;
    let data = bytes(0..6_000_000);
    assert!(outputs[0] == data[..3_000_000], "rank {rank}: rows");
    let width = columns[1].div_ceil(u64::from(world));
    let (start, end) = (u64::from(rank) * width, columns[1].min((u64::from(rank) + 1) * width));
    let row = |r: u64| 3_000_000 + (r * columns[1] + start) as usize * 2..;
    let expected = (0..columns[0]).flat_map(|r| &data[row(r)][..(end - start) as usize * 2]);
    assert!(outputs[1].iter().eq(expected), "rank {rank}: columns");
    Ok(())
}
