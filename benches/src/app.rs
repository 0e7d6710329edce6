//! The command line of `cargo bench --bench load`.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;

use crate::contender::CONTENDERS;
use crate::data::make_room;
use crate::machine::{Machine, now, revision};
use crate::memory::FreeMemory;
use crate::page_cache::CacheState;
use crate::plot;
use crate::report::Results;
use crate::runner::{Run, Runner, check_same_tensors};
use crate::workload::{Entry, QUICK, WORKLOADS, Workload};

/// Loaders of safetensors checkpoints, run in turn on the same files.
#[derive(Debug, Clone, Parser)]
#[command(name = "cargo bench -p fst-benches --bench load --")]
pub struct Args {
    /// Run only this workload (repeatable).
    #[arg(long)]
    pub workload: Vec<String>,
    /// Run only contenders whose name begins so (repeatable).
    #[arg(long)]
    pub contender: Vec<String>,
    /// Rounds; each workload has its own number otherwise.
    #[arg(long)]
    pub rounds: Option<usize>,
    /// Only with the page cache dropped.
    #[arg(long, conflicts_with = "warm")]
    pub cold: bool,
    /// Only with the page cache filled.
    #[arg(long)]
    pub warm: bool,
    /// Tiny data, one round, and every contender must give the same bytes.
    #[arg(long)]
    pub quick: bool,
    /// Check in the first round that every contender gives the same bytes (slow on large data).
    #[arg(long)]
    pub verify: bool,
    /// What free memory is like before each run; idle takes a pause for each.
    #[arg(long, value_enum, default_value_t = FreeMemory::Backed)]
    pub free_memory: FreeMemory,
    /// List workloads and contenders.
    #[arg(long)]
    pub list: bool,
    /// Remove the synthesized data and stop.
    #[arg(long)]
    pub clean: bool,
    /// Where the data lives [default: target/bench-data].
    #[arg(long, env = "FST_BENCH_DATA")]
    pub data: Option<PathBuf>,
    /// Most GB of synthesized data on the disk at a time; older data is removed.
    #[arg(long, default_value_t = 6.0)]
    pub disk_limit_gb: f64,
    /// Where results.json, results.md and the drawings go [default: target/bench-results].
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Also add the tables to benches/RESULTS.md and keep JSON and drawings in benches/record/.
    #[arg(long)]
    pub record: bool,
    /// What `cargo bench` passes to every bench.
    #[arg(long, hide = true)]
    pub bench: bool,
}

/// The folder of this package, where the peers and the record are.
const PACKAGE: &str = env!("CARGO_MANIFEST_DIR");

/// Line of RESULTS.md after which new results go.
const NEWEST_FIRST: &str = "<!-- results, newest first -->";

/// Runs the harness with the process's arguments; `contender` is the program that runs one load.
///
/// # Errors
/// Bad arguments, data that cannot be made, or contenders that disagree about the bytes.
pub fn main(contender: &str) -> Result<()> {
    let mut args = Args::parse();
    // `cargo test --benches` runs benches without this flag: a check, not a measurement.
    args.quick |= !args.bench;
    run(&args, Path::new(contender)).map(|_| ())
}

/// Runs what the arguments ask for and writes the results.
///
/// # Errors
/// As [`main`].
pub fn run(args: &Args, contender: &Path) -> Result<Option<Results>> {
    let package = Path::new(PACKAGE);
    let target = package.join("../target");
    let data = args.data.clone().unwrap_or_else(|| target.join("bench-data"));
    if args.list {
        list();
        return Ok(None);
    }
    if args.clean {
        if data.exists() {
            fs::remove_dir_all(&data).with_context(|| format!("remove {}", data.display()))?;
        }
        return Ok(None);
    }
    let runner = Runner {
        program: contender.to_path_buf(),
        peers_venv: std::env::var_os("FST_PEERS_VENV")
            .map_or_else(|| package.join("peers/.venv"), PathBuf::from),
        peers_script: package.join("peers/load.py"),
        free_memory: args.free_memory,
        time_limit: Duration::from_secs(600),
    };
    fs::create_dir_all(&data).with_context(|| format!("create {}", data.display()))?;
    let mut results = Results {
        date: now(),
        revision: revision(),
        command: command_line(),
        machine: Machine::describe(&data),
        skipped: Vec::new(),
        runs: Vec::new(),
        verdicts: Vec::new(),
    };
    for workload in selected(args)? {
        measure(args, &runner, &data, workload, &mut results)?;
    }
    results.judge();
    let out = args.out.clone().unwrap_or_else(|| target.join("bench-results"));
    write(&results, &out, "")?;
    let markdown = results.markdown();
    println!("{markdown}");
    eprintln!("written to {}", out.display());
    if args.record {
        record(&results, package)?;
    }
    Ok(Some(results))
}

