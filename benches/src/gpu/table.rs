//! The summary of a check: tests, comparisons, targets.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::record::{Record, read};
use crate::stats::{Summary, summary};

/// What a comparison is held to: who has to be how much slower than fst, or which limit is reached
/// to what part.
struct Target {
    what: &'static str,
    /// Ends or begins the name of the workload.
    workload: fn(&str) -> bool,
    /// The contender that is held to it.
    of: &'static str,
    /// Contenders to compare with; the fastest counts.
    against: fn(&str) -> bool,
    least: f64,
}

fn is_peer(name: &str) -> bool {
    !name.starts_with("fst") && !name.contains("(limit)")
}

const TARGETS: &[Target] = &[
    Target {
        what: "warm, rate against the pinned copy",
        workload: |w| w.starts_with("big") && w.ends_with("warm"),
        of: "fst",
        against: |c| c.starts_with("pinned copy"),
        least: 0.85,
    },
    Target {
        what: "warm, second load, rate against the pinned copy",
        workload: |w| w.starts_with("big") && w.ends_with("warm"),
        of: "fst, second load",
        against: |c| c.starts_with("pinned copy"),
        least: 0.92,
    },
    Target {
        what: "warm, rate against the best peer",
        workload: |w| w.starts_with("big") && w.ends_with("warm"),
        of: "fst",
        against: is_peer,
        least: 1.2,
    },
    Target {
        what: "warm, rate against safetensors 0.8.0",
        workload: |w| w.starts_with("big") && w.ends_with("warm"),
        of: "fst",
        against: |c| c == "safetensors-0.8.0",
        least: 5.0,
    },
    Target {
        what: "cold, rate against direct reads alone",
        workload: |w| w.ends_with("cold") && !w.starts_with("sweep"),
        of: "fst",
        against: |c| c.starts_with("direct reads"),
        least: 0.95,
    },
    Target {
        what: "18,867 small tensors, rate against the best peer",
        workload: |w| w.starts_with("small") && w.ends_with("warm"),
        of: "fst",
        against: is_peer,
        least: 2.0,
    },
    Target {
        what: "process start to usable, against the best peer",
        workload: |w| w.ends_with("process start"),
        of: "fst",
        against: is_peer,
        least: 1.5,
    },
];

/// Bytes that may be pinned by default.
const PINNED: u64 = 256 << 20;

/// Casts that must reach a part of the device's own copy, as `kernels_on_device` names them.
const CASTS: &[(&str, f64)] = &[("cast BF16 to F32", 0.85), ("cast F8_E4M3 to BF16", 0.85)];

/// The summary of what a folder of results holds.
///
/// # Errors
/// Runs that cannot be read. Parts that are missing say so.
pub fn summarise(folder: &Path) -> Result<String> {
    let runs_file = folder.join("runs.jsonl");
    let runs = if runs_file.exists() { read(&runs_file)? } else { Vec::new() };
    let mut out = String::new();
    for name in ["machine.txt", "probe.txt", "tests.txt"] {
        let text = std::fs::read_to_string(folder.join(name)).unwrap_or_default();
        let _ = writeln!(out, "{}", text.trim_end());
    }
    let groups = group(&runs);
    for (workload, contenders) in &groups {
        let _ = writeln!(out, "\n{workload}");
        let ours = rounds_of(contenders, "fst");
        let mut order: Vec<_> = contenders.iter().collect();
        let median = |runs: &[&Record]| rate(runs).map_or(0.0, |rate| rate.median);
        order.sort_by(|a, b| median(b.1).total_cmp(&median(a.1)));
        for (contender, runs) in order {
            line(&mut out, contender, runs, &ours);
        }
        let wrong = disagreement(contenders);
        if !wrong.is_empty() {
            let _ = writeln!(out, "  SUMS DIFFER: {}", wrong.join(", "));
        }
    }
    let _ = writeln!(out, "\ntargets{:<46} {:>12} {:>9}", "", "found", "wanted");
    let mut verdicts: Vec<Verdict> = TARGETS
        .iter()
        .map(|target| Verdict::ratio(target.what, measured(target, &groups), target.least))
        .collect();
    let log = std::fs::read_to_string(folder.join("kernel-speed.log")).unwrap_or_default();
    for (cast, least) in CASTS {
        let what = format!("{cast}, of the device's copy");
        verdicts.push(Verdict::ratio(&what, of_copy(&log, cast), *least));
    }
    verdicts.push(pinned(&runs));
    for verdict in &verdicts {
        let _ = writeln!(out, "{verdict}");
    }
    if let Some(grown) = ours(&runs).filter_map(|run| run.host_bytes).max() {
        let _ = writeln!(out, "  loads took {} MiB of host memory at most", grown >> 20);
    }
    let _ = writeln!(out, "\n{}", ways(&runs).trim_end());
    std::fs::write(folder.join("targets.json"), serde_json::to_string_pretty(&verdicts)?)?;
    Ok(out)
}

