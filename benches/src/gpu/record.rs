//! One run as a line of JSON, and the file of them.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// One run of one contender.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Record {
    /// What was loaded and from where.
    pub workload: String,
    /// Who loaded it.
    pub contender: String,
    /// Contenders of the same round ran one after another.
    pub round: usize,
    /// The page-cache state that was wanted.
    pub state: String,
    /// The share of the files that was in the page cache before the run; `None` where the system
    /// does not tell.
    pub resident: Option<f64>,
    /// Whether `resident` confirms the state.
    pub confirmed: bool,
    /// From before the first open to the last tensor usable.
    pub seconds: f64,
    /// Bytes of tensors on the device afterwards.
    pub bytes: u64,
    /// Sum of the tensors' 64-bit words on the device, modulo 2^64, as text: JSON's numbers are
    /// too short.
    pub sum: Option<String>,
    /// Growth of the process's anonymous and shared memory during the load, in bytes: no less than
    /// what was pinned.
    pub host_bytes: Option<u64>,
    /// Why there is no figure.
    pub error: Option<String>,
    /// What else the contender tells.
    pub detail: Value,
}

impl Record {
    /// Bytes per second, in units of 1e9.
    #[must_use]
    pub fn gb_per_s(&self) -> f64 {
        if self.seconds > 0.0 { self.bytes as f64 / self.seconds / 1e9 } else { 0.0 }
    }

    /// Whether the run counts.
    #[must_use]
    pub fn counts(&self) -> bool {
        self.error.is_none() && self.confirmed && self.seconds > 0.0
    }
}

/// Where runs are written, each as soon as it is over.
#[derive(Debug)]
pub struct Log {
    file: File,
}

impl Log {
    /// Opens the file, behind what it holds.
    ///
    /// # Errors
    /// A file that cannot be opened.
    pub fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path);
        Ok(Self { file: file.with_context(|| format!("open {}", path.display()))? })
    }

    /// Writes a run, and tells it.
    ///
    /// # Errors
    /// A line that cannot be written.
    pub fn add(&mut self, record: &Record) -> Result<()> {
        let what = match &record.error {
            Some(error) => format!("FAILED: {error}"),
            None => format!("{:9.4} s {:8.2} GB/s", record.seconds, record.gb_per_s()),
        };
        let not_counted = if record.confirmed { "" } else { "  (state not confirmed)" };
        let Record { round, workload, contender, .. } = record;
        eprintln!("  {round:>2} {workload:<22} {contender:<24} {what}{not_counted}");
        writeln!(self.file, "{}", serde_json::to_string(record)?)?;
        Ok(())
    }
}

/// All complete lines of a file of runs.
///
/// # Errors
/// A file that cannot be read.
pub fn read(path: &Path) -> Result<Vec<Record>> {
    let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let lines = BufReader::new(file).lines();
    // A line that was cut off is no run.
    Ok(lines.map_while(Result::ok).filter_map(|line| serde_json::from_str(&line).ok()).collect())
}
