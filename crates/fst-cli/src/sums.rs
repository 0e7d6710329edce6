//! `--verify`: sums in a file, as JSON or as the text that `fst sum` prints.

use std::path::Path;

use fst::{Checksum, Error, Manifest, ManifestError};

use crate::failure::Failure;

/// Reads the sums that a load is held to.
pub(crate) fn read(path: &Path) -> Result<Manifest, Failure> {
    let fail = |source| Failure::of(Error::Manifest { path: path.to_owned(), source });
    let bytes = std::fs::read(path).map_err(|error| fail(ManifestError::Read(error)))?;
    if bytes.trim_ascii_start().starts_with(b"{") {
        return Manifest::from_json(&bytes).map_err(fail);
    }
    manifest(&String::from_utf8_lossy(&bytes)).map_err(|what| Failure::at(path, what))
}

/// The sums of lines of digest, two spaces and name; `#` starts a remark.
fn manifest(text: &str) -> Result<Manifest, String> {
    let mut sums = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let sum = line.split_once("  ").and_then(|(digest, name)| {
            let digest = digest.parse().ok()?;
            Some(Checksum::new(name, digest))
        });
        sums.push(sum.ok_or_else(|| {
            format!(
                "not sums: line {number} is not a line that fst sum prints, and the file is not \
                 the JSON that fst sum -o FILE writes"
            )
        })?);
    }
    if sums.is_empty() {
        return Err("holds no sums; make them with fst sum -o FILE".to_owned());
    }
    Manifest::new(sums).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_sums_and_names_may_hold_anything() {
        let digest = "0123456789abcdef".repeat(4);
        let text = format!("{digest}  a.b\n\n# 2 tensors\n{digest}   two  words \n");
        let sums = manifest(&text).unwrap();
        let names: Vec<&str> = sums.iter().map(|sum| sum.name.as_str()).collect();
        assert_eq!(names, ["a.b", " two  words "]);
        assert!(sums.iter().all(|sum| sum.sha256.to_string() == digest));
    }

    #[test]
    fn other_text_is_refused_with_its_line() {
        let digest = "0123456789abcdef".repeat(4);
        for bad in ["x".to_owned(), digest.clone(), format!("{digest} one space"), "[1]".into()] {
            let told = manifest(&format!("{digest}  a\n{bad}\n")).unwrap_err();
            assert!(told.contains("line 2") && told.contains("fst sum -o FILE"), "{told}");
        }
        assert!(manifest("# nothing\n").unwrap_err().contains("no sums"));
        let twice = manifest(&format!("{digest}  a\n{digest}  a\n")).unwrap_err();
        assert!(twice.contains("\"a\""), "{twice}");
    }
}
