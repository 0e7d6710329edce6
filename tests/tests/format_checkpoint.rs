//! Checkpoints as users have them on disk: files, folders, indices, links; and those that are
//! refused. Files are written by the official crate.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use fst_format::{Checkpoint, Dtype, Error, HeaderError};
use safetensors::tensor::TensorView;

/// Writes a file of one `[len]` U8 tensor per name, each filled with its place in `names`.
fn write_file(path: &Path, names: &[&str], len: usize) {
    let data: Vec<Vec<u8>> = (0..names.len()).map(|i| vec![i as u8; len]).collect();
    let views = names.iter().zip(&data).map(|(name, data)| {
        (*name, TensorView::new(safetensors::Dtype::U8, vec![len], data).unwrap())
    });
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    fs::write(path, safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
}

fn write_index(path: &Path, map: &[(&str, &str)]) {
    let map: serde_json::Map<_, _> =
        map.iter().map(|(k, v)| ((*k).to_owned(), (*v).into())).collect();
    let json = serde_json::json!({"metadata": {"total_size": 1.5e9}, "weight_map": map});
    fs::write(path, json.to_string()).unwrap();
}

/// A folder with shards `model-0000x-of-00003.safetensors` of two tensors each.
fn three_shards() -> (tempfile::TempDir, Vec<(&'static str, &'static str)>) {
    let folder = tempfile::tempdir().unwrap();
    let shards = [
        ("model-00001-of-00003.safetensors", ["a.weight", "a.bias"]),
        ("model-00002-of-00003.safetensors", ["b.weight", "b.bias"]),
        ("model-00003-of-00003.safetensors", ["c.weight", "c.bias"]),
    ];
    let mut map = Vec::new();
    for (file, names) in shards {
        write_file(&folder.path().join(file), &names, 10);
        map.extend(names.map(|name| (name, file)));
    }
    (folder, map)
}

fn names(checkpoint: &Checkpoint) -> Vec<&str> {
    checkpoint.tensors().iter().map(|t| t.name()).collect()
}

fn open_err(path: impl AsRef<Path>) -> Error {
    let error = Checkpoint::open(path).expect_err("opened what should be refused");
    let line = error.to_string();
    assert!(!line.contains('\n'), "{line}");
    error
}

#[test]
fn one_file_has_the_official_readers_tensors_and_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("any-name");
    write_file(&path, &["x", "y", "z"], 5);
    let bytes = fs::read(&path).unwrap();
    let official = safetensors::SafeTensors::deserialize(&bytes).unwrap();

    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.tensors().len(), official.len());
    for tensor in checkpoint.tensors() {
        let range = tensor.file_range();
        let theirs = official.tensor(tensor.name()).unwrap();
        assert_eq!(&bytes[range.start as usize..range.end as usize], theirs.data());
        assert_eq!(tensor.shape(), theirs.shape());
        assert_eq!(tensor.dtype(), Dtype::U8);
        assert_eq!((tensor.byte_len(), tensor.elements()), (5, 5));
        assert_eq!(checkpoint.get(tensor.name()).unwrap().file_range(), range);
    }
    assert!(checkpoint.get("w").is_none());
    assert_eq!(checkpoint.byte_len(), 15);
    assert_eq!(checkpoint.metadata().get("format"), Some("pt"));

    let [shard] = checkpoint.shards() else { panic!() };
    assert_eq!(shard.path(), path);
    assert_eq!(shard.len(), bytes.len() as u64);
    assert_eq!(shard.data_start(), bytes.len() as u64 - 15);
}

#[test]
fn tensors_outlive_the_checkpoint() {
    let (folder, _) = three_shards();
    let tensor = Checkpoint::open(folder.path()).unwrap().get("b.bias").unwrap().clone();
    let handle = std::thread::spawn(move || (tensor.name().to_owned(), tensor.shard()));
    assert_eq!(handle.join().unwrap(), ("b.bias".to_owned(), 1));
}

