//! Runs the contenders of a workload in turn: round after round, in rotating order, each run in a fresh
//! process on files whose page-cache state was just established and checked.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::child::Measurement;
use crate::contender::{Kind, Op, safetensors_files};
use crate::machine::busy_seconds;
use crate::memory::{self, FreeMemory};
use crate::page_cache::{self, CacheState, Part};
use crate::workload::{Entry, Workload};

/// One run of one contender.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Run {
    /// Workload's name.
    pub workload: String,
    /// The state that was asked for.
    pub state: CacheState,
    /// Which round, from 0; runs of one round are compared with each other.
    pub round: usize,
    /// [`Entry::label`].
    pub label: String,
    /// What was loaded.
    pub op: Op,
    /// Fraction of the files in the page cache just before the run.
    pub resident_before: f64,
    /// What free memory was to be like.
    #[serde(default)]
    pub free_memory: FreeMemory,
    /// Share of the memory that the run needs that the hypervisor took back before it, if it was to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken_back: Option<f64>,
    /// Whether these confirm the state. Runs without it are never counted.
    pub state_confirmed: bool,
    /// The same fraction after the run.
    pub resident_after: f64,
    /// Share of all cores that other processes used meanwhile (kernel threads count as others).
    pub others_busy: f64,
    /// The figures, unless the run failed.
    pub measurement: Option<Measurement>,
    /// Why it failed.
    pub error: Option<String>,
}

impl Run {
    /// The figures, if they may enter a statistic.
    #[must_use]
    pub fn valid(&self) -> Option<&Measurement> {
        self.measurement.as_ref().filter(|_| self.state_confirmed && self.error.is_none())
    }
}

/// Where things are and how to run them.
#[derive(Debug, Clone)]
pub struct Runner {
    /// The contender program.
    pub program: PathBuf,
    /// The Python peers' environment.
    pub peers_venv: PathBuf,
    /// `peers/load.py`.
    pub peers_script: PathBuf,
    /// What free memory is like before each run.
    pub free_memory: FreeMemory,
    /// A run longer than this is killed and counts as failed.
    pub time_limit: Duration,
}

impl Runner {
    /// Why an entry cannot run here, if it cannot.
    #[must_use]
    pub fn cannot_run(&self, entry: &Entry) -> Option<String> {
        let Kind::Python { packages } = entry.contender.kind else {
            return None;
        };
        let site = self.peers_venv.join("site").join(packages);
        (!site.is_dir()).then(|| format!("no {} (benches/peers/setup.sh makes it)", site.display()))
    }

    /// Runs `rounds` rounds, telling `report` about each run as it ends. With `digest`, the runs of the
    /// first round also take the digest of what they loaded, after the measurement.
    ///
    /// # Errors
    /// Page-cache control that fails outright. A contender that fails is a [`Run`] with an error.
    #[expect(clippy::too_many_arguments, reason = "one call, and each names itself")]
    pub fn rounds(
        &self,
        workload: &Workload,
        folder: &Path,
        state: CacheState,
        entries: &[Entry],
        rounds: usize,
        digest: bool,
        report: &mut dyn FnMut(&Run),
    ) -> Result<Vec<Run>> {
        // A run that opens reads headers only; the data of its files may be a hole far larger than memory.
        let part = if workload.op == Op::Open { Part::header } else { Part::whole };
        let files = safetensors_files(folder)?;
        let parts = files.iter().map(|file| part(file)).collect::<Result<Vec<_>>>()?;
        let mut runs = Vec::new();
        for round in 0..rounds {
            for i in turns(round, entries.len()) {
                let entry = &entries[i];
                let digest = digest && round == 0;
                let run = self.one(workload, folder, &parts, state, entry, round, digest)?;
                report(&run);
                runs.push(run);
            }
        }
        Ok(runs)
    }

    #[expect(clippy::too_many_arguments, reason = "one call, and each names itself")]
    fn one(
        &self,
        workload: &Workload,
        folder: &Path,
        parts: &[Part],
        state: CacheState,
        entry: &Entry,
        round: usize,
        digest: bool,
    ) -> Result<Run> {
        let resident_before = page_cache::establish(parts, state)?;
        let needed = memory::settle_for(workload.memory(entry));
        let (settle, taken_back) = match self.free_memory {
            FreeMemory::Backed => (needed, None),
            FreeMemory::Idle => (0, Some(memory::idle(needed)?)),
            FreeMemory::AsFound => (0, None),
        };
        let busy_before = busy_seconds();
        let start = Instant::now();
        let result = self.start(entry, folder, settle, digest);
        let wall = start.elapsed().as_secs_f64();
        let busy = busy_before.zip(busy_seconds()).map_or(0.0, |(before, after)| after - before);
        let cores = std::thread::available_parallelism().map_or(1, usize::from) as f64;
        let (measurement, mut error, own) = match result {
            Ok((measurement, own)) => (Some(measurement), None, own),
            Err(error) => (None, Some(format!("{error:#}")), 0.0),
        };
        let wanted = workload.bytes(entry.op);
        if let Some(m) = &measurement
            && m.bytes != wanted
        {
            error = Some(format!("gave {} bytes of tensor data, expected {wanted}", m.bytes));
        }
        Ok(Run {
            workload: workload.name.to_owned(),
            state,
            round,
            label: entry.label(),
            op: entry.op,
            resident_before,
            free_memory: self.free_memory,
            taken_back,
            state_confirmed: state.confirmed_by(resident_before)
                && taken_back.is_none_or(|share| share >= memory::TAKEN_BACK),
            resident_after: page_cache::resident_fraction(parts)?,
            others_busy: ((busy - own) / (wall * cores)).clamp(0.0, 1.0),
            measurement,
            error,
        })
    }

