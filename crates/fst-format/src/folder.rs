//! Which files of a folder are its checkpoint.
//!
//! Names that begin with a dot are not seen. First match wins, the first two as in transformers'
//! `from_pretrained`:
//!
//! 1. `model.safetensors`, even beside an index;
//! 2. `model.safetensors.index.json`;
//! 3. the only index, `NAME.safetensors.index.json`; of a variant `NAME.safetensors.index.fp16.json` or
//!    `NAME.safetensors.fp16.index.json`;
//! 4. the only numbered set, `NAME-00001-of-0000N.safetensors`, numbered from 0 or 1, which must be
//!    complete; of a variant `NAME.fp16-00001-of-...` or `NAME-00001-of-0000N.fp16.safetensors`;
//! 5. the only `*.safetensors` file, as adapters and diffusers name it.
//!
//! From 3 on, a variant `NAME.fp16` is passed over where `NAME` itself is there, as diffusers does.
//! Anything else is refused with a list of what is there: merging unrelated files would load weights
//! that nobody asked for.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::{Component, Path, PathBuf};

use crate::Error;

/// What to open instead of a folder.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// These files, in order.
    Files(Vec<PathBuf>),
    /// The files that this index names.
    Index(PathBuf),
}

/// Looks at `folder` and applies the rules above. A repository's folder in the cache of the Hugging Face
/// hub, `models--ORG--NAME`, stands for its snapshot.
pub(crate) fn choose(folder: &Path) -> Result<Choice, Error> {
    match current_snapshot(folder)? {
        Some(snapshot) => choose_in(&snapshot),
        None => choose_in(folder),
    }
}

fn choose_in(folder: &Path) -> Result<Choice, Error> {
    // `is_file` follows links, as transformers' check does: a dangling link is passed over for an index.
    let single = folder.join("model.safetensors");
    if single.is_file() {
        return Ok(Choice::Files(vec![single]));
    }
    let index = folder.join("model.safetensors.index.json");
    if index.is_file() {
        return Ok(Choice::Index(index));
    }
    choose_among(folder, names(folder)?)
}

/// As [`choose`], of a folder that holds files of these names, sorted, and that is not local.
#[cfg(feature = "object-store")]
pub(crate) fn choose_by_names(folder: &Path, names: Vec<OsString>) -> Result<Choice, Error> {
    let has = |name: &str| names.iter().any(|of| of == name);
    if has("model.safetensors") {
        return Ok(Choice::Files(vec![folder.join("model.safetensors")]));
    }
    if has("model.safetensors.index.json") {
        return Ok(Choice::Index(folder.join("model.safetensors.index.json")));
    }
    choose_among(folder, names)
}

/// Names in a folder, sorted.
fn names(folder: &Path) -> Result<Vec<OsString>, Error> {
    let open_error = |source| Error::Open { path: folder.to_owned(), source };
    let mut names = Vec::new();
    for item in std::fs::read_dir(folder).map_err(open_error)? {
        names.push(item.map_err(open_error)?.file_name());
    }
    names.sort_unstable();
    Ok(names)
}

/// The snapshot that a folder of the hub's cache stands for: the one that `refs/main` names, or the only
/// one. `None` for other folders.
pub(crate) fn current_snapshot(folder: &Path) -> Result<Option<PathBuf>, Error> {
    let snapshots = folder.join("snapshots");
    if !folder.join("refs").is_dir() && !folder.join("blobs").is_dir() || !snapshots.is_dir() {
        return Ok(None);
    }
    // Its contents are not to be trusted with more than a name.
    let main = std::fs::read_to_string(folder.join("refs/main")).unwrap_or_default();
    let mut parts = Path::new(main.trim()).components();
    if let (Some(Component::Normal(name)), None) = (parts.next(), parts.next())
        && snapshots.join(name).is_dir()
    {
        return Ok(Some(snapshots.join(name)));
    }
    let mut there = names(&snapshots)?;
    there.retain(|name| !is_hidden(name) && snapshots.join(name).is_dir());
    match &there[..] {
        [only] => Ok(Some(snapshots.join(only))),
        _ => {
            let snapshots = there.iter().map(|name| name.to_string_lossy().into_owned()).collect();
            Err(Error::NoSnapshot { folder: folder.to_owned(), snapshots })
        }
    }
}

/// How many files of other formats are named.
const OTHERS: usize = 3;

/// Whether a file holds weights in another format, or a part of a download, by its name.
fn is_other(name: &str) -> bool {
    let ends = [".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".incomplete"];
    ends.iter().any(|end| name.ends_with(end))
}

fn is_hidden(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b".")
}

