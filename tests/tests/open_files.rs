//! Checkpoints of files that are given open: without a name, removed, or behind a descriptor only.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod gpu_support;
mod load_support;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use fst::{Checkpoint, Destination, Device, Dtype, Error, Loader, OpenOptions, Reread};
use gpu_support::{assert_same_bytes, machine};
use load_support::{ENGINES, official};

/// A file in memory that has no name in any folder.
fn memory_file(bytes: &[u8]) -> File {
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"weights".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: the descriptor was just made, and is nobody else's.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(bytes).unwrap();
    file
}

#[test]
fn files_are_read_whatever_their_names() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let specs: Vec<fst_tests::Spec> = vec![
        ("large", safetensors::Dtype::F32, vec![300, 3000]),
        ("none", safetensors::Dtype::F32, vec![0, 3]),
        ("odd", safetensors::Dtype::BF16, vec![7, 11]),
    ];
    fst_tests::write(&path, &specs);
    let want = official(std::slice::from_ref(&path));
    let bytes = std::fs::read(&path).unwrap();
    let removed = File::open(&path).unwrap();
    let named = Loader::new().load(&Checkpoint::open(&path).unwrap()).unwrap();
    let narrow = Loader::new().dtype(Dtype::BF16).load(&Checkpoint::open(&path).unwrap()).unwrap();
    std::fs::remove_file(&path).unwrap();
    // Something else has the name now.
    std::fs::write(&path, b"other").unwrap();
    let mut memory = memory_file(&bytes);
    memory.seek(SeekFrom::Start(5)).unwrap();
    let mut position = memory.try_clone().unwrap();
    let _sim = machine();
    for (file, name) in [(removed, path.as_path()), (memory, Path::new("weights"))] {
        let checkpoint = Checkpoint::from_files([(name, file)]).unwrap();
        assert_eq!(checkpoint.shards()[0].path(), name);
        for engine in ENGINES {
            for device in [Device::host(), Device::cuda(0).unwrap()] {
                let loader = Loader::new().engine(engine).device(device);
                let mut tensors = loader.load(&checkpoint).unwrap();
                assert_eq!(tensors.len(), 3);
                tensors.iter().for_each(|tensor| assert_same_bytes(tensor, &named));
                let stream = loader.clone().dtype(Dtype::BF16).stream(&checkpoint).unwrap();
                stream.for_each(|tensor| assert_same_bytes(&tensor.unwrap(), &narrow));
                loader.update(&mut tensors, &checkpoint, Reread::OtherFiles).unwrap();
                assert_eq!(tensors.report().tensors, 0);
            }
        }
        let mut odd = vec![0; want["odd"].2.len()];
        Loader::new().load_into(&checkpoint, [("odd", Destination::from(&mut odd))]).unwrap();
        assert!(odd == want["odd"].2);
        let reader = Loader::new().reader(&checkpoint.clone());
        assert_same_bytes(&reader.tensor("odd").unwrap(), &named);
        // SAFETY: nobody writes to the file.
        let mapped = unsafe { Loader::new().map(&checkpoint) }.unwrap();
        mapped.iter().for_each(|tensor| assert_same_bytes(tensor, &named));
    }
    // Whoever shares the position finds it where it was.
    let mut next = [0];
    position.read_exact(&mut next).unwrap();
    assert_eq!(next[0], bytes[5]);
}

#[test]
fn what_is_no_checkpoint_or_changes_is_refused_by_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    fst_tests::write(&path, &[("t", safetensors::Dtype::F32, vec![64, 1024])]);
    let bytes = std::fs::read(&path).unwrap();
    let file = memory_file(&bytes);
    let checkpoint = Checkpoint::from_files([("shared", file.try_clone().unwrap())]).unwrap();
    Loader::new().load(&checkpoint).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    file.write_all_at(b"x", bytes.len() as u64 - 1).unwrap();
    let error = Loader::new().load(&checkpoint).unwrap_err();
    assert!(matches!(&error, Error::Io { source: fst::io::Error::Changed { .. }, .. }), "{error}");
    assert!(error.to_string().starts_with("shared: "), "{error}");

    let mut pipe = [0; 2];
    // SAFETY: the call fills the two numbers.
    assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
    // SAFETY: the descriptors were just made, and are nobody else's.
    let [out, _into] = pipe.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    let refused = |file: OwnedFd| {
        OpenOptions::new().from_files([("given", File::from(file))]).unwrap_err().to_string()
    };
    let error = refused(out);
    assert!(error.contains("given"), "{error}");
    let error = refused(memory_file(&bytes[..20]).into());
    assert!(error.contains("given"), "{error}");
    let error = Checkpoint::from_files([("a", memory_file(&bytes)), ("b", memory_file(&bytes))]);
    let error = error.unwrap_err().to_string();
    assert!(error.contains('a') && error.contains('b') && error.contains("\"t\""), "{error}");
    let none: [(&str, File); 0] = [];
    assert!(Checkpoint::from_files(none).is_err());
}
