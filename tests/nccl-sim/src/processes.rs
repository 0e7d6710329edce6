//! Communicators of several processes: the unique id names a folder, and what one rank sends another is
//! a file there until that one has taken it.

use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::world::Op;

/// The folder of a communicator whose ranks are processes.
#[derive(Clone, Debug)]
pub(crate) struct Processes(PathBuf);

/// Names the folder for communicators that this process makes the ids of. Each id has one below it.
const FOLDER: &str = "FST_SIM_NCCL_FOLDER";

/// Where in an id the folder's name begins, with its length in one byte.
const PLACE: usize = 8;

impl Processes {
    /// Puts a new folder into an id, if the environment says that ranks are processes.
    pub(crate) fn announce(id: &mut [u8; 128], number: u64) -> Option<()> {
        let folder = PathBuf::from(std::env::var_os(FOLDER)?);
        let folder = folder.join(format!("{}-{number}", std::process::id()));
        fs::create_dir(&folder).ok()?;
        let name = folder.as_os_str().as_bytes();
        id[PLACE] = u8::try_from(name.len()).ok()?;
        id[PLACE + 1..].get_mut(..name.len())?.copy_from_slice(name);
        Some(())
    }

    /// The folder that an id names, where this rank says that it has come.
    pub(crate) fn join(id: &[u8; 128], rank: u32) -> Option<Self> {
        let name = id[PLACE + 1..].get(..usize::from(id[PLACE]))?;
        let folder = PathBuf::from(std::ffi::OsString::from_vec(name.to_vec()));
        fs::write(folder.join(format!("rank-{rank}")), []).ok()?;
        Some(Self(folder))
    }

    /// How many ranks have come.
    pub(crate) fn here(&self, ranks: u32) -> usize {
        (0..ranks).filter(|rank| self.0.join(format!("rank-{rank}")).exists()).count()
    }

    fn message(&self, op: &str, from: u32, to: u32, number: u64) -> PathBuf {
        self.0.join(format!("{op}-{from}-{to}-{number}"))
    }

    /// Moves the bytes of one half of a transfer as far as they go; whether it is done. `sent` holds the
    /// receivers whose message is written. `None` if sizes differ or files fail.
    pub(crate) fn run(
        &self,
        (rank, ranks): (u32, u32),
        (op, number): (Op, u64),
        memory: &mut [u8],
        sent: &mut Vec<u32>,
    ) -> Option<bool> {
        let (name, source, receivers): (_, _, Vec<u32>) = match op {
            Op::Send { to } => ("send", rank, vec![to]),
            Op::Recv { from } => ("send", from, vec![rank]),
            Op::Broadcast { root } => {
                ("broadcast", root, (0..ranks).filter(|r| *r != root).collect())
            }
        };
        if source != rank {
            let message = self.message(name, source, rank, number);
            if !message.exists() {
                return Some(false);
            }
            let bytes = fs::read(&message).ok().filter(|bytes| bytes.len() == memory.len())?;
            memory.copy_from_slice(&bytes);
            fs::remove_file(message).ok()?;
            return Some(true);
        }
        for to in receivers.iter().filter(|to| !sent.contains(to)).copied().collect::<Vec<_>>() {
            write(&self.message(name, rank, to, number), memory)?;
            sent.push(to);
        }
        // The sender's memory is its own again once all have taken their messages.
        Some(!receivers.iter().any(|to| self.message(name, rank, *to, number).exists()))
    }
}

/// Writes a file that others see whole or not at all.
fn write(path: &Path, bytes: &[u8]) -> Option<()> {
    let unfinished = path.with_extension("unfinished");
    fs::write(&unfinished, bytes).ok()?;
    fs::rename(unfinished, path).ok()
}
