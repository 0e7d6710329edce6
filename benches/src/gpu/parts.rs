//! The parts of the check: each compares contenders on one kind of load.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use fst::io::engine::CachePolicy;
use fst::{Device, Dtype};
use serde_json::{Value, json};

use super::ours;
use super::peers::{self, Environment, Peer};
use super::raw::{self, Sizes};
use super::record::{Log, Record};
use super::sum::DeviceSum;
use crate::contender::safetensors_files;
use crate::page_cache::{CacheState, Part as FilePart, establish};

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// Loads from the page cache or tmpfs, beside the link's limit and the peers.
    Warm,
    /// Loads from storage, beside direct reads into pinned memory and nothing else.
    Cold,
    /// Loads converted on the device (to F32; 8-bit floats to BF16), beside plain ones.
    Cast,
    /// From the start of a process to usable tensors.
    Start,
    /// The pipeline with other sizes, to see where to tune.
    Sweep,
}

/// How to measure.
#[derive(Debug)]
pub struct Plan {
    /// Which part.
    pub part: Part,
    /// Checkpoints: folders.
    pub paths: Vec<PathBuf>,
    /// How often each contender runs.
    pub rounds: usize,
    /// No run starts that would probably end later than this.
    pub limit: Duration,
    /// Peers, if there are any.
    pub peers: Option<Environment>,
    /// Where peers say what they say.
    pub peers_log: PathBuf,
}

/// Runs a part and writes its runs.
///
/// # Errors
/// No device, or files that are not there. A contender's failure is a record.
pub fn run(plan: &Plan, log: &mut Log) -> Result<()> {
    let clock = Clock { began: Instant::now(), limit: plan.limit };
    if plan.part == Part::Start {
        return start(plan, &clock, log);
    }
    let device = Device::cuda(0)?;
    let cuda = device.as_cuda().context("not a CUDA device")?.clone();
    let sum = DeviceSum::new(&cuda)?;
    let stage = Stage { plan, clock, device, cuda, sum };
    match plan.part {
        Part::Sweep => stage.sweep(log),
        _ => stage.compare(log),
    }
}

struct Clock {
    began: Instant,
    limit: Duration,
}

impl Clock {
    /// Whether something that takes this long still fits.
    fn allows(&self, seconds: f64) -> bool {
        self.left().as_secs_f64() > seconds
    }

    fn left(&self) -> Duration {
        self.limit.saturating_sub(self.began.elapsed())
    }
}

struct Stage<'a> {
    plan: &'a Plan,
    clock: Clock,
    device: Device,
    cuda: fst::gpu::CudaDevice,
    sum: DeviceSum,
}

enum Contender {
    Ours(Option<Dtype>),
    /// With memory that an earlier load pinned.
    Second,
    /// Large copies from pinned memory, nothing else.
    Link,
    /// Direct reads into pinned memory, nothing else.
    Ceiling,
    Peer(Peer),
}

impl Contender {
    fn name(&self) -> String {
        match self {
            Self::Ours(None) => "fst".to_owned(),
            Self::Ours(Some(dtype)) => format!("fst to {dtype}"),
            Self::Second => "fst, second load".to_owned(),
            Self::Link => "pinned copy (limit)".to_owned(),
            Self::Ceiling => "direct reads (limit)".to_owned(),
            Self::Peer(peer) => peer.name.to_owned(),
        }
    }
}

