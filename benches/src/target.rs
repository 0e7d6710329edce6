//! What the loader is held to, as data, and whether a set of runs meets it.

use serde::{Deserialize, Serialize};

use crate::page_cache::CacheState;
use crate::runner::Run;
use crate::stats::{Summary, summary};

/// What a target compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantity {
    /// Seconds of the other over seconds of ours, paired by round.
    Speed,
    /// CPU seconds per byte of the other over ours, paired by round.
    CpuPerByte,
    /// MiB of resident memory beyond the process's own and the tensors'; ours alone.
    ExtraMemory,
}

/// One line of the list of targets.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// What it says, in words.
    pub what: &'static str,
    /// The workloads it applies to.
    pub workloads: &'static [&'static str],
    /// In which state.
    pub state: CacheState,
    /// What is compared.
    pub quantity: Quantity,
    /// Our entry's label.
    pub ours: &'static str,
    /// The other entry's label.
    pub against: &'static str,
    /// Least ratio; for memory, the most MiB.
    pub bound: f64,
}

const LOADS: &[&str] = &["llama", "single", "moe", "gpt2"];

const fn speed(
    what: &'static str,
    workloads: &'static [&'static str],
    state: CacheState,
    ours: &'static str,
    against: &'static str,
    bound: f64,
) -> Target {
    Target { what, workloads, state, quantity: Quantity::Speed, ours, against, bound }
}

use CacheState::{Cold, Warm};

/// Every target.
pub const TARGETS: &[Target] = &[
    speed("owned, against fastsafetensors", LOADS, Cold, "fst", "fastsafetensors", 1.8),
    speed("owned, against Run:ai", LOADS, Cold, "fst", "runai", 2.5),
    speed("owned, against safetensors copied out", LOADS, Cold, "fst", "safetensors-copy", 3.0),
    speed("owned, against the raw ceiling", LOADS, Cold, "fst", "raw-ceiling", 0.9),
    speed("owned, against fastsafetensors", LOADS, Warm, "fst", "fastsafetensors", 2.0),
    speed("owned, against a parallel memcpy", LOADS, Warm, "fst", "memcpy", 0.85),
    speed(
        "mapped and touched, against safetensors the same",
        LOADS,
        Warm,
        "fst-map",
        "safetensors-touch",
        1.0,
    ),
    speed("half along dim 0, against the whole", &["half-dim0"], Cold, "fst/half-dim0", "fst", 1.7),
    speed("half along dim 1, against the whole", &["half-dim1"], Cold, "fst/half-dim1", "fst", 1.2),
    speed(
        "four ranks, against each reading everything",
        &["ranks"],
        Cold,
        "fst-ranks",
        "fst-everyone",
        1.5,
    ),
    speed(
        "open, against the safetensors crate",
        &["open-18867", "open-100000"],
        Warm,
        "fst",
        "safetensors-open",
        2.0,
    ),
    Target {
        what: "CPU seconds per GB, against fastsafetensors",
        workloads: LOADS,
        state: Cold,
        quantity: Quantity::CpuPerByte,
        ours: "fst",
        against: "fastsafetensors",
        bound: 2.0,
    },
    Target {
        what: "memory beyond the tensors, MiB at most",
        workloads: LOADS,
        state: Cold,
        quantity: Quantity::ExtraMemory,
        ours: "fst",
        against: "",
        bound: 64.0,
    },
    Target {
        what: "memory beyond the tensors, MiB at most",
        workloads: LOADS,
        state: Warm,
        quantity: Quantity::ExtraMemory,
        ours: "fst",
        against: "",
        bound: 64.0,
    },
];

/// A target applied to runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Verdict {
    /// [`Target::what`].
    pub what: String,
    /// Workload's name.
    pub workload: String,
    /// Page-cache state.
    pub state: CacheState,
    /// [`Target::bound`].
    pub bound: f64,
    /// What was found; `None` when a side has no valid run.
    pub found: Option<Summary>,
    /// Whether the median meets the bound.
    pub met: Option<bool>,
}