type Groups<'a> = BTreeMap<&'a str, BTreeMap<&'a str, Vec<&'a Record>>>;

fn group(runs: &[Record]) -> Groups<'_> {
    let mut groups = Groups::new();
    for run in runs {
        let contenders = groups.entry(&run.workload).or_default();
        contenders.entry(&run.contender).or_default().push(run);
    }
    groups
}

fn rate(runs: &[&Record]) -> Option<Summary> {
    let counted: Vec<f64> = runs.iter().filter(|r| r.counts()).map(|r| r.gb_per_s()).collect();
    summary(&counted)
}

/// Rates by round.
fn rounds_of(contenders: &BTreeMap<&str, Vec<&Record>>, name: &str) -> BTreeMap<usize, f64> {
    let runs = contenders.get(name).into_iter().flatten().filter(|run| run.counts());
    runs.map(|run| (run.round, run.gb_per_s())).collect()
}

/// fst's rate over that of the same round's run, as a median.
fn ratio(runs: &[&Record], ours: &BTreeMap<usize, f64>) -> Option<f64> {
    let of = |run: &&&Record| run.counts();
    let ratios: Vec<f64> = runs
        .iter()
        .filter(of)
        .filter_map(|run| Some(ours.get(&run.round)? / run.gb_per_s()))
        .collect();
    summary(&ratios).map(|summary| summary.median)
}

fn line(out: &mut String, contender: &str, runs: &[&Record], ours: &BTreeMap<usize, f64>) {
    let _ = match (rate(runs), runs.iter().find_map(|run| run.error.as_deref())) {
        (Some(rate), _) => {
            let seconds: Vec<f64> = runs.iter().filter(|r| r.counts()).map(|r| r.seconds).collect();
            let seconds = summary(&seconds).map_or(0.0, |s| s.median);
            let _ = write!(
                out,
                "  {contender:<46} {:8.2} GB/s ({:.2}..{:.2}, n {}) {seconds:9.4} s",
                rate.median, rate.min, rate.max, rate.n
            );
            match ratio(runs, ours).filter(|_| contender != "fst") {
                Some(ratio) => writeln!(out, "  fst: {ratio:.2}x"),
                None => writeln!(out),
            }
        }
        (None, Some(error)) => {
            let short: String = error.chars().take(100).collect();
            writeln!(out, "  {contender:<46} failed: {short}")
        }
        (None, None) => writeln!(out, "  {contender:<46} page-cache state not confirmed"),
    };
}

/// Contenders of a workload whose tensors did not have the sum that fst's had. Converted ones have
/// others, of course.
fn disagreement(contenders: &BTreeMap<&str, Vec<&Record>>) -> Vec<String> {
    let sums = |name: &str| -> Vec<&str> {
        let runs = contenders.get(name).into_iter().flatten();
        runs.filter_map(|run| run.sum.as_deref()).collect()
    };
    let ours = sums("fst");
    let Some(expected) = ours.first() else { return Vec::new() };
    let names = contenders.keys().filter(|name| !name.starts_with("fst to"));
    names
        .filter(|name| sums(name).iter().any(|sum| sum != expected))
        .map(|name| (*name).to_owned())
        .collect()
}