impl Stage<'_> {
    fn contenders(&self) -> Result<Vec<Contender>> {
        let mut all = vec![Contender::Ours(None)];
        match self.plan.part {
            Part::Warm => all.extend([Contender::Second, Contender::Link]),
            Part::Cold => all.push(Contender::Ceiling),
            _ => all.extend([Dtype::F32, Dtype::BF16].map(|to| Contender::Ours(Some(to)))),
        }
        let Some(environment) = &self.plan.peers else { return Ok(all) };
        // They import torch side by side.
        let started: Vec<Peer> = environment
            .present()
            .into_iter()
            .map(|name| Peer::start(environment, name, &self.plan.peers_log))
            .collect::<Result<_>>()?;
        for mut peer in started {
            if peer.wait_until_ready(self.clock.left().min(Duration::from_secs(90))) {
                all.push(Contender::Peer(peer));
            } else {
                eprintln!("  {} does not start: {}", peer.name, peer.broken().unwrap_or(""));
            }
        }
        Ok(all)
    }

    fn compare(&self, log: &mut Log) -> Result<()> {
        let mut contenders = self.contenders()?;
        let state = match self.plan.part {
            Part::Cold => CacheState::Cold,
            _ => CacheState::Warm,
        };
        let mut longest = vec![0f64; contenders.len()];
        for round in 0..self.plan.rounds {
            for path in &self.plan.paths {
                let files = safetensors_files(path)?;
                let source = Source { path, files: &files, state };
                for turn in 0..contenders.len() {
                    // Another one begins each round, so that drift hits all alike.
                    let index = (turn + round) % contenders.len();
                    if !self.clock.allows(longest[index]) {
                        continue;
                    }
                    let contender = &mut contenders[index];
                    if matches!(contender, Contender::Peer(peer) if peer.broken().is_some())
                        || matches!(contender, Contender::Ours(Some(to)) if !converts(path, *to))
                    {
                        continue;
                    }
                    let began = Instant::now();
                    let mut record = source.record(round, contender.name());
                    if self.plan.part == Part::Cast {
                        record.workload = format!("cast {}", record.workload);
                    }
                    if let Err(error) = self.once(contender, &source, &mut record) {
                        record.error = Some(format!("{error:#}"));
                    }
                    longest[index] = longest[index].max(began.elapsed().as_secs_f64());
                    log.add(&record)?;
                }
            }
        }
        Ok(())
    }

    fn once(
        &self,
        contender: &mut Contender,
        source: &Source<'_>,
        record: &mut Record,
    ) -> Result<()> {
        match contender {
            Contender::Ours(dtype) => {
                ours::load(&self.device, &self.sum, source.path, *dtype, false, record)
            }
            Contender::Second => {
                ours::load(&self.device, &self.sum, source.path, None, true, record)
            }
            Contender::Link => {
                let bytes = source.bytes()?;
                let at_once = usize::try_from(bytes.min(256 << 20))?;
                let rate = super::measure::pinned_rate(&self.cuda, at_once)?;
                (record.bytes, record.seconds) = (bytes, bytes as f64 / rate);
                record.confirmed = true;
                Ok(())
            }
            Contender::Ceiling => {
                let found = raw::ceiling(&self.cuda, source.files, Sizes::default())?;
                (record.seconds, record.bytes, record.detail) = found;
                Ok(())
            }
            Contender::Peer(peer) => {
                peer.load(source.path, self.clock.left().min(Duration::from_secs(90)), record);
                Ok(())
            }
        }
    }

    fn sweep(&self, log: &mut Log) -> Result<()> {
        let usual = Sizes::default();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let mut all = vec![usual];
        let blocks = |mib: usize, total: usize| Sizes {
            block_bytes: mib << 20,
            blocks: (total / mib).max(2),
            ..usual
        };
        all.extend([1, 4, 8].map(|mib| blocks(mib, 96)));
        all.extend([32, 64, 128, 256].map(|total| blocks(2, total)));
        all.extend([1, 2, 8].map(|streams| Sizes { streams, ..usual }));
        for workers in [cores / 4, cores / 2, 2 * cores] {
            all.push(Sizes { workers: Some(workers.max(1)), ..usual });
        }
        let cold_depths = [4, 32, 64].map(|depth| Sizes { depth: Some(depth), ..usual });
        let mut longest = 0f64;
        for path in &self.plan.paths {
            let files = safetensors_files(path)?;
            let name = format!("sweep {}", label(path));
            let states = [
                (CacheState::Warm, CachePolicy::Buffered),
                (CacheState::Cold, CachePolicy::Direct),
            ];
            for (state, policy) in states {
                let mut sizes = all.clone();
                if state == CacheState::Cold {
                    sizes.truncate(8);
                    sizes.extend(cold_depths);
                }
                for (round, sizes) in
                    (0..self.plan.rounds).flat_map(|r| sizes.iter().map(move |s| (r, s)))
                {
                    if !self.clock.allows(longest) {
                        continue;
                    }
                    let began = Instant::now();
                    let source = Source { path, files: &files, state };
                    let mut record = source.record(round, sizes.label());
                    record.workload = format!("{name} {}", state.name());
                    match raw::carry(&self.cuda, &files, *sizes, policy) {
                        Ok(found) => (record.seconds, record.bytes, record.detail) = found,
                        Err(error) => record.error = Some(format!("{error:#}")),
                    }
                    longest = longest.max(began.elapsed().as_secs_f64());
                    log.add(&record)?;
                }
                let Some(first) = files.first().filter(|_| state == CacheState::Warm) else {
                    continue;
                };
                for threads in [1, cores] {
                    let mut record =
                        Source { path, files: &files, state }.record(0, "mapped".into());
                    record.workload = format!("{name} mapped, {threads} threads");
                    match raw::mapped(&self.cuda, first, 256 << 20, threads) {
                        Ok(rates) => {
                            let rate = rates["direct"]["Ok"].as_f64().unwrap_or(f64::INFINITY);
                            record.bytes = 1_000_000_000;
                            record.seconds = 1.0 / rate;
                            record.detail = rates;
                        }
                        Err(error) => record.error = Some(format!("{error:#}")),
                    }
                    log.add(&record)?;
                }
            }
        }
        Ok(())
    }
}

/// Files in a wanted page-cache state.
struct Source<'a> {
    path: &'a Path,
    files: &'a [PathBuf],
    state: CacheState,
}

