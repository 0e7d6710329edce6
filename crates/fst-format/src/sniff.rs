//! What a file is that is no safetensors file, by its first bytes.

use crate::HeaderError;

/// Longest start of a file that is looked at, in bytes.
const LOOKED_AT: usize = 512;

/// Starts of files and what has them, with what to do about it.
const FORMATS: &[(&[u8], &str)] = &[
    (
        b"version https://git-lfs",
        "a Git LFS pointer, the file itself was not downloaded: `git lfs pull` fetches it",
    ),
    (b"GGUF", "a GGUF file"),
    (b"PK\x03\x04", "a zip archive, as PyTorch saves its checkpoints: convert it to safetensors"),
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (b"\0\x05\x16\x07", "an AppleDouble file, which macOS writes beside the real one"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
];

/// The format of a file whose header is refused for `error`; `read` gives its first bytes. `None` where it may be
/// a damaged safetensors file.
pub(crate) fn format_of(
    error: &HeaderError,
    read: impl FnOnce(&mut [u8]) -> Option<usize>,
) -> Option<&'static str> {
    // Others are about a header that was understood.
    if !matches!(
        error,
        HeaderError::TooShort { .. }
            | HeaderError::TooLarge { .. }
            | HeaderError::PastEnd { .. }
            | HeaderError::NotUtf8 { .. }
            | HeaderError::Json { .. }
    ) {
        return None;
    }
    let mut start = [0; LOOKED_AT];
    let len = read(&mut start)?;
    by_start(start.get(..len)?)
}

fn by_start(start: &[u8]) -> Option<&'static str> {
    // A length and the brace of a header, whatever comes then.
    if start.get(8) == Some(&b'{') && start.get(4..8) == Some(&[0; 4]) {
        return None;
    }
    if let Some((_, format)) = FORMATS.iter().find(|(magic, _)| start.starts_with(magic)) {
        return Some(format);
    }
    // Protocols of pickles; those of PyTorch put the opcode of a long number next.
    if matches!(start, [0x80, 2..=5, 0x8a | 0x95 | b'}' | b']' | b'c', ..]) {
        return Some("a pickle, as PyTorch once saved its checkpoints: convert it to safetensors");
    }
    let text = start.strip_prefix(b"\xef\xbb\xbf").unwrap_or(start).trim_ascii_start();
    let begins = |word: &[u8]| text.get(..word.len()).is_some_and(|b| b.eq_ignore_ascii_case(word));
    if begins(b"<!doctype html") || begins(b"<html") {
        return Some("an HTML page, as servers send in place of a file: download it again");
    }
    if begins(b"<?xml") {
        return Some("an XML document, as servers send in place of a file: download it again");
    }
    // A safetensors header of that length would be beyond the limit.
    if matches!(text, [b'{' | b'[', b'"' | b'{' | b'[' | b'\n' | b'\r' | b' ' | b'}' | b'\t', ..]) {
        return Some(
            "a JSON file; an index of a checkpoint has a name like *.safetensors.index.json",
        );
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_called_by_their_names() {
        for (start, named) in [
            (&b"version https://git-lfs.github.com/spec/v1\noid"[..], "Git LFS"),
            (b"GGUF\x03\0\0\0\0", "GGUF"),
            (b"PK\x03\x04\0\0\0\0\0\0", "PyTorch"),
            (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P", "PyTorch"),
            (b"\x1f\x8b\x08\0\0\0\0\0\0", "gzip"),
            (b"\0\x05\x16\x07\0\x02\0\0Mac OS X", "AppleDouble"),
            (b"\n <!DOCTYPE html><html>", "HTML"),
            (b"<?xml version=\"1.0\"?><Error>", "XML"),
            (b"\xef\xbb\xbf{\"a\": 1}", "JSON"),
            (b"{\n", "JSON"),
        ] {
            let format = by_start(start);
            assert!(format.is_some_and(|format| format.contains(named)), "{named}: {format:?}");
        }
        for start in
            [&b""[..], b"\0", b"\x80\x02\0\0\0\0\0\0{\"a\"", b"\x1f\x8b\0\0\0\0\0\0{", b"short"]
        {
            assert_eq!(by_start(start), None);
        }
    }
}