fn selected(args: &Args) -> Result<Vec<&'static Workload>> {
    let all = if args.quick { QUICK } else { WORKLOADS };
    for name in &args.workload {
        if !all.iter().any(|w| w.name == name) {
            bail!("no workload named {name}; --list names them");
        }
    }
    for name in &args.contender {
        if !CONTENDERS.iter().any(|c| c.name.starts_with(name.as_str())) {
            bail!("no contender begins with {name}; --list names them");
        }
    }
    let wanted =
        |w: &&Workload| args.workload.is_empty() || args.workload.iter().any(|n| n == w.name);
    Ok(all.iter().filter(wanted).collect())
}

fn measure(
    args: &Args,
    runner: &Runner,
    data: &Path,
    workload: &Workload,
    results: &mut Results,
) -> Result<()> {
    let set = workload.data();
    make_room(data, &set, (args.disk_limit_gb * 1e9) as u64)?;
    eprintln!("{}: {}", workload.name, workload.what);
    let folder = set.make(data)?;
    for &state in workload.states {
        if (args.cold && state == CacheState::Warm) || (args.warm && state == CacheState::Cold) {
            continue;
        }
        let mut entries: Vec<Entry> = Vec::new();
        for entry in workload.entries(state) {
            let name = entry.contender.name;
            if !args.contender.is_empty() && !args.contender.iter().any(|p| name.starts_with(p)) {
                continue;
            }
            match runner.cannot_run(&entry) {
                None => entries.push(entry),
                Some(reason) => {
                    let skipped = format!("{name}: {reason}");
                    if !results.skipped.contains(&skipped) {
                        results.skipped.push(skipped);
                    }
                }
            }
        }
        let rounds = args.rounds.unwrap_or(workload.rounds);
        let verify = args.quick || args.verify;
        let runs = runner.rounds(workload, &folder, state, &entries, rounds, verify, &mut tell)?;
        if verify {
            let first: Vec<Run> = runs.iter().filter(|run| run.round == 0).cloned().collect();
            check_same_tensors(&first)?;
            eprintln!("  {} contenders gave the same tensors", first.len());
        }
        results.runs.extend(runs);
    }
    Ok(())
}

fn tell(run: &Run) {
    let what = match (&run.measurement, &run.error) {
        (_, Some(error)) => format!("FAILED: {error}"),
        (Some(m), _) => {
            format!("{:8.4} s {:6.2} GB/s", m.seconds, m.bytes as f64 / m.seconds / 1e9)
        }
        _ => String::new(),
    };
    eprintln!(
        "  {:>2} {} {:<30} {what}  ({:.1}% resident before{}{}, others {:.0}% busy)",
        run.round + 1,
        run.state.name(),
        run.label,
        run.resident_before * 100.0,
        run.taken_back.map_or(String::new(), |share| format!(", {:.0}% taken back", share * 100.0)),
        if run.state_confirmed { "" } else { ": NOT COUNTED" },
        run.others_busy * 100.0,
    );
}

fn list() {
    println!("workloads");
    for w in WORKLOADS {
        println!("  {:<30} {}", w.name, w.what);
    }
    println!("workloads of --quick");
    for w in QUICK {
        println!("  {:<30} {}", w.name, w.what);
    }
    println!("contenders");
    for c in CONTENDERS {
        println!("  {:<30} {}", c.name, c.what);
    }
}

/// The arguments as one would type them again.
fn command_line() -> String {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    format!("cargo bench -p fst-benches --bench load -- {}", args.join(" ")).trim_end().to_owned()
}

fn write(results: &Results, folder: &Path, prefix: &str) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    let put = |name: String, text: String| {
        let path = folder.join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    };
    put(format!("{prefix}results.json"), serde_json::to_string_pretty(results)? + "\n")?;
    put(format!("{prefix}results.md"), results.markdown())?;
    for (workload, state) in results.sections() {
        let drawing = plot::svg(results, &workload, state)?;
        put(format!("{prefix}{workload}-{}.svg", state.name()), drawing)?;
    }
    Ok(())
}

/// Adds the tables to RESULTS.md, newest first, and keeps the rest beside it.
fn record(results: &Results, package: &Path) -> Result<()> {
    let prefix = results.date.replace([':', ' '], "-") + "-";
    write(results, &package.join("record"), &prefix)?;
    fs::remove_file(package.join(format!("record/{prefix}results.md")))?;
    let path = package.join("RESULTS.md");
    let page = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let Some((head, tail)) = page.split_once(NEWEST_FIRST) else {
        bail!("{}: no line {NEWEST_FIRST:?}", path.display());
    };
    let mut section = results.markdown();
    section += &format!("Runs and drawings: `record/{prefix}*`.\n");
    let page = format!("{head}{NEWEST_FIRST}\n\n{section}{tail}");
    fs::write(&path, page).with_context(|| format!("write {}", path.display()))
}
