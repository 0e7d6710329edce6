//! A set of runs as JSON and as the tables that people read.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use crate::contender::{Gives, OURS, Op, by_name, is_ours};
use crate::machine::Machine;
use crate::page_cache::CacheState;
use crate::runner::Run;
use crate::stats::{Summary, summary};
use crate::target::{Verdict, extra_mib, paired_ratios, verdicts};

/// Everything that one invocation found out.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Results {
    /// When it began, UTC.
    pub date: String,
    /// Revision of the sources.
    pub revision: String,
    /// The arguments.
    pub command: String,
    /// Where it ran.
    pub machine: Machine,
    /// What did not run, and why.
    pub skipped: Vec<String>,
    /// Every run, valid or not.
    pub runs: Vec<Run>,
    /// The targets.
    pub verdicts: Vec<Verdict>,
}

/// One contender's row in a table.
#[derive(Debug, Clone)]
pub struct Row {
    /// The entry's label.
    pub label: String,
    /// Seconds.
    pub seconds: Summary,
    /// Bytes of tensor data given.
    pub bytes: u64,
    /// CPU seconds, median.
    pub cpu_seconds: f64,
    /// MiB beyond process and tensors, median.
    pub extra_mib: f64,
    /// Seconds of this one over seconds of ours, paired.
    pub ratio: Option<Summary>,
    /// Runs that do not count.
    pub invalid: usize,
}

impl Results {
    /// Applies the targets to the runs.
    pub fn judge(&mut self) {
        self.verdicts = verdicts(&self.runs);
    }

    /// The pairs of workload and state that have runs, in order.
    #[must_use]
    pub fn sections(&self) -> Vec<(String, CacheState)> {
        let mut sections: Vec<(String, CacheState)> = Vec::new();
        for run in &self.runs {
            let section = (run.workload.clone(), run.state);
            if !sections.contains(&section) {
                sections.push(section);
            }
        }
        sections
    }

    /// The rows of a section, fastest first. Entries without a valid run are left out.
    #[must_use]
    pub fn rows(&self, workload: &str, state: CacheState) -> Vec<Row> {
        let runs: Vec<&Run> =
            self.runs.iter().filter(|r| r.workload == workload && r.state == state).collect();
        let mut labels: Vec<&str> = Vec::new();
        for run in &runs {
            if !labels.contains(&run.label.as_str()) {
                labels.push(&run.label);
            }
        }
        let ours = ours_among(&labels);
        let mut rows: Vec<Row> = labels
            .iter()
            .filter_map(|&label| {
                let of: Vec<&&Run> = runs.iter().filter(|run| run.label == label).collect();
                let valid: Vec<_> = of.iter().filter_map(|run| run.valid()).collect();
                let median = |value: &dyn Fn(&&crate::child::Measurement) -> f64| {
                    summary(&valid.iter().map(value).collect::<Vec<_>>())
                };
                Some(Row {
                    label: label.to_owned(),
                    seconds: median(&|m| m.seconds)?,
                    bytes: valid.first()?.bytes,
                    cpu_seconds: median(&|m| m.cpu_seconds)?.median,
                    extra_mib: median(&|m| extra_mib(m))?.median,
                    ratio: ours.filter(|&ours| ours != label).and_then(|ours| {
                        summary(&paired_ratios(&runs, ours, label, |m| m.seconds))
                    }),
                    invalid: of.len() - valid.len(),
                })
            })
            .collect();
        rows.sort_by(|a, b| a.seconds.median.total_cmp(&b.seconds.median));
        rows
    }

