//! Describes the machine that figures come from.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// What a reader needs to know to judge a figure. Unknown facts say so.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Machine {
    /// Processor model.
    pub cpu: String,
    /// Logical cores that this process may use.
    pub cores: usize,
    /// Whether the processor says that it is virtual.
    pub virtual_machine: bool,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Kernel release.
    pub kernel: String,
    /// Setting of transparent huge pages.
    pub huge_pages: String,
    /// File system of the data.
    pub file_system: String,
    /// Block device of the data, with its model where it has one.
    pub device: String,
    /// Compiler.
    pub rustc: String,
}

const UNKNOWN: &str = "unknown";

impl Machine {
    /// Describes this machine, with the storage under `data`.
    #[must_use]
    pub fn describe(data: &Path) -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let (file_system, device) = storage(data);
        Self {
            cpu: value_of(&cpuinfo, "model name").unwrap_or_else(|| std::env::consts::ARCH.into()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            virtual_machine: value_of(&cpuinfo, "flags")
                .is_some_and(|flags| flags.split(' ').any(|flag| flag == "hypervisor")),
            memory_bytes: memory_bytes(),
            kernel: read_trimmed("/proc/sys/kernel/osrelease"),
            huge_pages: read_trimmed("/sys/kernel/mm/transparent_hugepage/enabled"),
            file_system,
            device,
            rustc: output_of("rustc", &["-V"]).unwrap_or_else(|| UNKNOWN.into()),
        }
    }
}

/// The revision of the sources, with `+` when the work tree differs from it.
#[must_use]
pub fn revision() -> String {
    let Some(revision) = output_of("git", &["rev-parse", "--short=12", "HEAD"]) else {
        return UNKNOWN.into();
    };
    match output_of("git", &["status", "--porcelain", "--untracked-files=no"]) {
        Some(changes) if changes.is_empty() => revision,
        _ => revision + "+",
    }
}

/// Now, as `YYYY-MM-DD HH:MM` UTC.
#[must_use]
pub fn now() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (year, month, day) = civil(seconds / 86400);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}", seconds / 3600 % 24, seconds / 60 % 60)
}

/// Days since 1970 to a date, by the algorithm of Howard Hinnant's "chrono-compatible low-level date
/// algorithms" (`civil_from_days`), for days after the epoch.
fn civil(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let mp = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

/// Busy seconds of all cores together since boot, by `/proc/stat` (idle and waiting excluded).
#[must_use]
pub fn busy_seconds() -> Option<f64> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    let ticks: Vec<u64> =
        stat.lines().next()?.split_whitespace().skip(1).filter_map(|t| t.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; guest is part of user.
    let busy: u64 = ticks.iter().take(8).sum::<u64>() - ticks.get(3)? - ticks.get(4)?;
    // SAFETY: takes and returns integers only.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    Some(busy as f64 / per_second as f64)
}

fn memory_bytes() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = value_of(&meminfo, "MemTotal").unwrap_or_default();
    total.trim_end_matches(" kB").parse::<u64>().unwrap_or(0) * 1024
}

fn value_of(text: &str, key: &str) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with(key))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn read_trimmed(path: &str) -> String {
    fs::read_to_string(path).map_or_else(|_| UNKNOWN.into(), |text| text.trim().to_owned())
}

fn output_of(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}

/// File system type and device of the mount that holds `path`, by `/proc/self/mountinfo`.
fn storage(path: &Path) -> (String, String) {
    let unknown = || (UNKNOWN.to_owned(), UNKNOWN.to_owned());
    let Ok(path) = fs::canonicalize(path) else {
        return unknown();
    };
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut best: Option<(usize, String, String)> = None;
    for line in mounts.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let Some(dash) = fields.iter().position(|&f| f == "-") else {
            continue;
        };
        let (Some(&number), Some(&mount)) = (fields.get(2), fields.get(4)) else {
            continue;
        };
        let (Some(&kind), Some(&source)) = (fields.get(dash + 1), fields.get(dash + 2)) else {
            continue;
        };
        // A later mount on the same point hides the earlier one.
        if path.starts_with(mount) && best.as_ref().is_none_or(|b| mount.len() >= b.0) {
            best = Some((mount.len(), kind.to_owned(), device(number, source)));
        }
    }
    best.map_or_else(unknown, |(_, kind, device)| (kind, device))
}

fn device(number: &str, source: &str) -> String {
    let block = format!("/sys/dev/block/{number}");
    let model = ["device/model", "../device/model"]
        .iter()
        .find_map(|file| fs::read_to_string(format!("{block}/{file}")).ok());
    match model {
        Some(model) => format!("{source} ({})", model.trim()),
        None => source.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(20_513), (2026, 3, 1));
    }

    #[test]
    fn this_machine_has_cores_memory_and_a_file_system() {
        let machine = Machine::describe(Path::new("."));
        assert!(machine.cores >= 1);
        assert!(machine.memory_bytes > 1 << 28);
        assert_ne!(machine.kernel, UNKNOWN);
        assert_ne!(machine.file_system, UNKNOWN);
        assert!(busy_seconds().unwrap() > 0.0);
    }
}