/// Ratios of the runs of `other` to those of `ours`, round by round, over valid pairs.
#[must_use]
pub fn paired_ratios(
    runs: &[&Run],
    ours: &str,
    other: &str,
    value: fn(&crate::child::Measurement) -> f64,
) -> Vec<f64> {
    let of = |label: &str, round: usize| {
        let run = runs.iter().find(|run| run.label == label && run.round == round)?;
        run.valid().map(value)
    };
    let rounds = runs.iter().map(|run| run.round).max().map_or(0, |last| last + 1);
    (0..rounds).filter_map(|round| Some(of(other, round)? / of(ours, round)?)).collect()
}

/// Applies every target that these workloads are under.
#[must_use]
pub fn verdicts(runs: &[Run]) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    for target in TARGETS {
        for &workload in target.workloads {
            let of: Vec<&Run> = runs
                .iter()
                .filter(|run| run.workload == workload && run.state == target.state)
                .collect();
            if of.is_empty() {
                continue;
            }
            let values = match target.quantity {
                Quantity::Speed => paired_ratios(&of, target.ours, target.against, |m| m.seconds),
                Quantity::CpuPerByte => paired_ratios(&of, target.ours, target.against, |m| {
                    m.cpu_seconds / (m.bytes as f64).max(1.0)
                }),
                Quantity::ExtraMemory => of
                    .iter()
                    .filter(|run| run.label == target.ours)
                    .filter_map(|run| run.valid())
                    .map(extra_mib)
                    .collect(),
            };
            let found = summary(&values);
            let met = found.map(|s| match target.quantity {
                Quantity::ExtraMemory => s.median <= target.bound,
                Quantity::Speed | Quantity::CpuPerByte => s.median >= target.bound,
            });
            verdicts.push(Verdict {
                what: target.what.to_owned(),
                workload: workload.to_owned(),
                state: target.state,
                bound: target.bound,
                found,
                met,
            });
        }
    }
    verdicts
}

/// MiB of peak memory beyond what the process had before and what the tensors need.
#[must_use]
pub fn extra_mib(m: &crate::child::Measurement) -> f64 {
    (m.peak_rss_bytes as f64 - m.base_rss_bytes as f64 - m.bytes as f64) / f64::from(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::child::Measurement;
    use crate::contender::Op;

    fn run(label: &str, round: usize, seconds: f64, confirmed: bool) -> Run {
        Run {
            workload: "llama".into(),
            state: Cold,
            round,
            label: label.into(),
            op: Op::Load,
            resident_before: 0.0,
            free_memory: Default::default(),
            taken_back: None,
            state_confirmed: confirmed,
            resident_after: 0.0,
            others_busy: 0.0,
            measurement: Some(Measurement {
                seconds,
                bytes: 1 << 20,
                cpu_seconds: seconds / 2.0,
                peak_rss_bytes: 5 << 20,
                base_rss_bytes: 3 << 20,
                returned_bytes: None,
                digest: None,
                detail: None,
            }),
            error: None,
        }
    }

    #[test]
    fn unconfirmed_runs_never_count() {
        let mut runs = vec![
            run("fst", 0, 1.0, true),
            run("fastsafetensors", 0, 2.0, true),
            run("fst", 1, 1.0, true),
            run("fastsafetensors", 1, 9.0, false),
        ];
        let found = |runs: &[Run]| {
            let all = verdicts(runs);
            let one = all.iter().find(|v| v.what.contains("fastsafetensors")).unwrap();
            (one.found.map(|s| (s.median, s.n)), one.met)
        };
        assert_eq!(found(&runs), (Some((2.0, 1)), Some(true)));
        runs[0].measurement.as_mut().unwrap().seconds = 1.9;
        assert_eq!(found(&runs).1, Some(false));
        runs[0].state_confirmed = false;
        assert_eq!(found(&runs), (None, None));
    }

    #[test]
    fn memory_is_what_exceeds_process_and_tensors() {
        let all = verdicts(&[run("fst", 0, 1.0, true)]);
        let memory = all.iter().find(|v| v.what.contains("memory")).unwrap();
        assert_eq!(memory.found.unwrap().median, 1.0);
        assert_eq!(memory.met, Some(true));
    }
}