/// The least ratio over a target's workloads, each against its fastest contender.
fn measured(target: &Target, groups: &Groups<'_>) -> Option<f64> {
    let of_workload = |(_, contenders): (&&str, &BTreeMap<&str, Vec<&Record>>)| {
        let ours = rounds_of(contenders, target.of);
        let others = contenders.iter().filter(|(name, _)| (target.against)(name));
        others.filter_map(|(_, runs)| ratio(runs, &ours)).min_by(f64::total_cmp)
    };
    let of_target = groups.iter().filter(|(name, _)| (target.workload)(name));
    of_target.filter_map(of_workload).min_by(f64::total_cmp)
}

/// A target, and what was found.
#[derive(Debug, Serialize)]
struct Verdict {
    what: String,
    found: Option<f64>,
    wanted: f64,
    unit: &'static str,
    reached: Option<bool>,
}

impl Verdict {
    fn ratio(what: &str, found: Option<f64>, least: f64) -> Self {
        let reached = found.map(|found| found >= least);
        Self { what: what.to_owned(), found, wanted: least, unit: "x", reached }
    }

    fn mebibytes(what: &str, found: Option<u64>, most: u64) -> Self {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let reached = found.map(|found| found <= most);
        let (found, wanted) = (found.map(mib), mib(most));
        Self { what: what.to_owned(), found, wanted, unit: " MiB", reached }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, wanted, unit, .. } = self;
        let digits = if *unit == "x" { 2 } else { 0 };
        let number = |value: f64| format!("{value:.digits$}{unit}");
        let found = self.found.map_or_else(|| "not measured".to_owned(), number);
        let word = match self.reached {
            Some(true) => "  reached",
            Some(false) => "  MISSED",
            None => "",
        };
        write!(f, "  {what:<51} {found:>12} {:>9}{word}", number(*wanted))
    }
}

/// fst's runs that came to an end.
fn ours(runs: &[Record]) -> impl Iterator<Item = &Record> {
    runs.iter().filter(|run| run.contender.starts_with("fst") && run.error.is_none())
}

/// What fst's loads pinned at most, as they say themselves.
fn pinned(runs: &[Record]) -> Verdict {
    let said = ours(runs).filter_map(|run| run.detail["copy"]["pinned_bytes"].as_u64()).max();
    Verdict::mebibytes("pinned memory, at most", said, PINNED)
}

/// Which way fst's loads took, for each workload: what its last run says.
fn ways(runs: &[Record]) -> String {
    let mut last: BTreeMap<&str, &Record> = BTreeMap::new();
    for run in runs.iter().filter(|run| run.contender == "fst" && !run.detail["copy"].is_null()) {
        last.insert(&run.workload, run);
    }
    let mut out = String::new();
    for (workload, run) in last {
        let copy = &run.detail["copy"];
        let gb = |name: &str| copy[name].as_f64().unwrap_or(0.0) / 1e9;
        let rate = |name: &str| {
            copy[name].as_f64().map_or_else(|| "-".to_owned(), |rate| format!("{rate:.2}"))
        };
        let _ = writeln!(
            out,
            "  {workload}: {:.2} GB straight from the page cache ({} GB/s), {:.2} GB staged ({} GB/s): {}{}",
            gb("registered_bytes"),
            rate("registered_gb_per_s"),
            gb("staged_bytes"),
            rate("staged_gb_per_s"),
            copy["reason"].as_str().unwrap_or(""),
            copy["refused"].as_str().map_or_else(String::new, |why| format!("; {why}")),
        );
    }
    if out.is_empty() { out } else { format!("ways of cached bytes\n{out}") }
}