/// Whether a file is an index by its name: `*.index.json`, `*.index.VARIANT.json` or `index.json`.
pub(crate) fn is_index(name: &str) -> bool {
    name == "index.json" || name.ends_with(".json") && name.contains(".index.")
}

/// The files of one checkpoint in a folder.
#[derive(Default)]
struct Candidate {
    index: Option<OsString>,
    single: Option<OsString>,
    /// The numbered sets, by how many files they say that they have: their numbers and names.
    sets: BTreeMap<u64, Vec<(u64, OsString)>>,
}

/// Rules 3 to 5, on the sorted names of a folder. Names need not be UTF-8; those of numbered sets and
/// indices are.
fn choose_among(folder: &Path, names: Vec<OsString>) -> Result<Choice, Error> {
    let others = names.iter().map(|name| name.to_string_lossy()).filter(|name| is_other(name));
    let others: Vec<String> = others.take(OTHERS).map(Cow::into_owned).collect();
    let candidates = candidates(names);
    let choices = |rank: fn(&Candidate) -> bool| {
        candidates.values().filter(move |candidate| rank(candidate)).collect::<Vec<_>>()
    };
    let ambiguous = || {
        let files = candidates.values().flat_map(Candidate::described).collect();
        Err(Error::Ambiguous { folder: folder.to_owned(), files })
    };
    let indices = choices(|candidate| candidate.index.is_some());
    if let [Candidate { index: Some(index), .. }] = &indices[..] {
        return Ok(Choice::Index(folder.join(index)));
    }
    let sets = choices(|candidate| !candidate.sets.is_empty());
    let singles = choices(|candidate| candidate.single.is_some());
    match (&indices[..], &sets[..], &singles[..]) {
        ([], [], []) => Err(Error::NoCheckpoint { folder: folder.to_owned(), others }),
        ([], [Candidate { sets, single: None, .. }], _) if sets.len() == 1 => {
            let Some((&of, files)) = sets.first_key_value() else { return ambiguous() };
            match complete(of, files) {
                Completeness::Complete => {
                    Ok(Choice::Files(files.iter().map(|(_, file)| folder.join(file)).collect()))
                }
                Completeness::Missing(number) => Err(incomplete(folder, &files[0].1, number)),
                Completeness::NoSet => ambiguous(),
            }
        }
        ([], [], [Candidate { single: Some(file), .. }]) => {
            Ok(Choice::Files(vec![folder.join(file)]))
        }
        _ => ambiguous(),
    }
}

/// The checkpoints of a folder by their names without number and extension, less the variants of others.
fn candidates(names: Vec<OsString>) -> BTreeMap<Vec<u8>, Candidate> {
    let mut all: BTreeMap<Vec<u8>, Candidate> = BTreeMap::new();
    for name in names.into_iter().filter(|name| !is_hidden(name)) {
        if let Some(stem) = name.to_str().and_then(index_stem) {
            all.entry(stem.into_bytes()).or_default().index = Some(name);
        } else if let Some(numbered) = name.to_str().and_then(Numbered::parse) {
            let candidate = all.entry(numbered.stem().into_bytes()).or_default();
            let (number, of) = (numbered.number, numbered.of);
            candidate.sets.entry(of).or_default().push((number, name));
        } else if let Some(stem) = name.as_encoded_bytes().strip_suffix(b".safetensors") {
            let stem = stem.to_vec();
            all.entry(stem).or_default().single = Some(name);
        }
    }
    for candidate in all.values_mut() {
        candidate.sets.values_mut().for_each(|files| files.sort_unstable());
    }
    // What follows the dot begins with a letter: `qwen2.5` is no variant of `qwen2`.
    let is_variant = |stem: &[u8]| {
        let dots = (0..stem.len()).filter(|&at| stem[at] == b'.');
        dots.into_iter().any(|at| {
            stem.get(at + 1).is_some_and(u8::is_ascii_alphabetic) && all.contains_key(&stem[..at])
        })
    };
    let variants: Vec<Vec<u8>> = all.keys().filter(|stem| is_variant(stem)).cloned().collect();
    all.retain(|stem, _| !variants.contains(stem));
    all
}