    /// The tables, as a section of a Markdown page.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut out = String::new();
        let m = &self.machine;
        let _ = writeln!(out, "## {} UTC, revision {}\n", self.date, self.revision);
        let _ = writeln!(
            out,
            "{} cores of {}{}, {:.0} GiB of memory, Linux {}, {} on {}, transparent huge pages `{}`, {}.\n",
            m.cores,
            m.cpu,
            if m.virtual_machine { " (virtual machine)" } else { "" },
            m.memory_bytes as f64 / f64::from(1 << 30),
            m.kernel,
            m.file_system,
            m.device,
            m.huge_pages,
            m.rustc,
        );
        let _ = writeln!(out, "    {}\n", self.command);
        for (workload, state) in self.sections() {
            self.section(&mut out, &workload, state);
        }
        if !self.verdicts.is_empty() {
            let _ = writeln!(out, "### Targets\n");
            let _ =
                writeln!(out, "| workload | state | target | bound | median (min - max) | met |");
            let _ = writeln!(out, "|---|---|---|---|---|---|");
            for v in &self.verdicts {
                let found = v.found.map_or("not measured".to_owned(), |s| {
                    format!("{:.2} ({:.2} - {:.2})", s.median, s.min, s.max)
                });
                let met = match v.met {
                    Some(true) => "yes",
                    Some(false) => "**no**",
                    None => "-",
                };
                let _ = writeln!(
                    out,
                    "| {} | {} | {} | {} | {found} | {met} |",
                    v.workload,
                    v.state.name(),
                    v.what,
                    v.bound
                );
            }
            let _ = writeln!(out);
        }
        if !self.skipped.is_empty() {
            let _ = writeln!(out, "Not run:\n");
            for skipped in &self.skipped {
                let _ = writeln!(out, "- {skipped}");
            }
            let _ = writeln!(out);
        }
        out
    }

    fn section(&self, out: &mut String, workload: &str, state: CacheState) {
        let of = |run: &&Run| run.workload == workload && run.state == state;
        let runs: Vec<&Run> = self.runs.iter().filter(of).collect();
        let open = runs.iter().any(|run| run.op == Op::Open);
        let resident: Vec<f64> = runs.iter().map(|run| run.resident_before).collect();
        let busy: Vec<f64> = runs.iter().map(|run| run.others_busy).collect();
        let _ = writeln!(out, "### {workload}, {}\n", state.name());
        let rate = if open { "ms, median (min - max)" } else { "GB/s, median (min - max)" };
        let _ = writeln!(
            out,
            "| contender | {rate} | time against {OURS}: median [quartiles] (min - max) | CPU s/GB | extra MiB | runs |"
        );
        let _ = writeln!(out, "|---|---|---|---|---|---|");
        for row in self.rows(workload, state) {
            let gb = row.bytes as f64 / 1e9;
            let s = row.seconds;
            let (speed, cpu, extra) = if open {
                let ms = |seconds: f64| seconds * 1e3;
                let speed = format!("{:.1} ({:.1} - {:.1})", ms(s.median), ms(s.min), ms(s.max));
                (speed, "-".to_owned(), format!("{:.0}", row.extra_mib))
            } else {
                let speed = format!("{:.2} ({:.2} - {:.2})", gb / s.median, gb / s.max, gb / s.min);
                let bound = by_name(&row.label).is_some_and(|c| c.gives == Gives::Bound);
                let extra = if bound { "-".to_owned() } else { format!("{:.0}", row.extra_mib) };
                (speed, format!("{:.3}", row.cpu_seconds / gb), extra)
            };
            let ratio = row.ratio.map_or("-".to_owned(), |r| {
                format!("{:.2} [{:.2}, {:.2}] ({:.2} - {:.2})", r.median, r.q1, r.q3, r.min, r.max)
            });
            let not_counted = match row.invalid {
                0 => String::new(),
                n => format!(", {n} not counted"),
            };
            let _ = writeln!(
                out,
                "| {} | {speed} | {ratio} | {cpu} | {extra} | {}{not_counted} |",
                row.label, s.n
            );
        }
        let _ = writeln!(out);
        if let Some(resident) = summary(&resident) {
            let confirmed = runs.iter().filter(|run| run.state_confirmed).count();
            let _ = write!(
                out,
                "Page cache before the runs{}: {:.2} to {:.2}% resident, {confirmed} of {} confirmed {}. ",
                if open { " (headers)" } else { "" },
                resident.min * 100.0,
                resident.max * 100.0,
                runs.len(),
                state.name()
            );
        }
        let taken: Vec<f64> = runs.iter().filter_map(|run| run.taken_back).collect();
        if let Some(taken) = summary(&taken) {
            let _ = write!(
                out,
                "Free memory was idle: the hypervisor had taken back {:.0} to {:.0}% of what a run needs. ",
                taken.min * 100.0,
                taken.max * 100.0
            );
        }
        if let Some(busy) = summary(&busy) {
            let _ = writeln!(
                out,
                "Others used {:.0}% of the cores (median), {:.0}% at most.",
                busy.median * 100.0,
                busy.max * 100.0
            );
        }
        let returned: Vec<f64> = runs
            .iter()
            .filter_map(|run| Some(run.valid()?.returned_bytes? as f64 / f64::from(1 << 20)))
            .collect();
        if let Some(returned) = summary(&returned) {
            let _ = writeln!(
                out,
                "The kernel gave {:.0} MiB of free memory back to the hypervisor during a run (median), {:.0} at most.",
                returned.median, returned.max
            );
        }
        let _ = writeln!(out);
        let mut failures: Vec<String> = runs
            .iter()
            .filter_map(|run| Some(format!("{}: {}", run.label, run.error.as_ref()?)))
            .collect();
        failures.sort();
        failures.dedup();
        for failure in failures {
            let _ = writeln!(out, "- failed: {failure}");
        }
    }
}

/// The label that ratios are taken against: ours, on the workload's own operation.
fn ours_among<'a>(labels: &[&'a str]) -> Option<&'a str> {
    let base = |label: &str| by_name(label.split('/').next().unwrap_or(label));
    let ours = |label: &&&str| base(label).is_some_and(|c| is_ours(c) && c.name == OURS);
    labels.iter().filter(ours).max_by_key(|label| label.contains('/')).copied()
}
