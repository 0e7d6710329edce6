//! Loads that are held to a manifest: right ones pass, every kind of wrong one is named.

#![allow(clippy::unwrap_used, clippy::panic)]

mod load_support;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use fst::{
    Checkpoint, Checksum, Digest, Dtype, Error, LoadReport, Loader, Manifest, Result, VerifyError,
};

use load_support::*;

/// The sums of what the official crate reads.
fn sums(paths: &[PathBuf]) -> Vec<Checksum> {
    let entry = |(name, (dtype, shape, data)): (String, (String, Vec<usize>, Vec<u8>))| {
        let mut sum = Checksum::new(name, Digest::of(&data));
        (sum.dtype, sum.shape) = (Some(dtype.parse().unwrap()), Some(shape));
        sum
    };
    official(paths).into_iter().map(entry).collect()
}

/// Each way to load, held to a manifest.
type Way = fn(&Loader, &Checkpoint) -> Result<Option<LoadReport>>;

const WAYS: [(&str, Way); 5] = [
    ("load", |loader, checkpoint| loader.load(checkpoint).map(|t| Some(t.report().clone()))),
    ("map", |loader, checkpoint| {
        // SAFETY: nobody changes the files while the tensors live.
        unsafe { loader.map(checkpoint) }.map(|t| Some(t.report().clone()))
    }),
    ("into", |loader, checkpoint| {
        let mut memory: Vec<(String, Vec<u8>)> = checkpoint
            .tensors()
            .iter()
            .map(|t| (t.name().to_owned(), vec![0; t.byte_len() as usize]))
            .collect();
        loader.load_into(checkpoint, memory.iter_mut().map(|(n, m)| (n, m))).map(Some)
    }),
    ("stream", |loader, checkpoint| {
        let mut stream = loader.clone().memory_budget(40 << 20).stream(checkpoint)?;
        let yielded = (&mut stream).collect::<Result<Vec<_>>>()?;
        assert_eq!(yielded.len(), checkpoint.tensors().len());
        Ok(stream.report())
    }),
    ("stream in order", |loader, checkpoint| {
        let loader = loader.clone().memory_budget(40 << 20).in_order(true);
        let mut stream = loader.stream(checkpoint)?;
        (&mut stream).collect::<Result<Vec<_>>>()?;
        Ok(stream.report())
    }),
];

fn flip(path: &Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x40], at).unwrap();
}

#[test]
fn what_is_right_passes_every_way() {
    let dir = tempfile::tempdir().unwrap();
    let paths = checkpoint(dir.path());
    let checkpoint = Checkpoint::open_all(&paths).unwrap();
    let manifest = Manifest::new(sums(&paths)).unwrap();
    let bytes = checkpoint.tensors().iter().map(|t| t.byte_len()).sum::<u64>();
    for engine in ENGINES {
        let loader = Loader::new().engine(engine).verify(manifest.clone());
        for (way, load) in WAYS {
            let report = load(&loader, &checkpoint).unwrap().unwrap();
            assert_eq!(report.stage("verify").unwrap().bytes, bytes, "{way}");
            assert!(report.stage("verify.hash").unwrap().seconds > 0.0, "{way}");
            let names: Vec<_> = report.stages.iter().map(|stage| stage.name).collect();
            assert!(names.iter().all(|n| names.iter().filter(|m| n == *m).count() == 1));
        }
    }
    // What `Tensor::checksum` says of loaded tensors is the same manifest, but for the order.
    let tensors = Loader::new().load(&checkpoint).unwrap();
    for tensor in &tensors {
        assert_eq!(manifest.get(tensor.name()), Some(&tensor.checksum().unwrap()));
    }
}

#[test]
fn a_flipped_bit_is_found_every_way_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let paths = checkpoint(dir.path());
    let manifest = Manifest::new(sums(&paths)).unwrap();
    let loader = Loader::new().verify(manifest.clone());
    let whole = Checkpoint::open_all(&paths).unwrap();
    for name in ["big", "huge", "scalar", "eight"] {
        let info = whole.get(name).unwrap();
        let range = info.file_range();
        for at in [range.start, range.end - 1] {
            flip(info.path(), at);
            let checkpoint = Checkpoint::open_all(&paths).unwrap();
            for (way, load) in WAYS {
                let error = load(&loader, &checkpoint).unwrap_err();
                let Error::Verify(VerifyError::Mismatch { tensor, expected, found }) = error else {
                    panic!("{way}: {error}");
                };
                assert_eq!((tensor.as_str(), expected), (name, manifest.get(name).unwrap().sha256));
                assert_ne!(expected, found);
            }
            flip(info.path(), at);
        }
    }
}

#[test]
fn names_dtypes_and_shapes_are_checked_before_reading() {
    let dir = tempfile::tempdir().unwrap();
    let paths = checkpoint(dir.path());
    let checkpoint = Checkpoint::open_all(&paths).unwrap();
    let all = sums(&paths);
    let check = |sums: Vec<Checksum>, loader: Loader, wrong: &dyn Fn(&VerifyError) -> bool| {
        let loader = loader.verify(Manifest::new(sums).unwrap());
        for (way, load) in WAYS {
            let error = load(&loader, &checkpoint).unwrap_err();
            assert!(matches!(&error, Error::Verify(e) if wrong(e)), "{way}: {error}");
        }
    };
    let without: Vec<_> = all.iter().filter(|sum| sum.name != "half").cloned().collect();
    check(
        without.clone(),
        Loader::new(),
        &|e| matches!(e, VerifyError::Unlisted { tensor } if tensor == "half"),
    );
    let mut more = all.clone();
    more.push(Checksum::new("gone", Digest::of(b"")));
    check(
        more,
        Loader::new(),
        &|e| matches!(e, VerifyError::Missing { tensor } if tensor == "gone"),
    );
    let mut typed = all.clone();
    typed.iter_mut().find(|s| s.name == "half").unwrap().dtype = Some(Dtype::BF16);
    check(
        typed,
        Loader::new(),
        &|e| matches!(e, VerifyError::Dtype { tensor, found: Dtype::F16, .. } if tensor == "half"),
    );
    let mut shaped = all.clone();
    shaped.iter_mut().find(|s| s.name == "half").unwrap().shape = Some(vec![7, 11]);
    check(
        shaped,
        Loader::new(),
        &|e| matches!(e, VerifyError::Shape { tensor, found, .. } if tensor == "half" && found == &[77]),
    );
    // What is not selected need not be listed, and may be listed.
    let loader = Loader::new().select("b*");
    loader.clone().verify(Manifest::new(without).unwrap()).load(&checkpoint).unwrap();
    loader.verify(Manifest::new(all).unwrap()).load(&checkpoint).unwrap();
}

#[test]
fn sums_are_of_what_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let paths = checkpoint(dir.path());
    let checkpoint = Checkpoint::open_all(&paths).unwrap();
    let loader = Loader::new().dtype(Dtype::F32).slice("huge", 1, 3..500);
    let tensors = loader.load(&checkpoint).unwrap();
    let sums = tensors.iter().map(|t| t.checksum().unwrap());
    let manifest = Manifest::new(sums).unwrap();
    loader.clone().verify(manifest.clone()).load(&checkpoint).unwrap();
    loader
        .verify(manifest)
        .memory_budget(64 << 20)
        .stream(&checkpoint)
        .unwrap()
        .for_each(|t| drop(t.unwrap()));
}
