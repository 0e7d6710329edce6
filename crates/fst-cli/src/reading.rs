//! What `load` and `sum` have in common: a loader made of the command line and stopped by ctrl-C.

use std::collections::HashSet;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fst::format::Selection;
use fst::{CancelToken, Checkpoint, Error, Loader, Notice, OpenOptions, TensorInfo, VerifyError};

use crate::args::{Reading, Select};
use crate::failure::Failure;
use crate::hub;
use crate::interrupt;
use crate::text;

/// A loader that does what the command line says.
pub(crate) fn loader(reading: &Reading) -> Result<Loader, Failure> {
    let cancel = CancelToken::new();
    let mut loader = Loader::new()
        .device(reading.device().open()?)
        .engine(reading.engine)
        .check_memory(!reading.no_memory_check)
        .cancel(cancel.clone());
    if let Some(seconds) = reading.timeout {
        loader = loader.timeout(Duration::from_secs(seconds.into()));
    }
    loader = select(loader, &reading.select);
    interrupt::on_stop(move || cancel.cancel());
    Ok(loader)
}

/// The loader, for the chosen tensors.
pub(crate) fn select(loader: Loader, select: &Select) -> Loader {
    select.patterns.iter().fold(loader, |loader, pattern| loader.select(pattern.as_str()))
}

/// Opens the checkpoint that `paths` name together.
pub(crate) fn open(paths: &[PathBuf], options: &OpenOptions) -> Result<Checkpoint, Failure> {
    let paths = paths.iter().map(|path| hub::resolve(path)).collect::<Result<Vec<_>, _>>()?;
    options.open_all(&paths).map_err(Failure::of)
}

/// Opens a checkpoint, and warns on standard error of what may not be meant: tensors that are left out,
/// and a file that is taken in place of others.
pub(crate) fn open_and_warn(
    paths: &[PathBuf],
    options: &OpenOptions,
) -> Result<Checkpoint, Failure> {
    let checkpoint = open(paths, options)?;
    for notice in checkpoint.notices() {
        if !matches!(notice, Notice::Unlisted { .. }) {
            text::warn(&notice.to_string());
        }
    }
    Ok(checkpoint)
}

/// Refuses to write over what is read: a file of the checkpoint, by whatever name, or an index.
pub(crate) fn spare<'p>(
    checkpoint: &Checkpoint,
    paths: &[PathBuf],
    outputs: impl IntoIterator<Item = &'p Option<PathBuf>>,
) -> Result<(), Failure> {
    let place = |file: &Metadata| (file.dev(), file.ino());
    let shards = checkpoint.shards().iter().filter_map(|shard| shard.file_metadata().map(place));
    let given = paths.iter().filter_map(|path| Some(place(&path.metadata().ok()?)));
    let read: HashSet<(u64, u64)> = shards.chain(given).collect();
    for path in outputs.into_iter().flatten() {
        // That is standard output.
        if path.as_os_str() == "-" {
            continue;
        }
        let Ok(there) = path.metadata() else { continue };
        if read.contains(&place(&there)) || path.to_string_lossy().ends_with(".index.json") {
            return Err(Failure::at(path, "belongs to a checkpoint, and is not written over"));
        }
    }
    Ok(())
}

/// The tensors that match any of the patterns, or all where there are none. As with a load, each
/// pattern must match some.
pub(crate) fn selected(checkpoint: &Checkpoint, select: &Select) -> Result<Vec<TensorInfo>, Error> {
    let patterns = select.patterns.iter().map(|pattern| pattern.as_str());
    let selection = patterns.fold(Selection::new(), Selection::select);
    let planned = selection.resolve(checkpoint, &|_, _| false)?;
    Ok(planned.iter().map(|one| one.source().clone()).collect())
}

/// Why a load of `checkpoint` failed. Errors about a file start with its path; the others are about
/// what was asked of the checkpoint, and get the path that it was opened by.
pub(crate) fn failure(paths: &[PathBuf], checkpoint: &Checkpoint, error: &Error) -> Failure {
    if matches!(error, Error::Cancelled) {
        return Failure::Interrupted;
    }
    let message = match error {
        Error::Memory { needed, available, limit, .. } => format!(
            "needs {} of memory, and {} are available ({limit}); load a part with --select, --map it, \
             or give --no-memory-check",
            text::bytes(*needed),
            text::bytes(*available)
        ),
        Error::Verify(VerifyError::Mismatch { tensor, .. }) => {
            let file = checkpoint.get(tensor).map(|info| info.path().display().to_string());
            let file = file.unwrap_or_default();
            format!("{file}: {error}; fst sum tells which others differ")
        }
        error => error.to_string(),
    };
    let about = |path: &Path| message.starts_with(&format!("{}: ", path.display()));
    match paths.first() {
        Some(path) if !checkpoint.shards().iter().any(|shard| about(shard.path())) => {
            Failure::at(path, message)
        }
        _ => Failure::of(message),
    }
}
