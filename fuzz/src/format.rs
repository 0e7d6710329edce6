//! Entries for `fst-format`: the header decoder, a checkpoint's index, and which files of a folder are a
//! checkpoint.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use fst_format::{Checkpoint, Decoded, Dtype, HeaderDecoder, Layout, MAX_HEADER_LEN};
use safetensors::SafeTensors;
use tempfile::TempDir;

/// Decodes `file` as a whole and in steps, and checks what a header promises.
///
/// Panics where a promise is broken, or where the official parser refuses what we accept. (The
/// other direction is left to tests on stable: the official parser may overflow there, which a
/// fuzzer reports as a crash.)
pub fn decoder(file: &[u8]) {
    let Ok(decoder) = HeaderDecoder::new(file.len() as u64) else {
        assert!(file.len() < 8);
        return;
    };
    let whole = decoder.decode(file);
    let mut have = 0;
    let stepped = loop {
        match decoder.decode(&file[..have]) {
            Ok(Decoded::Need(range)) => {
                assert_eq!(range.start, have as u64);
                assert!(range.start < range.end && range.end <= file.len() as u64);
                assert!(range.end <= 8 + MAX_HEADER_LEN);
                have = range.end as usize;
            }
            other => break other,
        }
    };
    let header = match (whole, stepped) {
        (Ok(Decoded::Header(header)), Ok(Decoded::Header(stepped))) => {
            assert_eq!(header.len(), stepped.len());
            header
        }
        (Err(whole), Err(stepped)) => {
            assert_eq!(whole.to_string(), stepped.to_string());
            return;
        }
        (whole, stepped) => panic!("{whole:?} as a whole, {stepped:?} in steps"),
    };

    let mut covered = 0;
    for (i, tensor) in header.tensors().enumerate() {
        let range = tensor.data_range();
        assert_eq!(range.start, covered);
        covered = range.end;
        let bits: u128 = tensor.shape().iter().map(|&dim| dim as u128).product();
        let bits = if tensor.shape().contains(&0) { 0 } else { bits };
        assert_eq!(
            bits * u128::from(tensor.dtype().bits()),
            u128::from(range.end - range.start) * 8
        );
        let found = header.get(tensor.name()).map(|t| t.data_range());
        assert_eq!(found, Some(range), "tensor {i} is not found by its name");
    }
    assert_eq!(covered, header.data_len());
    assert_eq!(header.data_start() + covered, file.len() as u64);

    let official = SafeTensors::deserialize(file).expect("the official parser refuses");
    assert_eq!(official.len(), header.len());
}

/// A folder with two shards, `a` and `sub/b`, of tensors `x`, `y` and `z`, for indices over them.
pub struct IndexFolder {
    folder: TempDir,
}

impl IndexFolder {
    /// Writes the shards.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        write_shards(folder.path());
        Self { folder }
    }

    /// Opens `json` as the index of the folder.
    ///
    /// Panics where a checkpoint opens whose files are not those of the folder, or whose table is
    /// not theirs.
    pub fn checkpoint_index(&self, json: &[u8]) {
        let folder = self.folder.path();
        let index = folder.join("model.safetensors.index.json");
        // A file written over is flushed to storage by some file systems; a new one is not.
        let _ = fs::remove_file(&index);
        fs::write(&index, json).expect("the temporary folder takes files");
        let Ok(checkpoint) = Checkpoint::open(&index) else { return };
        for shard in checkpoint.shards() {
            let inside =
                shard.path().strip_prefix(folder).expect("a shard is outside of the folder");
            assert!(inside.components().all(|part| matches!(part, Component::Normal(_))));
            assert!(inside == Path::new("a") || inside == Path::new("sub/b"), "{inside:?}");
        }
        assert!((1..=3).contains(&checkpoint.tensors().len()));
        for tensor in checkpoint.tensors() {
            let found = checkpoint.get(tensor.name()).map(|t| t.file_range());
            assert_eq!(found, Some(tensor.file_range()));
            assert_eq!(tensor.byte_len(), 3);
        }
    }
}

/// Opens a folder with files of these names, one a line. A name that ends in `.json` is an index which
/// puts a tensor into the first file, any other a file with a tensor of its own.
///
/// Panics where a checkpoint opens that takes hidden files, files twice or files of another folder.
pub fn folder(names: &[u8]) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let usable = |name: &&[u8]| {
        !matches!(name, [] | [b'.'] | [b'.', b'.'])
            && name.len() < 256
            && !name.iter().any(|b| matches!(b, b'/' | 0))
    };
    let names: Vec<&OsStr> =
        names.split(|b| *b == b'\n').filter(usable).take(40).map(OsStr::from_bytes).collect();
    let first =
        names.iter().map(|name| name.to_string_lossy()).find(|name| !name.ends_with(".json"));
    let index = format!(
        "{{\"weight_map\":{{\"t\":{}}}}}",
        serde_json::json!(first.clone().unwrap_or_default())
    );
    for (at, name) in names.iter().enumerate() {
        let path = folder.path().join(name);
        let own = format!("t{at}");
        let tensor = if Some(name.to_string_lossy()) == first { "t" } else { &own };
        let file = file_of(&[tensor]);
        fs::write(path, if name.as_bytes().ends_with(b".json") { index.as_bytes() } else { &file })
            .expect("the temporary folder takes files");
    }
    let opened = Checkpoint::open(folder.path());
    match (&opened, Checkpoint::open(folder.path())) {
        (Ok(one), Ok(other)) => assert_eq!(one.shards().len(), other.shards().len()),
        (Err(one), Err(other)) => assert_eq!(one.to_string(), other.to_string()),
        (one, other) => panic!("{one:?}, then {other:?}"),
    }
    let Ok(checkpoint) = opened else { return };
    let mut taken = HashSet::new();
    for shard in checkpoint.shards() {
        let inside =
            shard.path().strip_prefix(folder.path()).expect("a shard is outside of the folder");
        assert!(
            names.iter().any(|name| inside == Path::new(name)),
            "{inside:?} is none of its files"
        );
        // An index may name any file.
        let hidden = inside.as_os_str().as_bytes().starts_with(b".");
        let index = names.iter().any(|name| name.as_bytes().ends_with(b".json"));
        assert!(!hidden || index, "{inside:?} is hidden");
        assert!(taken.insert(inside.to_owned()), "{inside:?} is taken twice");
    }
}

/// A file of tensors of three bytes.
fn file_of(names: &[&str]) -> Vec<u8> {
    let mut layout = Layout::new();
    for name in names {
        layout.tensor(*name, Dtype::U8, &[3]).expect("a sound declaration");
    }
    let mut writer = layout.write_to(Vec::new()).expect("a header");
    for _ in names {
        writer.write_tensor(&[0; 3]).expect("declared bytes");
    }
    writer.finish().expect("all bytes")
}

fn write_shards(folder: &Path) {
    fs::create_dir(folder.join("sub")).expect("a folder in it");
    for (file, names) in [("a", &["x", "y"][..]), ("sub/b", &["z"])] {
        fs::write(folder.join(file), file_of(names)).expect("a file in the folder");
    }
}
