//! Which files of a folder are its checkpoint.
//!
//! First match wins, the first two as in transformers' `from_pretrained`:
//!
//! 1. `model.safetensors`, even beside an index;
//! 2. `model.safetensors.index.json`;
//! 3. the only `*.safetensors.index.json`, as diffusers and variants (`model.fp16...`) name it;
//! 4. the only `*.safetensors` file, as adapters and diffusers name it;
//! 5. all files of one complete numbered set, `NAME-00001-of-0000N.safetensors`.
//!
//! Anything else is refused with the list of files: merging unrelated files would load weights
//! that nobody asked for.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use crate::Error;

/// What to open instead of a folder.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// These files, in order.
    Files(Vec<PathBuf>),
    /// The files that this index names.
    Index(PathBuf),
}

/// Looks at `folder` and applies the rules above.
pub(crate) fn choose(folder: &Path) -> Result<Choice, Error> {
    // `is_file` follows links, as transformers' check does: a dangling link is passed over.
    let single = folder.join("model.safetensors");
    if single.is_file() {
        return Ok(Choice::Files(vec![single]));
    }
    let index = folder.join("model.safetensors.index.json");
    if index.is_file() {
        return Ok(Choice::Index(index));
    }
    let open_error = |source| Error::Open { path: folder.to_owned(), source };
    let mut names = Vec::new();
    for item in std::fs::read_dir(folder).map_err(open_error)? {
        names.push(item.map_err(open_error)?.file_name());
    }
    names.sort_unstable();
    choose_among(folder, names)
}

/// Rules 3 to 5, on the sorted names of a folder. Names need not be UTF-8; those of numbered sets
/// are.
fn choose_among(folder: &Path, names: Vec<OsString>) -> Result<Choice, Error> {
    let (mut indices, mut files) = (Vec::new(), Vec::new());
    for name in names {
        if name.as_encoded_bytes().ends_with(b".safetensors.index.json") {
            indices.push(name);
        } else if name.as_encoded_bytes().ends_with(b".safetensors") {
            files.push(name);
        }
    }
    let ambiguous = |names: &[OsString]| {
        let files = names.iter().map(|name| name.to_string_lossy().into_owned()).collect();
        Error::Ambiguous { folder: folder.to_owned(), files }
    };
    match (&indices[..], &files[..]) {
        ([index], _) => return Ok(Choice::Index(folder.join(index))),
        ([], []) => {
            return Err(Error::NoCheckpoint { folder: folder.to_owned() });
        }
        ([], [file]) => return Ok(Choice::Files(vec![folder.join(file)])),
        ([], _) => {}
        _ => {
            return Err(ambiguous(&indices));
        }
    }

    let mut numbers = Vec::with_capacity(files.len());
    let mut set = None;
    for file in &files {
        match file.to_str().and_then(Numbered::parse) {
            Some(n) if *set.get_or_insert((n.prefix, n.of)) == (n.prefix, n.of) => {
                numbers.push((n.number, file));
            }
            _ => {
                return Err(ambiguous(&files));
            }
        }
    }
    numbers.sort_unstable();
    let total = set.map_or(0, |(_, of)| of);
    for (position, &(number, _)) in numbers.iter().enumerate() {
        let expected = position as u64 + 1;
        if number > expected {
            return Err(incomplete(folder, &files[0], expected));
        }
        if number < expected {
            return Err(ambiguous(&files));
        }
    }
    if (numbers.len() as u64) < total {
        return Err(incomplete(folder, &files[0], numbers.len() as u64 + 1));
    }
    if numbers.len() as u64 > total {
        return Err(ambiguous(&files));
    }
    Ok(Choice::Files(numbers.into_iter().map(|(_, file)| folder.join(file)).collect()))
}

fn incomplete(folder: &Path, sibling: &OsStr, number: u64) -> Error {
    let missing = sibling.to_str().and_then(Numbered::parse).map_or_else(String::new, |n| {
        format!("{}-{number:0width$}-of-{}.safetensors", n.prefix, n.of_text, width = n.width)
    });
    Error::IncompleteSet { folder: folder.to_owned(), missing }
}

/// The parts of `PREFIX-00001-of-00003.safetensors`.
struct Numbered<'n> {
    prefix: &'n str,
    number: u64,
    of: u64,
    of_text: &'n str,
    width: usize,
}

impl<'n> Numbered<'n> {
    fn parse(name: &'n str) -> Option<Self> {
        let stem = name.strip_suffix(".safetensors")?;
        let (rest, of_text) = stem.rsplit_once("-of-")?;
        let (prefix, number) = rest.rsplit_once('-')?;
        let digits = |text: &str| {
            let all = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            if all { text.parse().ok() } else { None }
        };
        Some(Self {
            prefix,
            number: digits(number)?,
            of: digits(of_text)?,
            of_text,
            width: number.len(),
        })
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
            &["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors", "c.safetensors"],
            &["m-00001-of-00002.safetensors", "n-00002-of-00002.safetensors"],
            &["m-00001-of-00002.safetensors", "m-00001-of-00003.safetensors"],
            &["m-1-of-2.safetensors", "m-01-of-2.safetensors"],
            &["m-0-of-2.safetensors", "m-1-of-2.safetensors"],
            &["m-1-of-1.safetensors", "m-2-of-1.safetensors"],
            &["a.safetensors.index.json", "b.safetensors.index.json"],
        ] {
            assert!(matches!(among(names), Err(Error::Ambiguous { .. })), "{names:?}");
        }
    }
}