impl Source<'_> {
    /// Brings the files into their state; a record of the run that is about to start.
    fn record(&self, round: usize, contender: String) -> Record {
        let parts: Result<Vec<FilePart>> = self.files.iter().map(|f| FilePart::whole(f)).collect();
        let resident = parts.and_then(|parts| establish(&parts, self.state)).ok();
        Record {
            workload: format!("{} {}", label(self.path), self.state.name()),
            contender,
            round,
            state: self.state.name().to_owned(),
            resident,
            confirmed: resident.is_some_and(|resident| self.state.confirmed_by(resident)),
            ..Record::default()
        }
    }

    fn bytes(&self) -> Result<u64> {
        self.files.iter().map(|file| Ok(std::fs::metadata(file)?.len())).sum()
    }
}

/// A checkpoint's name in tables: its folder's.
fn label(path: &Path) -> String {
    path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

/// Whether the floating-point tensors of a checkpoint are converted to `to` with gain: 16-bit ones to F32, 8-bit
/// ones to BF16.
fn converts(path: &Path, to: Dtype) -> bool {
    let Ok(checkpoint) = fst::Checkpoint::open(path) else { return false };
    checkpoint.tensors().first().is_some_and(|tensor| {
        matches!(
            (tensor.dtype(), to),
            (Dtype::BF16 | Dtype::F16, Dtype::F32) | (Dtype::F8E4M3 | Dtype::F8E5M2, Dtype::BF16)
        )
    })
}

/// Fresh processes: from their start to the line that says that all tensors are usable.
fn start(plan: &Plan, clock: &Clock, log: &mut Log) -> Result<()> {
    let ours = std::env::current_exe()?;
    let mut names = vec!["fst"];
    names.extend(plan.peers.as_ref().map(Environment::present).unwrap_or_default());
    let mut longest = vec![0f64; names.len()];
    for round in 0..plan.rounds {
        for path in &plan.paths {
            let files = safetensors_files(path)?;
            for (name, longest) in names.iter().zip(&mut longest) {
                if !clock.allows(*longest) {
                    continue;
                }
                let source = Source { path, files: &files, state: CacheState::Warm };
                let mut record = source.record(round, (*name).to_owned());
                record.workload = format!("{} process start", label(path));
                let mut command = match &plan.peers {
                    Some(environment) if *name != "fst" => environment.command(name),
                    _ => Command::new(&ours),
                };
                if *name == "fst" {
                    command.arg("once").arg(path);
                } else {
                    command.arg("--once").arg(path);
                }
                let began = Instant::now();
                if let Err(error) = one_process(command, clock.left(), plan, &mut record) {
                    record.error = Some(format!("{error:#}"));
                }
                *longest = longest.max(began.elapsed().as_secs_f64());
                log.add(&record)?;
            }
        }
    }
    Ok(())
}

/// Runs a process that prints its answer the moment its tensors are usable, and a second one with
/// their sum.
fn one_process(
    mut command: Command,
    limit: Duration,
    plan: &Plan,
    record: &mut Record,
) -> Result<()> {
    use std::io::{BufRead, BufReader};
    let stderr = std::fs::File::options().create(true).append(true).open(&plan.peers_log)?;
    let began = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr).spawn()?;
    let stdout = child.stdout.take().context("a child without output")?;
    let (send, lines) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            let _ = send.send((began.elapsed().as_secs_f64(), line));
        }
    });
    let mut answer = Value::Null;
    let mut usable = None;
    while let Ok((seconds, line)) = lines.recv_timeout(limit.min(Duration::from_secs(90))) {
        let Ok(found) = serde_json::from_str::<Value>(&line) else { continue };
        if let Some(error) = found["error"].as_str() {
            let error = error.to_owned();
            let _ = child.kill();
            let _ = child.wait();
            bail!("{error}");
        }
        if found["usable"].as_bool() == Some(true) {
            usable = Some(seconds);
        } else if found.is_object() {
            answer = found;
            break;
        }
    }
    let _ = child.kill();
    let _ = child.wait();
    let usable = usable.context("it ended without usable tensors; see its log")?;
    peers::fill(record, &answer);
    record.detail = json!({"load_seconds": record.seconds, "more": record.detail});
    record.seconds = usable;
    Ok(())
}

/// The other side of [`Part::Start`] for fst: a whole program in one function.
///
/// # Errors
/// The load's.
pub fn once(path: &Path) -> Result<()> {
    let device = Device::cuda(0)?;
    let start = Instant::now();
    let checkpoint = fst::Checkpoint::open(path)?;
    let tensors = fst::Loader::new().device(device.clone()).load(&checkpoint)?;
    let seconds = start.elapsed().as_secs_f64();
    println!("{}", json!({"usable": true}));
    let sum = DeviceSum::new(device.as_cuda().context("not a CUDA device")?)?.of(&tensors)?;
    let answer = json!({
        "seconds": seconds, "bytes": tensors.report().bytes, "sum": sum.to_string(),
    });
    println!("{answer}");
    Ok(())
}
