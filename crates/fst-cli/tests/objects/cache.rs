//! The local cache of `--cache`: what is in it is right and whole, whatever happens while it is written.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use super::MODEL;
use super::fixture::{Folder, Run, fst, names_in, run};
use super::server::{Fault, Server};

struct Case {
    folder: Folder,
    local: PathBuf,
    server: Server,
}

impl Case {
    fn new() -> Self {
        let folder = Folder::new();
        let local = folder.synth("model", &MODEL);
        let case = Self { folder, local, server: Server::start() };
        case.put("/m");
        case
    }

    fn put(&self, at: &str) {
        for name in names_in(&self.local) {
            self.server.put(&format!("{at}/{name}"), std::fs::read(self.local.join(name)).unwrap());
        }
    }

    fn cache(&self) -> PathBuf {
        self.folder.join("cache")
    }

    fn url(&self) -> String {
        self.server.origin() + "/m"
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = fst(args);
        command.arg("--cache").arg(self.cache());
        command
    }

    fn run(&self, args: &[&str]) -> Run {
        Run::of(self.command(args).output().unwrap())
    }

    /// Names in the cache.
    fn kept(&self) -> Vec<String> {
        if self.cache().exists() { names_in(&self.cache()) } else { Vec::new() }
    }

    fn shards(&self) -> Vec<String> {
        let mut names = names_in(&self.local);
        names.retain(|name| name.ends_with(".safetensors"));
        names
    }

    fn expected(&self) -> serde_json::Value {
        run(["sum", self.local.to_str().unwrap(), "--json"]).json()
    }

    /// Requests for shards since the log was cleared, by method.
    fn requests(&self) -> Vec<String> {
        let log = self.server.log();
        let of_shards = log.iter().filter(|r| r.target.contains("-of-0"));
        of_shards.map(|r| r.method.clone()).collect()
    }
}

#[test]
fn the_next_start_is_local_after_one_request() {
    let case = Case::new();
    let url = case.url();
    assert_eq!(case.run(&["sum", &url, "--json"]).json(), case.expected());
    let kept = case.kept();
    assert_eq!(kept.len(), 2, "{kept:?}");
    for name in &kept {
        let output = Command::new("sha256sum").arg(case.cache().join(name)).output().unwrap();
        let sum = String::from_utf8(output.stdout).unwrap();
        assert!(name.contains(sum.split(' ').next().unwrap()), "{name}: {sum}");
    }
    case.server.clear_log();
    assert_eq!(case.run(&["sum", &url, "--json"]).json(), case.expected());
    let report = case.run(&["load", &url, "--json"]).json();
    assert_ne!(report["engine"], "object");
    assert_eq!(report["remote"], serde_json::Value::Null);
    assert_eq!(case.requests(), ["GET"; 4]);
    assert_eq!(case.kept(), kept);
}

#[test]
fn another_version_is_another_copy_and_parts_are_none() {
    let case = Case::new();
    let url = case.url();
    assert_eq!(case.run(&["load", &url, "--select", "lm_head.weight", "--no-progress"]).status, 0);
    let mut before = case.kept();
    assert!(before.len() < 2, "{before:?}");
    assert_eq!(case.run(&["load", &url, "--no-progress"]).status, 0);
    before = case.kept();
    assert_eq!(before.len(), 2, "{before:?}");
    // One byte of the last tensor changes, and with it the ETag.
    let shard = case.local.join(&case.shards()[1]);
    let mut bytes = std::fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    case.put("/m");
    assert_eq!(case.run(&["sum", &url, "--json"]).json(), case.expected());
    assert_eq!(case.kept().len(), 3);
    // No copy of what is told apart by its time only, nor of what is not what a manifest says.
    let weak = Case::new();
    for name in weak.shards() {
        weak.server.fault(&format!("/m/{name}"), 0, usize::MAX, Fault::TimeOnly);
    }
    assert_eq!(weak.run(&["load", &weak.url(), "--no-progress"]).status, 0);
    assert_eq!(weak.kept(), [""; 0]);
    let sums = weak.folder.join("sums.json");
    run(["sum", weak.local.to_str().unwrap(), "-o", sums.to_str().unwrap()]);
    weak.put("/flipped");
    for name in weak.shards() {
        weak.server.fault(&format!("/flipped/{name}"), 1, usize::MAX, Fault::Flip);
    }
    let url = weak.server.origin() + "/flipped";
    let damaged = weak.run(&["load", &url, "--verify", sums.to_str().unwrap(), "--no-progress"]);
    assert_eq!(damaged.status, 1, "{}", damaged.stdout);
    assert_eq!(weak.kept(), [""; 0]);
}

