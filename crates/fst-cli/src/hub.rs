//! The Hugging Face hub: repositories in its local cache by their ids, and files held to the sums that it
//! recorded.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use fst::Checkpoint;
use fst::format::hub::{self, Recorded};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::failure::Failure;
use crate::interrupt;
use crate::parallel;
use crate::progress::Progress;
use crate::text::{self, GOOD, counted, styled, visible};

/// Bytes of one read.
const BLOCK: usize = 4 << 20;

/// `path`, or the repository in the hub's cache whose id it is where there is no such file.
pub(crate) fn resolve(path: &Path) -> Result<PathBuf, Failure> {
    let cache = hub::cache();
    let id = path.to_str().filter(|_| path.symlink_metadata().is_err());
    let Some((id, cache)) = id.zip(cache) else { return Ok(path.to_owned()) };
    match hub::folder(&cache, id) {
        Some(folder) if folder.is_dir() => Ok(folder),
        Some(_) => Err(Failure::at(
            path,
            format!(
                "no such file or folder, and no model in the hub's cache {}: get it there by \
                 `hf download {id}`",
                cache.display()
            ),
        )),
        None => Ok(path.to_owned()),
    }
}

/// What became of one file.
#[derive(Serialize)]
struct Checked {
    path: String,
    /// What its bytes give, and what the hub recorded; null where it recorded no SHA-256.
    sha256: Option<String>,
    recorded: Option<String>,
}

#[derive(Serialize)]
struct Report {
    files: Vec<Checked>,
}

/// Hashes the files of a checkpoint whole and compares them with what the hub recorded.
pub(crate) fn check(
    paths: &[PathBuf],
    checkpoint: &Checkpoint,
    progress: bool,
    json: bool,
) -> Result<(), Failure> {
    let files: Vec<&Path> = checkpoint.shards().iter().map(|shard| shard.path()).collect();
    let recorded: Vec<Option<Recorded>> = files.iter().map(|path| hub::recorded(path)).collect();
    let sum_of = |at: usize| match recorded.get(at) {
        Some(Some(Recorded::Sha256(sum))) => Some(sum.clone()),
        _ => None,
    };
    if (0..files.len()).all(|at| sum_of(at).is_none()) {
        let what = "the hub recorded no SHA-256 of these files: they are neither in its cache nor where \
                    `hf download --local-dir` put them";
        return Err(Failure::at(paths.first().map_or(Path::new(""), |path| path), what));
    }
    let summed = |at: &usize| sum_of(*at).is_some();
    let bytes = (0..files.len()).filter(summed).map(|at| checkpoint.shards()[at].len()).sum();
    let progress = Progress::new("summing", bytes, progress);
    let stop = interrupt::flag();
    let sum = |at: usize| -> Result<Option<String>, Failure> {
        let Some(path) = sum_of(at).and(files.get(at)) else { return Ok(None) };
        let mut file = File::open(path).map_err(|error| Failure::at(path, error))?;
        let (mut hash, mut block) = (Sha256::new(), vec![0; BLOCK]);
        loop {
            if stop.load(Ordering::Relaxed) {
                return Err(Failure::Interrupted);
            }
            match file.read(&mut block).map_err(|error| Failure::at(path, error))? {
                0 => return Ok(Some(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())),
                read => {
                    hash.update(&block[..read]);
                    progress.add(read as u64);
                }
            }
        }
    };
    let sums = parallel::map(parallel::cores(), files.len(), sum)?;
    drop(progress);
    let checked: Vec<Checked> = (0..)
        .zip(files.iter().zip(sums))
        .map(|(at, (path, sha256))| Checked {
            path: path.display().to_string(),
            sha256,
            recorded: sum_of(at),
        })
        .collect();
    let bad = checked.iter().filter(|file| file.sha256 != file.recorded).collect::<Vec<_>>();
    if let Some(first) = bad.first() {
        let others = match bad.len() - 1 {
            0 => String::new(),
            others => format!("; {others} others differ too"),
        };
        let what = format!(
            "has the SHA-256 {}, and the hub recorded {}: it is damaged, download it again{others}",
            first.sha256.as_deref().unwrap_or_default(),
            first.recorded.as_deref().unwrap_or_default()
        );
        return Err(Failure::at(Path::new(&first.path), what));
    }
    if json {
        return text::print_json(&Report { files: checked }).map_err(Failure::output);
    }
    let line = |file: &Checked| match &file.sha256 {
        Some(sum) => format!("{sum}  {}\n", visible(&file.path)),
        None => format!("# no SHA-256 was recorded of {}\n", visible(&file.path)),
    };
    let mut out: String = checked.iter().map(line).collect();
    if !text::is_quiet() {
        let good = checked.iter().filter(|file| file.sha256.is_some()).count() as u64;
        let good = format!(
            "# {}, as the hub has {}",
            counted(good, "file"),
            if good == 1 { "it" } else { "them" }
        );
        out += &format!("{}\n", styled(GOOD, good));
    }
    text::print(&out).map_err(Failure::output)
}