/// The figure in front of `of copy` in the line of the kernel test's output that starts so.
fn of_copy(log: &str, what: &str) -> Option<f64> {
    let line = log.lines().find(|line| line.trim_start().starts_with(what))?;
    line.strip_suffix("of copy")?.split_whitespace().last()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::record::Log;

    fn run(workload: &str, contender: &str, round: usize, seconds: f64, sum: &str) -> Record {
        Record {
            workload: workload.into(),
            contender: contender.into(),
            round,
            confirmed: true,
            seconds,
            bytes: 1_000_000_000,
            sum: Some(sum.into()),
            ..Record::default()
        }
    }

    fn summarised(runs: &[Record], speed: &str) -> String {
        let folder = tempfile::tempdir().unwrap();
        let mut log = Log::open(&folder.path().join("runs.jsonl")).unwrap();
        runs.iter().for_each(|run| log.add(run).unwrap());
        std::fs::write(folder.path().join("kernel-speed.log"), speed).unwrap();
        summarise(folder.path()).unwrap()
    }

    fn line_of<'a>(text: &'a str, start: &str) -> &'a str {
        text.lines().find(|line| line.trim_start().starts_with(start)).unwrap()
    }

    #[test]
    fn ratios_are_of_runs_of_a_round_and_the_best_peer_counts() {
        let name = "big warm";
        let text = summarised(
            &[
                run(name, "fst", 0, 1.0, "7"),
                run(name, "fst", 1, 2.0, "7"),
                run(name, "pinned copy (limit)", 0, 0.9, "7"),
                run(name, "pinned copy (limit)", 1, 1.8, "7"),
                run(name, "safetensors-0.8.0", 0, 6.0, "7"),
                run(name, "runai-0.17.0", 0, 1.1, "7"),
                Record { confirmed: false, ..run(name, "instanttensor-0.2.2", 0, 0.1, "7") },
            ],
            "cast BF16 to F32                               1.0 GB/s   0.84 of copy\n",
        );
        assert!(
            line_of(&text, "warm, rate against the pinned").ends_with("0.90x     0.85x  reached")
        );
        assert!(line_of(&text, "warm, rate against the best").ends_with("1.10x     1.20x  MISSED"));
        assert!(line_of(&text, "warm, rate against safe").ends_with("6.00x     5.00x  reached"));
        assert!(line_of(&text, "cold, rate").contains("not measured"));
        assert!(line_of(&text, "cast BF16 to F32").ends_with("0.84x     0.85x  MISSED"));
        assert!(line_of(&text, "instanttensor").ends_with("state not confirmed"), "{text}");
        assert!(!text.contains("SUMS DIFFER"));
        assert!(line_of(&text, "pinned memory").contains("not measured"));
    }

    #[test]
    fn what_was_pinned_and_which_way_bytes_took_is_told() {
        let mut ours = run("big warm", "fst", 0, 1.0, "7");
        ours.detail = serde_json::json!({"copy": {
            "pinned_bytes": 300 << 20, "registered_bytes": 2e9, "staged_bytes": 5e8, "reason": "measured",
            "registered_gb_per_s": 40.5, "staged_gb_per_s": null,
        }});
        let folder = tempfile::tempdir().unwrap();
        Log::open(&folder.path().join("runs.jsonl")).unwrap().add(&ours).unwrap();
        let text = summarise(folder.path()).unwrap();
        assert!(line_of(&text, "pinned memory").ends_with("300 MiB   256 MiB  MISSED"), "{text}");
        let way = "big warm: 2.00 GB straight from the page cache (40.50 GB/s), 0.50 GB staged (-";
        assert!(line_of(&text, "big warm:").starts_with(&format!("  {way}")), "{text}");
        let targets = std::fs::read_to_string(folder.path().join("targets.json")).unwrap();
        let targets: serde_json::Value = serde_json::from_str(&targets).unwrap();
        let missed = targets.as_array().unwrap().iter().filter(|t| t["reached"] == false);
        assert_eq!(missed.count(), 1, "{targets}");
    }

    #[test]
    fn other_bytes_are_told() {
        let runs =
            [run("big warm", "fst", 0, 1.0, "7"), run("big warm", "runai-0.17.0", 0, 1.0, "8")];
        assert!(summarised(&runs, "").contains("SUMS DIFFER: runai-0.17.0"));
        assert!(summarised(&[], "").contains("not measured"));
    }
}