#[test]
fn what_a_killed_process_left_is_removed() {
    let case = Case::new();
    let url = case.url();
    for name in case.shards() {
        let slow = Fault::Drip(20_000, Duration::from_millis(20));
        case.server.fault(&format!("/m/{name}"), 1, 1, slow);
    }
    let mut child = case.command(&["load", &url, "--no-progress"]).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while case.kept().is_empty() {
        assert!(
            Instant::now() < deadline && child.try_wait().unwrap().is_none(),
            "nothing written"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let left = case.kept();
    assert!(left.iter().all(|name| name.ends_with(".partial")), "{left:?}");
    assert_eq!(case.run(&["sum", &url, "--json"]).json(), case.expected());
    let kept = case.kept();
    assert!(kept.len() == 2 && kept.iter().all(|name| name.ends_with(".safetensors")), "{kept:?}");
}

#[test]
fn two_processes_at_once_make_one_copy() {
    let case = Case::new();
    let url = case.url();
    let children: Vec<_> = (0..3)
        .map(|_| {
            let mut command = case.command(&["sum", &url, "--json"]);
            command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
            command.spawn().unwrap()
        })
        .collect();
    for child in children {
        assert_eq!(Run::of(child.wait_with_output().unwrap()).json(), case.expected());
    }
    assert_eq!(case.kept().len(), 2, "{:?}", case.kept());
}

#[test]
fn storage_that_is_full_costs_the_copy_only() {
    let case = Case::new();
    // A limit on files stands for a full disk: the signal that comes with it is ignored.
    let mut command = Command::new("sh");
    let script = "trap '' XFSZ; ulimit -f 200; exec \"$@\"";
    command.args(["-c", script, "sh", env!("CARGO_BIN_EXE_fst"), "load", &case.url()]);
    command.arg("--no-progress").arg("--cache").arg(case.cache());
    let run = Run::of(command.output().unwrap());
    assert_eq!(run.status, 0, "{}", run.stderr);
    assert!(run.stderr.contains("not kept in the cache: http"), "{}", run.stderr);
    assert!(run.stderr.contains("File too large"), "{}", run.stderr);
    assert_eq!(case.kept(), [""; 0]);
}

#[test]
fn what_was_not_used_for_long_makes_room() {
    let case = Case::new();
    let url = case.url();
    let len = |name: &String| std::fs::metadata(case.local.join(name)).unwrap().len();
    let bytes: u64 = case.shards().iter().map(len).sum();
    let bound = (bytes + bytes / 4).to_string();
    assert_eq!(case.run(&["load", &url, "--no-progress"]).status, 0);
    let first = case.kept();
    case.put("/other");
    let other = case.server.origin() + "/other";
    let args = ["load", &other, "--no-progress", "--cache-size", &bound];
    let run = case.run(&args);
    assert_eq!((run.status, &*run.stderr), (0, ""));
    let second = case.kept();
    assert_eq!(second.len(), 2, "{second:?}");
    assert!(second.iter().all(|name| !first.contains(name)));
    // A bound that is too small for all of a checkpoint keeps a part, and says so.
    let small = (bytes * 3 / 4).to_string();
    let run = case.run(&["load", &url, "--no-progress", "--cache-size", &small]);
    assert!(run.status == 0 && run.stderr.contains("no room within"), "{}", run.stderr);
    assert!(case.kept().len() < 2);
}
