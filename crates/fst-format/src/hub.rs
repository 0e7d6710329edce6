//! Repositories in the local cache of the Hugging Face hub, as its own tools lay it out
//! (<https://huggingface.co/docs/huggingface_hub/guides/manage-cache>). Nothing here uses the network.

use std::env;
use std::ffi::OsString;
use std::fs;
#[cfg(feature = "object-store")]
use std::io;
#[cfg(feature = "object-store")]
use std::path::Component;
use std::path::{Path, PathBuf};

/// What the hub recorded of a file when it was downloaded.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Recorded {
    /// The SHA-256 of its bytes, in lower-case hexadecimal: of large files, which all but the smallest
    /// checkpoints are.
    Sha256(String),
    /// The id of its git object: of small files.
    GitObject(String),
}

/// The folder of the hub's cache: `HF_HUB_CACHE`, or `hub` in `HF_HOME`, or
/// `~/.cache/huggingface/hub`. `None` where no home is known.
#[must_use]
pub fn cache() -> Option<PathBuf> {
    let variable = |name: &str| env::var_os(name).filter(|value| !value.is_empty());
    let home = || {
        let cache = variable("XDG_CACHE_HOME").map(PathBuf::from);
        let cache = cache.or_else(|| Some(PathBuf::from(variable("HOME")?).join(".cache")));
        cache.map(|cache| cache.join("huggingface"))
    };
    let place = |name: &str| variable(name).map(|value| expanded(value.into(), variable("HOME")));
    match place("HF_HUB_CACHE").or_else(|| place("HUGGINGFACE_HUB_CACHE")) {
        Some(folder) => Some(folder),
        None => place("HF_HOME").or_else(home).map(|home| home.join("hub")),
    }
}

/// A path that begins with `~/`, in the home that this stands for.
fn expanded(path: PathBuf, home: Option<OsString>) -> PathBuf {
    match (path.strip_prefix("~"), home) {
        (Ok(rest), Some(home)) => PathBuf::from(home).join(rest),
        _ => path,
    }
}

/// The folder in `cache` of the model with this id, `org/name` or an old `name`, whether it is there or not; `None` for
/// what is no id. [`Checkpoint::open`](crate::Checkpoint::open) opens its current snapshot.
#[must_use]
pub fn folder(cache: &Path, id: &str) -> Option<PathBuf> {
    let sound = |part: &str| {
        let inside = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
            && part.chars().all(inside)
            && !part.contains("--")
    };
    match id.split_once('/') {
        Some((org, name)) if sound(org) && sound(name) => {
            Some(cache.join(format!("models--{org}--{name}")))
        }
        None if sound(id) => Some(cache.join(format!("models--{id}"))),
        _ => None,
    }
}

/// Whether the hub's own tools would use the network: not with `HF_HUB_OFFLINE`.
#[cfg(feature = "object-store")]
pub(crate) fn is_offline() -> bool {
    let value = env::var("HF_HUB_OFFLINE").unwrap_or_default();
    ["1", "ON", "YES", "TRUE"].contains(&&*value.to_ascii_uppercase())
}

/// What `ORG/NAME[@REVISION][/PATH]` stands for in the cache; errors are about `url`.
#[cfg(feature = "object-store")]
pub(crate) fn cached(text: &str, url: &Path) -> Result<PathBuf, crate::Error> {
    let missing = || {
        let what = "HF_HUB_OFFLINE is set, and the hub's cache does not have it";
        let source = io::Error::new(io::ErrorKind::NotFound, what);
        crate::Error::Open { path: url.to_owned(), source }
    };
    let (org, name, revision, path) = fst_object::hub_parts(text);
    let inside = |path: &Path| path.components().all(|part| matches!(part, Component::Normal(_)));
    let repository = cache().and_then(|cache| folder(&cache, &format!("{org}/{name}")));
    let repository = repository.ok_or_else(missing)?;
    let named = fs::read_to_string(repository.join("refs").join(&revision));
    let snapshot = named.as_ref().map_or(&*revision, |commit| commit.trim());
    let there = repository.join("snapshots").join(snapshot).join(path);
    let sound = [&*revision, snapshot, path].iter().all(|part| inside(Path::new(part)));
    if sound && there.exists() { Ok(there) } else { Err(missing()) }
}