#[test]
fn an_index_is_opened_by_its_folder_and_by_its_path() {
    let (folder, map) = three_shards();
    let index = folder.path().join("model.safetensors.index.json");
    write_index(&index, &map);
    // Not part of the checkpoint.
    write_file(&folder.path().join("consolidated.safetensors"), &["a.weight"], 1);
    for path in [folder.path(), &index] {
        let checkpoint = Checkpoint::open(path).unwrap();
        assert_eq!(checkpoint.shards().len(), 3);
        assert_eq!(checkpoint.tensors().len(), 6);
        for (name, file) in &map {
            let tensor = checkpoint.get(name).unwrap();
            assert_eq!(checkpoint.shards()[tensor.shard()].path(), folder.path().join(file));
            assert_eq!(tensor.path(), folder.path().join(file));
        }
    }
}

#[test]
fn an_index_in_the_working_folder_needs_no_folder_in_its_path() {
    let (folder, map) = three_shards();
    write_index(&folder.path().join("index.json"), &map);
    // A relative path of one component has the empty path as its parent.
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "bare_name_child", "--ignored"])
        .current_dir(folder.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
#[ignore = "run by an_index_in_the_working_folder_needs_no_folder_in_its_path in a folder of its own"]
fn bare_name_child() {
    assert_eq!(Checkpoint::open("index.json").unwrap().tensors().len(), 6);
}

#[test]
fn order_is_shard_then_offset() {
    let (folder, map) = three_shards();
    let from_folder = Checkpoint::open(folder.path()).unwrap();
    // The official writer sorts by name within a dtype.
    let expected = ["a.bias", "a.weight", "b.bias", "b.weight", "c.bias", "c.weight"];
    assert_eq!(names(&from_folder), expected);
    for pair in from_folder.tensors().windows(2) {
        assert!(
            pair[0].shard() < pair[1].shard()
                || pair[0].file_range().end <= pair[1].file_range().start
        );
    }
    let files: Vec<PathBuf> = map.iter().step_by(2).map(|(_, f)| folder.path().join(f)).collect();
    let listed = Checkpoint::open_all(files.iter().rev()).unwrap();
    assert_eq!(names(&listed)[0], "c.bias");
    assert_eq!(listed.byte_len(), 60);
}

#[test]
fn the_single_file_wins_over_an_index_beside_it() {
    let (folder, map) = three_shards();
    write_index(&folder.path().join("model.safetensors.index.json"), &map);
    write_file(&folder.path().join("model.safetensors"), &["only"], 3);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(names(&checkpoint), ["only"]);
    let notices = checkpoint.notices();
    assert!(matches!(notices, [fst_format::Notice::BesideIndex { .. }]), "{notices:?}");
    // Who names the file has chosen.
    let checkpoint = Checkpoint::open(folder.path().join("model.safetensors")).unwrap();
    assert!(checkpoint.notices().is_empty());
}

#[test]
fn tensors_that_the_index_does_not_list_are_loaded_too() {
    let (folder, map) = three_shards();
    let index = folder.path().join("model.safetensors.index.json");
    write_index(&index, &map[1..]);
    assert_eq!(Checkpoint::open(&index).unwrap().tensors().len(), 6);
    // Unless no entry leads to their file.
    write_index(&index, &map[2..]);
    assert_eq!(Checkpoint::open(&index).unwrap().tensors().len(), 4);
}

#[test]
fn a_hugging_face_cache_opens_through_its_links() {
    let (shards, map) = three_shards();
    let cache = tempfile::tempdir().unwrap();
    let blobs = cache.path().join("blobs");
    let snapshot = cache.path().join("snapshots/0123abcd");
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    let index = shards.path().join("model.safetensors.index.json");
    write_index(&index, &map);
    for (i, item) in fs::read_dir(shards.path()).unwrap().enumerate() {
        let item = item.unwrap();
        let blob = format!("{i:064x}");
        fs::rename(item.path(), blobs.join(&blob)).unwrap();
        symlink(Path::new("../../blobs").join(&blob), snapshot.join(item.file_name())).unwrap();
    }
    for path in [&snapshot, &snapshot.join("model.safetensors.index.json")] {
        let checkpoint = Checkpoint::open(path).unwrap();
        assert_eq!(checkpoint.tensors().len(), 6);
        assert!(checkpoint.shards().iter().all(|s| s.path().starts_with(&snapshot)));
    }
    // A single blob has no extension.
    let shard = snapshot.join(map[0].1);
    let blob = snapshot.join(fs::read_link(&shard).unwrap());
    assert_eq!(Checkpoint::open(blob).unwrap().tensors().len(), 2);
}

#[test]
fn links_may_leave_but_entries_may_not() {
    let (folder, map) = three_shards();
    let inner = folder.path().join("inner");
    fs::create_dir(&inner).unwrap();
    let index = inner.join("model.safetensors.index.json");
    let absolute = folder.path().join(map[0].1);
    let up = format!("../{}", map[0].1);
    let round = format!("x/../../{}", map[0].1);
    for entry in [&up, absolute.to_str().unwrap(), &round, "..", "/", "", "..\\a"] {
        write_index(&index, &[("a.weight", entry)]);
        match open_err(&index) {
            Error::OutsideFolder { tensor, entry: found, .. } => {
                assert_eq!((tensor.as_str(), found.as_str()), ("a.weight", entry));
            }
            other => panic!("{entry}: {other:?}"),
        }
    }
    symlink(&absolute, inner.join("s")).unwrap();
    write_index(&index, &[("a.weight", "./s")]);
    assert_eq!(Checkpoint::open(&index).unwrap().tensors().len(), 2);
    // A subfolder is inside.
    fs::create_dir(inner.join("sub")).unwrap();
    fs::rename(&absolute, inner.join("sub/s")).unwrap();
    write_index(&index, &[("a.weight", "sub/s"), ("a.bias", "sub//./s")]);
    assert_eq!(Checkpoint::open(&index).unwrap().tensors().len(), 2);
}

#[test]
fn missing_shards_are_named() {
    let (folder, map) = three_shards();
    let index = folder.path().join("model.safetensors.index.json");
    write_index(&index, &map);
    fs::remove_file(folder.path().join(map[2].1)).unwrap();
    match open_err(folder.path()) {
        Error::MissingShard { shard, tensor, .. } => {
            assert_eq!(shard, folder.path().join(map[2].1));
            assert!(tensor.starts_with("b."));
        }
        other => panic!("{other:?}"),
    }
    fs::remove_file(&index).unwrap();
    match open_err(folder.path()) {
        Error::IncompleteSet { missing, .. } => assert_eq!(missing, map[2].1),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_name_in_two_shards_is_refused() {
    let (folder, map) = three_shards();
    let third = folder.path().join(map[4].1);
    write_file(&third, &["c.weight", "a.bias"], 10);
    match open_err(folder.path()) {
        Error::RepeatedTensor { tensor, first, second } => {
            assert_eq!(tensor, "a.bias");
            assert_eq!(first, folder.path().join(map[0].1));
            assert_eq!(second, third);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_index_that_disagrees_with_its_shards_is_refused() {
    let (folder, mut map) = three_shards();
    let index = folder.path().join("model.safetensors.index.json");
    map[0].1 = map[5].1;
    write_index(&index, &map);
    match open_err(&index) {
        Error::NotInShard { tensor, shard, found, .. } => {
            assert_eq!(tensor, "a.weight");
            assert_eq!(shard, folder.path().join(map[5].1));
            assert_eq!(found, Some(folder.path().join(map[1].1)));
        }
        other => panic!("{other:?}"),
    }
    map[0] = ("nowhere", map[1].1);
    write_index(&index, &map);
    match open_err(&index) {
        Error::NotInShard { tensor, found, .. } => {
            assert_eq!((tensor.as_str(), found), ("nowhere", None));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_index_says_who_owns_a_tensor() {
    use fst_format::{Notice, OpenOptions};
    let (folder, mut map) = three_shards();
    let index = folder.path().join("model.safetensors.index.json");
    let overlay = "model-overlay.safetensors";
    write_file(&folder.path().join(overlay), &["a.weight", "new"], 7);
    map[0].1 = overlay;
    write_index(&index, &map);
    let checkpoint = Checkpoint::open(&index).unwrap();
    let tensor = checkpoint.get("a.weight").unwrap();
    assert_eq!((tensor.byte_len(), tensor.path()), (7, &*folder.path().join(overlay)));
    assert_eq!((checkpoint.tensors().len(), checkpoint.byte_len()), (7, 5 * 10 + 2 * 7));
    let [
        Notice::Superseded { tensor, count: 1, .. },
        Notice::Unlisted { tensor: new, count: 1, .. },
    ] = checkpoint.notices()
    else {
        panic!("{:?}", checkpoint.notices())
    };
    assert_eq!((tensor.as_str(), new.as_str()), ("a.weight", "new"));
    // What no entry names may be there once only.
    write_file(&folder.path().join(overlay), &["a.weight", "new"], 7);
    write_file(&folder.path().join(map[5].1), &["c.weight", "c.bias", "new"], 10);
    assert!(matches!(open_err(&index), Error::RepeatedTensor { tensor, .. } if tensor == "new"));
    // What is missing may be left out, and no copy stands in for it.
    write_file(&folder.path().join(overlay), &["other"], 7);
    write_file(&folder.path().join(map[5].1), &["c.weight", "c.bias"], 10);
    let found = |error| matches!(error, Error::NotInShard { found: Some(_), .. });
    assert!(found(open_err(&index)));
    let checkpoint = OpenOptions::new().allow_missing(true).open(&index).unwrap();
    assert!(checkpoint.get("a.weight").is_none() && checkpoint.get("other").is_some());
    let missing = |notice: &Notice| matches!(notice, Notice::Missing { tensor, count: 1, .. } if tensor == "a.weight");
    assert!(checkpoint.notices().iter().any(missing), "{:?}", checkpoint.notices());
    // A byte order mark does no harm.
    let text = fs::read_to_string(&index).unwrap();
    fs::write(&index, format!("\u{feff}{text}")).unwrap();
    assert!(OpenOptions::new().allow_missing(true).open(&index).is_ok());
}

#[test]
fn malformed_indices_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let index = folder.path().join("x.index.json");
    for text in [
        "",
        "[]",
        "{}",
        r#"{"weight_map": []}"#,
        r#"{"weight_map": {"a": 1}}"#,
        r#"{"weight_map": {"a": "b"}} x"#,
        r#"{"weight_map": {"a": "b"}, "weight_map": {"a": "b"}}"#,
        r#"{"weight_map": {"a": "b"}"#,
    ] {
        fs::write(&index, text).unwrap();
        assert!(matches!(open_err(&index), Error::IndexJson { .. }), "{text}");
    }
    fs::write(&index, "[".repeat(1 << 20)).unwrap();
    assert!(matches!(open_err(&index), Error::IndexJson { .. }));
    let bomb = format!("{{\"x\": {}", "[".repeat(1 << 20));
    fs::write(&index, bomb).unwrap();
    assert!(matches!(open_err(&index), Error::IndexJson { .. }));
    fs::write(&index, r#"{"weight_map": {}}"#).unwrap();
    assert!(matches!(open_err(&index), Error::EmptyIndex { .. }));
    write_file(&folder.path().join("b"), &["a"], 10);
    write_file(&folder.path().join("c"), &["d"], 10);
    for other in ["b", "c"] {
        fs::write(&index, format!(r#"{{"weight_map": {{"a": "b", "\u0061": "{other}"}}}}"#))
            .unwrap();
        assert!(matches!(open_err(&index), Error::RepeatedInIndex { .. }), "{other}");
    }
    fs::write(&index, b"{\"\xff\": 1}").unwrap();
    assert!(matches!(open_err(&index), Error::IndexNotUtf8 { offset: 2, .. }));
}

#[test]
fn folders_without_one_checkpoint_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    assert!(matches!(open_err(folder.path()), Error::NoCheckpoint { .. }));
    write_file(&folder.path().join("a.safetensors"), &["a"], 1);
    assert_eq!(names(&Checkpoint::open(folder.path()).unwrap()), ["a"]);
    write_file(&folder.path().join("b.safetensors"), &["b"], 1);
    match open_err(folder.path()) {
        Error::Ambiguous { files, .. } => assert_eq!(files, ["a.safetensors", "b.safetensors"]),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_no_file_is_refused_without_blocking() {
    assert!(matches!(Checkpoint::open_all([""; 0]), Err(Error::NoPaths)));
    let folder = tempfile::tempdir().unwrap();
    assert!(matches!(open_err(folder.path().join("none")), Error::Open { .. }));
    let pipe = folder.path().join("pipe.safetensors");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    assert!(matches!(open_err(&pipe), Error::NotAFile { .. }));
    assert!(matches!(open_err(folder.path()), Error::NotAFile { .. }));
    fs::remove_file(&pipe).unwrap();
    symlink("nowhere", &pipe).unwrap();
    for path in [folder.path(), &pipe] {
        let error = open_err(path);
        assert!(
            matches!(&error, Error::DanglingLink { target, .. } if target.as_os_str() == "nowhere")
        );
    }
}

#[test]
fn bad_headers_name_the_file_and_the_first_error_wins() {
    let (folder, map) = three_shards();
    for (_, file) in &map[2..] {
        let path = folder.path().join(file);
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    }
    for _ in 0..20 {
        match open_err(folder.path()) {
            Error::Header { path, source: HeaderError::Truncated { .. } } => {
                assert_eq!(path, folder.path().join(map[2].1));
            }
            other => panic!("{other:?}"),
        }
    }
    fs::write(folder.path().join(map[0].1), "short").unwrap();
    assert!(matches!(
        open_err(folder.path()),
        Error::Header { source: HeaderError::TooShort { file_len: 5 }, .. }
    ));
}

#[test]
fn a_file_cut_short_tells_by_how_much() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    write_file(&path, &["a", "b", "c"], 100);
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 150]).unwrap();
    let error = open_err(folder.path());
    let Error::Header { source: HeaderError::Truncated { tensor, file_len, needed, .. }, .. } =
        &error
    else {
        panic!("{error:?}")
    };
    assert_eq!((tensor.as_str(), *needed), ("b", whole.len() as u64));
    assert_eq!(*file_len, whole.len() as u64 - 150);
    let told = error.to_string();
    assert!(told.contains(" is 150 bytes shorter than its header says"), "{told}");
    assert!(told.contains("interrupted download"), "{told}");
}

#[test]
fn a_file_that_is_given_twice_is_told_from_two_with_the_same_tensors() {
    let folder = tempfile::tempdir().unwrap();
    let [a, b, link] = ["a", "b", "link"].map(|name| folder.path().join(name));
    write_file(&a, &["x"], 1);
    fs::copy(&a, &b).unwrap();
    symlink(&a, &link).unwrap();
    let open = |paths: [&Path; 2]| Checkpoint::open_all(paths).unwrap_err();
    let twice = open([&a, &a]);
    assert_eq!(twice.to_string(), format!("{}: given twice", a.display()));
    let linked = open([&a, &link]);
    let told = format!("{}: given twice, it is the same file as {}", link.display(), a.display());
    assert_eq!(linked.to_string(), told);
    assert!(matches!(open([&a, &b]), Error::RepeatedTensor { .. }));
}

#[test]
fn many_shards_open_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let all: Vec<String> = (0..100).map(|i| format!("t{i:03}")).collect();
    for (i, name) in all.iter().enumerate() {
        let file = format!("model-{:05}-of-00100.safetensors", i + 1);
        write_file(&folder.path().join(file), &[name], 1);
    }
    assert_eq!(names(&Checkpoint::open(folder.path()).unwrap()), all);
}

/// A check of the name before opening leaves a moment in which the name changes hands.
#[test]
fn a_pipe_that_takes_the_name_while_it_is_opened_is_not_waited_for() {
    use std::os::unix::ffi::OsStrExt;
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
    let folder = tempfile::tempdir().unwrap();
    let [file, pipe] = ["a.safetensors", "pipe"].map(|name| folder.path().join(name));
    write_file(&file, &["x"], 1);
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let stop = std::sync::Arc::new(AtomicBool::new(false));
    let names = [&pipe, &file].map(|p| std::ffi::CString::new(p.as_os_str().as_bytes()).unwrap());
    let stopped = stop.clone();
    let swapping = std::thread::spawn(move || {
        while !stopped.load(Relaxed) {
            let (here, [a, b]) = (libc::AT_FDCWD, names.each_ref().map(|name| name.as_ptr()));
            // SAFETY: both names are valid C strings.
            unsafe { libc::renameat2(here, a, here, b, libc::RENAME_EXCHANGE) };
        }
    });
    let (done, opened) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for _ in 0..20_000 {
            match Checkpoint::open(&file) {
                Ok(_) | Err(Error::NotAFile { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        done.send(())
    });
    let result = opened.recv_timeout(std::time::Duration::from_secs(120));
    stop.store(true, Relaxed);
    swapping.join().unwrap();
    result.expect("opening waits for a writer");
}
