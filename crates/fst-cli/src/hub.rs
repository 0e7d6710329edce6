//! The Hugging Face hub: repositories in its local cache by their ids, and files held to the sums that it
//! recorded.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use fst::format::hub::{self, Recorded};
use fst::{Checkpoint, ShardFile};
use serde::Serialize;
use sha1::Sha1;
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
        // What has no slash is a name in this folder as a rule.
        Some(folder) if !id.contains('/') && !folder.is_dir() => Ok(path.to_owned()),
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
    /// `sha256`, or `git` for the id of a git object.
    kind: &'static str,
    /// What its bytes give, and what the hub recorded.
    sum: String,
    recorded: String,
}

#[derive(Serialize)]
struct Report {
    files: Vec<Checked>,
}

/// Hashes the files of a checkpoint whole and compares them with what the hub recorded.
pub(crate) fn check(checkpoint: &Checkpoint, progress: bool, json: bool) -> Result<(), Failure> {
    let shards = checkpoint.shards();
    let record = |shard: &ShardFile| match hub::recorded(shard.path()) {
        Some(Recorded::Sha256(sum)) => Ok(("sha256", sum)),
        Some(Recorded::GitObject(id)) => Ok(("git", id)),
        _ => {
            let what = "the hub recorded no sum of it: it is neither in the hub's cache nor where \
                        `hf download --local-dir` put it";
            Err(Failure::at(shard.path(), what))
        }
    };
    let recorded = shards.iter().map(record).collect::<Result<Vec<_>, _>>()?;
    let bytes = shards.iter().map(ShardFile::len).sum();
    let progress = Progress::new("summing", bytes, progress);
    let count = |bytes| progress.add(bytes);
    let sums = parallel::map(parallel::cores(), shards.len(), |at| {
        let (path, len) = (shards[at].path(), shards[at].len());
        match recorded[at].0 {
            "sha256" => hash::<Sha256>(path, Sha256::new(), &count),
            // As git names a blob.
            _ => hash(path, Sha1::new().chain_update(format!("blob {len}\0")), &count),
        }
    })?;
    drop(progress);
    let checked: Vec<Checked> = (shards.iter().zip(recorded).zip(sums))
        .map(|((shard, (kind, recorded)), sum)| Checked {
            path: shard.path().display().to_string(),
            kind,
            sum,
            recorded,
        })
        .collect();
    let bad: Vec<&Checked> = checked.iter().filter(|file| file.sum != file.recorded).collect();
    if let Some(first) = bad.first() {
        let others: Vec<&str> = bad[1..].iter().map(|file| &*file.path).collect();
        let others = match others.is_empty() {
            true => String::new(),
            false => format!("; and so are {}", others.join(", ")),
        };
        let Checked { path, kind, sum, recorded } = first;
        let what = format!(
            "is damaged: its {kind} sum is {sum}, and the hub recorded {recorded}; remove it and download \
             it again{others}"
        );
        return Err(Failure::at(Path::new(path), what));
    }
    if json {
        return text::print_json(&Report { files: checked }).map_err(Failure::output);
    }
    let line = |file: &Checked| format!("{}  {}\n", file.sum, visible(&file.path));
    let mut out: String = checked.iter().map(line).collect();
    if !text::is_quiet() {
        let files = counted(checked.len() as u64, "file");
        out += &format!("{}\n", styled(GOOD, format!("# {files} as the hub recorded")));
    }
    text::print(&out).map_err(Failure::output)
}

/// The sum of a whole file, in hexadecimal.
fn hash<D: Digest>(path: &Path, mut hash: D, count: &dyn Fn(u64)) -> Result<String, Failure> {
    let stop = interrupt::flag();
    let mut file = File::open(path).map_err(|error| Failure::at(path, error))?;
    let mut block = vec![0; BLOCK];
    loop {
        if stop.load(Ordering::Relaxed) {
            return Err(Failure::Interrupted);
        }
        match file.read(&mut block).map_err(|error| Failure::at(path, error))? {
            0 => return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            read => {
                hash.update(&block[..read]);
                count(read as u64);
            }
        }
    }
}