impl Candidate {
    /// The checkpoints that it may be, for a message.
    fn described(&self) -> Vec<String> {
        let named = |name: &OsString| name.to_string_lossy().into_owned();
        let sets =
            self.sets.values().flat_map(|files| files.first().map(|file| (file, files.len())));
        let sets = sets.map(|((_, first), count)| match count {
            1 => named(first),
            _ => format!("{} and {} more of its set", named(first), count - 1),
        });
        let singles = self.index.iter().chain(&self.single).map(named);
        singles.chain(sets).collect()
    }
}

/// Whether a numbered set is all there.
enum Completeness {
    Complete,
    /// The first number that is not there.
    Missing(u64),
    /// Numbers that make no set, as where one is there twice.
    NoSet,
}

/// Looks at the sorted numbers of a set that says it has `of` files: `1..=of`, `0..of` or `0..=of`.
fn complete(of: u64, files: &[(u64, OsString)]) -> Completeness {
    let (Some(&(first, _)), Some(&(last, _))) = (files.first(), files.last()) else {
        return Completeness::NoSet;
    };
    if last > of || files.windows(2).any(|pair| pair[0].0 == pair[1].0) {
        return Completeness::NoSet;
    }
    let from = first.min(1);
    let past = if from == 1 || last == of { of + 1 } else { of };
    let mut expected = from;
    for &(number, _) in files {
        if number != expected {
            return Completeness::Missing(expected);
        }
        expected += 1;
    }
    if expected < past { Completeness::Missing(expected) } else { Completeness::Complete }
}

fn incomplete(folder: &Path, sibling: &OsStr, number: u64) -> Error {
    let missing = sibling.to_str().and_then(Numbered::parse).map_or_else(String::new, |n| {
        let Numbered { prefix, of_text, variant, width, .. } = n;
        format!("{prefix}-{number:0width$}-of-{of_text}{variant}.safetensors")
    });
    Error::IncompleteSet { folder: folder.to_owned(), missing }
}

/// The name of the checkpoint, with its variant, of which this is the index.
fn index_stem(name: &str) -> Option<String> {
    let (base, rest) = name.split_once(".safetensors.")?;
    let rest = rest.strip_suffix("json")?;
    // `index.`, `index.VARIANT.` or `VARIANT.index.`
    let variant = rest.strip_prefix("index.").or_else(|| rest.strip_suffix("index."))?;
    match variant.strip_suffix('.') {
        None => Some(base.to_owned()),
        Some(variant) => Some(format!("{base}.{variant}")),
    }
}

/// The parts of `PREFIX-00001-of-00003.VARIANT.safetensors`.
struct Numbered<'n> {
    prefix: &'n str,
    number: u64,
    of: u64,
    of_text: &'n str,
    /// With its dot; empty where there is none, or the prefix has it.
    variant: &'n str,
    width: usize,
}

impl<'n> Numbered<'n> {
    fn parse(name: &'n str) -> Option<Self> {
        let stem = name.strip_suffix(".safetensors")?;
        let (rest, of) = stem.rsplit_once("-of-")?;
        let (of_text, variant) = of.split_at(of.find('.').unwrap_or(of.len()));
        let (prefix, number) = rest.rsplit_once('-')?;
        let digits = |text: &str| {
            let all = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            // No set has as many files as there are numbers.
            if all { text.parse().ok().filter(|number: &u64| *number < u64::MAX) } else { None }
        };
        let (number, of, width) = (digits(number)?, digits(of_text)?, number.len());
        Some(Self { prefix, number, of, of_text, variant, width })
    }

