//! Other loaders: each a Python process that stays, takes one line of JSON for each load, and
//! answers with one (`benches/peers/gpu_load.py`).

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::record::Record;

/// The loaders, and the folder under `site/` that holds the packages of each.
pub const PEERS: &[(&str, &str)] = &[
    ("safetensors-0.8.0", "safetensors-0.8.0"),
    ("safetensors-0.9-prefetch", "safetensors-0.9.0rc1"),
    ("fastsafetensors-0.5.0", "fastsafetensors-0.5.0"),
    ("instanttensor-0.2.2", "instanttensor-0.2.2"),
    ("runai-0.17.0", "runai-model-streamer-0.17.0"),
];

/// Where Python, the script and the packages are.
#[derive(Debug, Clone)]
pub struct Environment {
    /// The interpreter, with torch.
    pub python: PathBuf,
    /// `gpu_load.py`.
    pub script: PathBuf,
    /// One folder for each peer.
    pub site: PathBuf,
    /// What torch calls the device.
    pub device: String,
}

impl Environment {
    /// The peers whose packages are there.
    #[must_use]
    pub fn present(&self) -> Vec<&'static str> {
        let there = |(_, folder): &&(&str, &str)| self.site.join(folder).is_dir();
        PEERS.iter().filter(there).map(|(name, _)| *name).collect()
    }

    /// The command that runs a peer; without further arguments it takes loads from its input.
    #[must_use]
    pub fn command(&self, name: &str) -> Command {
        let folder = PEERS.iter().find(|(peer, _)| *peer == name).map_or(name, |(_, f)| f);
        let mut command = Command::new(&self.python);
        command.arg(&self.script).args(["--peer", name, "--device", &self.device]);
        command.env("PYTHONPATH", self.site.join(folder));
        command
    }
}

/// A peer's process.
#[derive(Debug)]
pub struct Peer {
    /// Its name.
    pub name: &'static str,
    child: Child,
    stdin: Option<ChildStdin>,
    answers: Receiver<String>,
    /// Why it takes no more loads.
    broken: Option<String>,
}

impl Peer {
    /// Starts the process. It imports and touches the device while others start;
    /// [`wait_until_ready`](Self::wait_until_ready) before the first load.
    ///
    /// # Errors
    /// A process that does not start.
    pub fn start(environment: &Environment, name: &'static str, log: &Path) -> Result<Self> {
        let stderr = std::fs::File::options().create(true).append(true).open(log)?;
        let mut child = environment
            .command(name)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .with_context(|| format!("start {}", environment.python.display()))?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().context("a child without output")?;
        let (send, answers) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                // Libraries print what they like; answers are objects.
                if line.starts_with('{') && send.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { name, child, stdin, answers, broken: None })
    }

    /// Waits for its imports. Whether it can load.
    pub fn wait_until_ready(&mut self, limit: Duration) -> bool {
        match self.answer(limit) {
            Ok(_) => true,
            Err(error) => {
                self.give_up(format!("{error:#}"));
                false
            }
        }
    }

    /// Why it takes no more loads.
    #[must_use]
    pub fn broken(&self) -> Option<&str> {
        self.broken.as_deref()
    }

    /// Loads the checkpoint in `path`; what came of it, errors included, goes into `record`.
    pub fn load(&mut self, path: &Path, limit: Duration, record: &mut Record) {
        match self.try_load(path, limit) {
            Ok(answer) => fill(record, &answer),
            Err(error) => {
                let error = format!("{error:#}");
                record.error = Some(error.clone());
                self.give_up(error);
            }
        }
    }

    fn try_load(&mut self, path: &Path, limit: Duration) -> Result<Value> {
        if let Some(broken) = &self.broken {
            bail!("not run again: {broken}");
        }
        let stdin = self.stdin.as_mut().context("its input is closed")?;
        writeln!(stdin, "{}", json!({ "path": path }))?;
        stdin.flush()?;
        self.answer(limit)
    }

    fn answer(&mut self, limit: Duration) -> Result<Value> {
        let line = match self.answers.recv_timeout(limit) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => bail!("no answer within {} s", limit.as_secs()),
            Err(RecvTimeoutError::Disconnected) => bail!("it ended; see its log"),
        };
        let answer: Value = serde_json::from_str(&line)?;
        match answer["error"].as_str() {
            Some(error) => bail!("{error}"),
            None => Ok(answer),
        }
    }

    fn give_up(&mut self, why: String) {
        self.broken.get_or_insert(why);
        let _ = self.child.kill();
    }
}

/// What a peer's answer says.
pub fn fill(record: &mut Record, answer: &Value) {
    record.seconds = answer["seconds"].as_f64().unwrap_or(0.0);
    record.bytes = answer["bytes"].as_u64().unwrap_or(0);
    record.sum = answer["sum"].as_str().map(str::to_owned);
    record.host_bytes = answer["host_bytes"].as_u64();
    record.detail = answer["detail"].clone();
}

impl Drop for Peer {
    fn drop(&mut self) {
        // End of input is its signal to leave; a library that hangs in its exit is ended.
        drop(self.stdin.take());
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(2) {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
