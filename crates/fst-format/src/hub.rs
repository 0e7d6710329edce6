//! Repositories in the local cache of the Hugging Face hub, as its own tools lay it out
//! (<https://huggingface.co/docs/huggingface_hub/guides/manage-cache>). Nothing here uses the network.

use std::env;
use std::ffi::OsString;
#[cfg(feature = "object-store")]
use std::fmt;
use std::fs;
#[cfg(feature = "object-store")]
use std::io;
use std::path::{Component, Path, PathBuf};

use crate::Error;
use crate::folder::current_snapshot;

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
    cache_by(|name| env::var_os(name))
}

fn cache_by(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
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

/// The snapshot in the hub's [cache] of the model with this id, `org/name` or an old `name`. A revision is a branch or tag
/// that was downloaded by this name, or a whole commit; without one it is `main`, or the only snapshot that there is.
///
/// # Errors
///
/// [`Error::NotCached`], [`Error::NotAModel`], and [`Error::NoSnapshot`] where no revision is given and none of several
/// snapshots is `main`.
pub fn find(id: &str, revision: Option<&str>) -> Result<PathBuf, Error> {
    find_in(cache(), id, revision)
}

fn find_in(cache: Option<PathBuf>, id: &str, revision: Option<&str>) -> Result<PathBuf, Error> {
    let sound = folder(Path::new(""), id).ok_or_else(|| Error::NotAModel { id: id.to_owned() })?;
    let repository = cache.map(|cache| cache.join(sound));
    let found = match (&repository, revision) {
        (None, _) => None,
        (Some(repository), Some(revision)) => snapshot(repository, revision),
        (Some(repository), None) => match current_snapshot(repository) {
            Err(Error::NoSnapshot { snapshots, .. }) if snapshots.is_empty() => None,
            found => found?,
        },
    };
    let (id, revision) = (id.to_owned(), revision.map(str::to_owned));
    found.ok_or(Error::NotCached { id, revision, folder: repository })
}

/// The snapshot of a revision. The names in a path from elsewhere may not lead out of the repository.
fn snapshot(repository: &Path, revision: &str) -> Option<PathBuf> {
    let inside = |path: &str| {
        let mut parts = Path::new(path).components();
        !path.is_empty() && parts.all(|part| matches!(part, Component::Normal(_)))
    };
    if !inside(revision) {
        return None;
    }
    let named = fs::read_to_string(repository.join("refs").join(revision));
    let commit = named.as_ref().map_or(revision, |commit| commit.trim());
    let there = repository.join("snapshots").join(commit);
    (inside(commit) && there.is_dir()).then_some(there)
}

/// What `ORG/NAME[@REVISION][/PATH]` stands for in the cache; errors are about `url`.
#[cfg(feature = "object-store")]
pub(crate) fn cached(text: &str, url: &Path) -> Result<PathBuf, Error> {
    let missing = |why: &dyn fmt::Display| {
        let what = format!("HF_HUB_OFFLINE is set, and {why}");
        let source = io::Error::new(io::ErrorKind::NotFound, what);
        Error::Open { path: url.to_owned(), source }
    };
    let (org, name, revision, path) = fst_object::hub_parts(text);
    let snapshot = find(&format!("{org}/{name}"), Some(&revision));
    let snapshot = snapshot.map_err(|error| missing(&error))?;
    let there = snapshot.join(path);
    let inside = Path::new(path).components().all(|part| matches!(part, Component::Normal(_)));
    let lacks = "the snapshot in the hub's cache does not have it";
    if inside && there.exists() { Ok(there) } else { Err(missing(&lacks)) }
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
    fn the_cache_is_where_the_hubs_tools_have_it() {
        let place = |variables: &[(&str, &str)]| {
            cache_by(|name| {
                let found = variables.iter().find(|(of, _)| *of == name);
                found.map(|(_, value)| OsString::from(value))
            })
        };
        let mut variables = vec![("HOME", "/h")];
        for (next, expected) in [
            (("HF_TOKEN", ""), "/h/.cache/huggingface/hub"),
            (("XDG_CACHE_HOME", "/x"), "/x/huggingface/hub"),
            (("HF_HOME", "~/hf"), "/h/hf/hub"),
            (("HUGGINGFACE_HUB_CACHE", "/old"), "/old"),
            (("HF_HUB_CACHE", "/c"), "/c"),
        ] {
            variables.push(next);
            assert_eq!(place(&variables).unwrap(), Path::new(expected));
        }
        // What is empty is not set.
        assert_eq!(place(&[("HOME", ""), ("HF_HUB_CACHE", "")]), None);
        let error = find_in(None, "org/name", None).unwrap_err();
        assert!(error.to_string().ends_with("set HF_HUB_CACHE or HF_HOME"), "{error}");
    }

    #[test]
    #[cfg_attr(miri, ignore = "miri's isolation knows no files")]
    fn a_revision_is_a_name_or_a_whole_commit() {
        let cache = tempfile::tempdir().unwrap();
        let repository = cache.path().join("models--org--name");
        let (a, b) = ("a".repeat(40), "b".repeat(40));
        let find =
            |revision: Option<&str>| find_in(Some(cache.path().to_owned()), "org/name", revision);
        let missing = |revision: Option<&str>| match find(revision).unwrap_err() {
            error @ Error::NotCached { .. } => error.to_string(),
            other => panic!("{other}"),
        };
        // Nothing, and the folders of a download that came to nothing.
        assert!(missing(None).contains(repository.to_str().unwrap()));
        fs::create_dir_all(repository.join("snapshots")).unwrap();
        fs::create_dir_all(repository.join("refs/refs/pr")).unwrap();
        assert!(missing(None).ends_with("; `hf download org/name` downloads it"));
        // One snapshot is the current one, whatever it is; of two one must be `main`.
        let snapshot = |commit: &str| repository.join("snapshots").join(commit);
        fs::create_dir(snapshot(&a)).unwrap();
        assert_eq!(find(None).unwrap(), snapshot(&a));
        fs::create_dir(snapshot(&b)).unwrap();
        assert!(matches!(find(None), Err(Error::NoSnapshot { .. })));
        missing(Some("main"));
        for (name, commit) in [("main", &*b), ("refs/pr/1", &*a), ("out", "../.."), ("gone", "c")] {
            fs::write(repository.join("refs").join(name), commit).unwrap();
        }
        for (revision, found) in [("main", &b), ("refs/pr/1", &a), (&*a, &a)] {
            assert_eq!(find(Some(revision)).unwrap(), snapshot(found), "{revision}");
        }
        assert_eq!(find(None).unwrap(), snapshot(&b));
        for revision in [&a[..7], "out", "gone", "..", "", "/", "main/..", "v1"] {
            let error = missing(Some(revision));
            let command = format!("`hf download org/name --revision {revision}` downloads it");
            assert!(error.contains(&format!("{revision:?}")) && error.ends_with(&command));
        }
        for id in ["", "../name", "org/name/more"] {
            let error = find_in(Some(cache.path().to_owned()), id, None).unwrap_err();
            assert!(matches!(error, Error::NotAModel { .. }), "{error}");
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