/// What the hub recorded of the file at `path`: the name of the blob that it links to, in the cache; or
/// what a download into a folder noted below its `.cache/huggingface`. `None` where there is no record.
#[must_use]
pub fn recorded(path: &Path) -> Option<Recorded> {
    let link = fs::read_link(path).ok();
    let blob = link.filter(|link| link.parent().is_some_and(|folder| folder.ends_with("blobs")));
    let sum = match blob {
        Some(blob) => blob.file_name()?.to_str()?.to_owned(),
        None => {
            // The file may be a link itself; its folder is where it was put.
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
            let folder = folder.unwrap_or(Path::new(".")).canonicalize().ok()?;
            let path = folder.join(path.file_name()?);
            path.ancestors().skip(1).find_map(|folder| {
                let mut notes = folder.join(".cache/huggingface/download");
                notes.push(path.strip_prefix(folder).ok()?);
                notes.as_mut_os_string().push(".metadata");
                // The commit, the sum, and when that was.
                fs::read_to_string(notes).ok()?.lines().nth(1).map(str::to_owned)
            })?
        }
    };
    let hexadecimal = sum.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    match sum.len() {
        64 if hexadecimal => Some(Recorded::Sha256(sum)),
        40 if hexadecimal => Some(Recorded::GitObject(sum)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ids_have_folders() {
        let cache = Path::new("/c");
        let found = folder(cache, "meta-llama/Llama-2-7b.hf").unwrap();
        assert_eq!(found, Path::new("/c/models--meta-llama--Llama-2-7b.hf"));
        assert_eq!(folder(cache, "gpt2").unwrap(), Path::new("/c/models--gpt2"));
        for other in ["", "a/", "/a", "a/b/c", "../a", "a/..", "./a", "a--b/c", "a/b c", "~/a"] {
            assert_eq!(folder(cache, other), None, "{other}");
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "miri's isolation knows no files")]
    fn sums_are_those_of_blobs_and_notes() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let link = |name: &str, to: &str| {
            std::os::unix::fs::symlink(to, path(name)).unwrap();
            recorded(&path(name))
        };
        let (sum, git) = ("0123456789abcdef".repeat(4), "01234567".repeat(5));
        assert_eq!(link("a", &format!("../../blobs/{sum}")), Some(Recorded::Sha256(sum.clone())));
        assert_eq!(link("b", &format!("blobs/{git}")), Some(Recorded::GitObject(git.clone())));
        assert_eq!(link("c", &format!("other/{sum}")), None);
        assert_eq!(link("d", "blobs/x"), None);
        let notes = path(".cache/huggingface/download/sub");
        fs::create_dir_all(&notes).unwrap();
        fs::write(notes.join("m.safetensors.metadata"), format!("{git}\n{sum}\n1.5\n")).unwrap();
        fs::create_dir(path("other")).unwrap();
        assert_eq!(recorded(&path("other/m.safetensors")), None);
        assert_eq!(recorded(&path("sub/n.safetensors")), None);
        fs::create_dir(path("sub")).unwrap();
        assert_eq!(recorded(&path("sub/m.safetensors")), Some(Recorded::Sha256(sum)));
        std::os::unix::fs::symlink("sub", path("link")).unwrap();
        assert!(recorded(&path("link/m.safetensors")).is_some());
        let home = || Some(OsString::from("/home/me"));
        assert_eq!(expanded("~/hf".into(), home()), Path::new("/home/me/hf"));
        assert_eq!(expanded("~other/hf".into(), home()), Path::new("~other/hf"));
    }
}