    /// Runs one contender's process; gives its measurement and the CPU seconds of the whole process.
    fn start(
        &self,
        entry: &Entry,
        folder: &Path,
        settle: u64,
        digest: bool,
    ) -> Result<(Measurement, f64)> {
        let mut command = match entry.contender.kind {
            Kind::Rust => Command::new(&self.program),
            Kind::Python { packages } => {
                let mut command = Command::new(self.peers_venv.join("bin/python"));
                command.arg(&self.peers_script);
                command.env("PYTHONPATH", self.peers_venv.join("site").join(packages));
                command.env("PYTHONDONTWRITEBYTECODE", "1");
                command
            }
        };
        command.args(["--contender", entry.contender.name, "--op", entry.op.name(), "--path"]);
        command.arg(folder).arg("--settle").arg(settle.to_string());
        if digest {
            command.arg("--digest");
        }
        let cpu_before = crate::child::cpu_seconds()?;
        let output = wait(command, self.time_limit)?;
        let own = crate::child::cpu_seconds()? - cpu_before;
        let stderr = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            let last = stderr.trim().lines().next_back().unwrap_or("no message").to_owned();
            bail!("{}: {last}", output.status);
        }
        let stdout = String::from_utf8_lossy(&output.stdout);
        // Peers may print on their own; the measurement is the last line.
        let line = stdout.trim().lines().next_back().context("no output")?;
        let measurement = serde_json::from_str(line).with_context(|| format!("output {line:?}"))?;
        Ok((measurement, own))
    }
}

/// Compares the digests among runs of the same operation on the same data.
///
/// # Errors
/// A run that failed, has no digest, or disagrees with the first one.
pub fn check_same_tensors(runs: &[Run]) -> Result<()> {
    let mut first: BTreeMap<&str, (&str, &str)> = BTreeMap::new();
    for run in runs {
        let Run { label, workload, .. } = run;
        if let Some(error) = &run.error {
            bail!("{label} on {workload}: {error}");
        }
        let digest = run.measurement.as_ref().and_then(|m| m.digest.as_deref());
        let digest = digest.with_context(|| format!("{label} on {workload}: no digest"))?;
        let (reference, wanted) = *first.entry(run.op.name()).or_insert((label, digest));
        if wanted != digest {
            bail!(
                "{label} gave other tensors than {reference} on {workload}: digest {digest}, expected {wanted}"
            );
        }
    }
    Ok(())
}

/// Waits for a process to end and collects its output; kills it at the time limit.
fn wait(mut command: Command, limit: Duration) -> Result<Output> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let program = command.get_program().to_owned();
    let child = command.spawn().with_context(|| format!("start {}", program.display()))?;
    let pid = i32::try_from(child.id())?;
    let (sender, receiver) = mpsc::channel::<io::Result<Output>>();
    let waiter = std::thread::spawn(move || {
        // The receiver hears of it unless it is gone, and then nobody needs to.
        let _ = sender.send(child.wait_with_output());
    });
    let timely = receiver.recv_timeout(limit);
    if timely.is_err() {
        // SAFETY: takes integers only. The child has not been waited for, so the id is still its own.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
    let _ = waiter.join();
    match timely {
        Ok(output) => Ok(output?),
        Err(_) => bail!("killed after {} s", limit.as_secs()),
    }
}

/// The order of a round: every contender has its turn at each place, and a neighbour on either side
/// in turn. What a run leaves behind (memory that the hypervisor took back, a busy disk) would
/// otherwise always hit the same one.
fn turns(round: usize, entries: usize) -> impl Iterator<Item = usize> {
    (0..entries).map(move |i| {
        let place = (i + round) % entries;
        if round.is_multiple_of(2) { place } else { entries - 1 - place }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_has_every_entry_and_its_neighbours_change() {
        let before = |round| {
            let order: Vec<usize> = turns(round, 5).collect();
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2, 3, 4]);
            order.windows(2).find(|pair| pair[1] == 2).map(|pair| pair[0])
        };
        assert_eq!((before(0), before(1)), (Some(1), Some(3)));
    }

    #[test]
    fn a_process_that_hangs_is_killed() {
        let mut command = Command::new("sleep");
        command.arg("60");
        let start = Instant::now();
        let error = wait(command, Duration::from_millis(200)).unwrap_err();
        assert!(error.to_string().contains("killed"), "{error}");
        assert!(start.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn runs_that_disagree_are_found() {
        let run = |label: &str, digest: Option<&str>, error: Option<&str>| Run {
            workload: "w".into(),
            state: CacheState::Cold,
            free_memory: FreeMemory::default(),
            taken_back: None,
            round: 0,
            label: label.into(),
            op: Op::Load,
            resident_before: 0.0,
            state_confirmed: true,
            resident_after: 0.0,
            others_busy: 0.0,
            measurement: Some(Measurement {
                seconds: 1.0,
                bytes: 1,
                cpu_seconds: 1.0,
                peak_rss_bytes: 1,
                base_rss_bytes: 1,
                returned_bytes: None,
                digest: digest.map(str::to_owned),
                detail: None,
            }),
            error: error.map(str::to_owned),
        };
        let (a, b) = (run("a", Some("1"), None), run("b", Some("1"), None));
        check_same_tensors(&[a.clone(), b]).unwrap();
        let text = |other: Run| check_same_tensors(&[a.clone(), other]).unwrap_err().to_string();
        assert!(text(run("b", Some("2"), None)).contains("b gave other tensors than a"));
        assert!(text(run("b", None, None)).contains("no digest"));
        assert!(text(run("b", Some("1"), Some("short"))).contains("short"));
    }
}