    /// The name of the checkpoint, with its variant.
    fn stem(&self) -> String {
        format!("{}{}", self.prefix, self.variant)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn among(names: &[&str]) -> Result<Vec<String>, Error> {
        let mut names: Vec<OsString> = names.iter().map(OsString::from).collect();
        names.sort_unstable();
        choose_among(Path::new("/m"), names).map(|choice| {
            let paths = match choice {
                Choice::Files(files) => files,
                Choice::Index(index) => vec![index],
            };
            paths.iter().map(|p| p.file_name().unwrap().to_str().unwrap().to_owned()).collect()
        })
    }

    #[test]
    fn only_files_and_only_indices_are_taken() {
        assert_eq!(among(&["a.safetensors", "config.json"]).unwrap(), ["a.safetensors"]);
        let index = "diffusion.safetensors.index.json";
        assert_eq!(among(&["a.safetensors", index, "b.safetensors"]).unwrap(), [index]);
        assert!(matches!(among(&["config.json"]), Err(Error::NoCheckpoint { .. })));
        let error = among(&["config.json", "model.gguf", "pytorch_model.bin"]).unwrap_err();
        assert!(
            error
                .to_string()
                .ends_with("; it holds model.gguf, pytorch_model.bin, which are not safetensors")
        );
        // An index of another format says nothing about safetensors files.
        assert!(matches!(
            among(&["pytorch_model.bin.index.json"]),
            Err(Error::NoCheckpoint { .. })
        ));
    }

    #[test]
    fn complete_numbered_sets_are_taken_in_order() {
        let set: Vec<String> = (1..=11).map(|i| format!("m-{i:05}-of-00011.safetensors")).collect();
        let names: Vec<&str> = set.iter().map(String::as_str).collect();
        assert_eq!(among(&names).unwrap(), set);
        // Unpadded numbers sort wrongly as text.
        let set: Vec<String> = (1..=11).map(|i| format!("m-{i}-of-11.safetensors")).collect();
        let names: Vec<&str> = set.iter().map(String::as_str).collect();
        assert_eq!(among(&names).unwrap(), set);
    }

    #[test]
    fn sets_begin_with_0_or_1_and_stand_beside_single_files() {
        for set in [
            &["m-0-of-2.safetensors", "m-1-of-2.safetensors"][..],
            &["m-0-of-2.safetensors", "m-1-of-2.safetensors", "m-2-of-2.safetensors"],
            &["m-1-of-2.fp16.safetensors", "m-2-of-2.fp16.safetensors"],
            &["m.fp16-1-of-1.safetensors"],
        ] {
            assert_eq!(among(set).unwrap(), set);
            let beside =
                ["._m-1-of-2.safetensors", "adapter_model.safetensors", "consolidated.safetensors"];
            assert_eq!(among(&[set, &beside].concat()).unwrap(), set);
        }
    }

    #[test]
    fn variants_are_for_want_of_the_plain_one() {
        let index = "m.safetensors.index.json";
        for name in [
            "m.safetensors.index.fp16.json",
            "m.safetensors.fp16.index.json",
            "m.fp16.safetensors.index.json",
        ] {
            assert_eq!(among(&[name, "m.fp16-00001-of-00002.safetensors"]).unwrap(), [name]);
            assert_eq!(among(&[name, index]).unwrap(), [index]);
            assert_eq!(among(&[name, "m.safetensors"]).unwrap(), ["m.safetensors"]);
        }
        let both = ["m.fp16.safetensors", "m.safetensors"];
        assert_eq!(among(&both).unwrap(), ["m.safetensors"]);
    }

    #[test]
    fn incomplete_sets_name_the_missing_file() {
        for (have, missing) in [(&[1, 3][..], 2), (&[1, 2], 3), (&[2, 3], 1)] {
            let set: Vec<String> =
                have.iter().map(|i| format!("m-{i:05}-of-00003.safetensors")).collect();
            let names: Vec<&str> = set.iter().map(String::as_str).collect();
            match among(&names) {
                Err(Error::IncompleteSet { missing: found, .. }) => {
                    assert_eq!(found, format!("m-{missing:05}-of-00003.safetensors"));
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn names_that_are_not_utf8_are_names() {
        use std::os::unix::ffi::OsStringExt;
        let name = |start: &[u8]| OsString::from_vec([start, b".safetensors"].concat());
        let odd = name(b"m\xff");
        let choice = choose_among(Path::new("/m"), vec![odd.clone()]).unwrap();
        assert_eq!(choice, Choice::Files(vec![Path::new("/m").join(&odd)]));
        // Two names that look alike once what is wrong in them is replaced.
        let two = choose_among(Path::new("/m"), vec![name(b"m\xfe"), odd]);
        assert!(matches!(two, Err(Error::Ambiguous { .. })), "{two:?}");
    }

    #[test]
    fn unrelated_files_are_refused() {
        for names in [
            &["a.safetensors", "b.safetensors"][..],
            &["m-00001-of-00002.safetensors", "n-00002-of-00002.safetensors"],
            &["m-00001-of-00002.safetensors", "m-00001-of-00003.safetensors"],
            &["m-1-of-2.safetensors", "m-01-of-2.safetensors"],
            &["m.fp16.safetensors", "m.bf16.safetensors"],
            &["qwen2.safetensors", "qwen2.5.safetensors"],
            &["m-1-of-1.safetensors", "m.safetensors"],
            &["m-1-of-1.safetensors", "m-2-of-1.safetensors"],
            &["a.safetensors.index.json", "b.safetensors.index.json"],
        ] {
            assert!(matches!(among(names), Err(Error::Ambiguous { .. })), "{names:?}");
        }
    }
}
