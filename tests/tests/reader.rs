//! A session for reads out of order, held to loads of the same.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};

use fst::{Checkpoint, Destination, Dtype, Error, Loader, Request, SelectError};
use fst_tests::{crowded_checkpoint, misaligned_checkpoint};

#[test]
fn reads_of_any_size_are_those_of_a_load() {
    let dir = tempfile::tempdir().unwrap();
    let mut paths = crowded_checkpoint(dir.path());
    let odd = tempfile::tempdir().unwrap();
    paths.push(odd.path().join("misaligned.safetensors"));
    let misaligned = paths.last().unwrap();
    misaligned_checkpoint(misaligned);
    let checkpoint = Checkpoint::open_all(&paths).unwrap();
    for loader in [
        Loader::new(),
        Loader::new().dtype(Dtype::F32),
        Loader::new().slice("huge", 1, 3..700).slice("a", 0, 7..9),
    ] {
        let loaded = loader.load(&checkpoint).unwrap();
        let reader = loader.reader(&checkpoint);
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while let Some(wanted) = loaded.iter().nth(next.fetch_add(1, Ordering::Relaxed))
                    {
                        let want = wanted.bytes().unwrap();
                        let planned = reader.planned(wanted.name()).unwrap();
                        assert_eq!(
                            (planned.byte_len() as usize, planned.shape()),
                            (want.len(), wanted.shape())
                        );
                        let mut bytes = vec![0xee; want.len()];
                        reader.read(wanted.name(), &mut bytes).unwrap();
                        assert!(bytes == want, "{}", wanted.name());
                        let tensor = reader.tensor(wanted.name()).unwrap();
                        assert!(tensor.bytes().unwrap() == want, "{}", wanted.name());
                        assert_eq!(tensor.dtype(), wanted.dtype());
                    }
                });
            }
        });
    }
}

#[test]
fn requests_cut_convert_and_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open_all(crowded_checkpoint(dir.path())).unwrap();
    // Whatever the loader selects.
    let reader = Loader::new().select("t9").reader(&checkpoint);
    let [rows, columns] = [checkpoint.get("huge").unwrap().shape()[0], 2051];
    for (dim, range) in
        [(0, 5..9), (0, 0..rows), (1, 1..2), (1, 40..2040), (1, 0..columns), (0, 3..3)]
    {
        let request = Request::new("huge").slice(dim, range.clone());
        let loader = Loader::new().request([request.clone()]);
        for (request, loader) in [
            (request.clone().dtype(Dtype::F32), loader.clone().dtype(Dtype::F32)),
            (request.named("part"), loader),
        ] {
            let loaded = loader.load(&checkpoint).unwrap();
            let wanted = loaded.get("huge").unwrap();
            let tensor = reader.tensor(request).unwrap();
            assert!(tensor.bytes().unwrap() == wanted.bytes().unwrap(), "{dim} {range:?}");
            assert_eq!(tensor.shape(), wanted.shape());
        }
    }
    assert_eq!(reader.tensor(Request::new("t1").named("one")).unwrap().name(), "one");
    let error = reader.read("none", &mut vec![0]).unwrap_err();
    assert!(matches!(&error, Error::UnknownTensor { .. }), "{error}");
    let error = reader.read("t1", &mut vec![0]).unwrap_err();
    assert!(matches!(&error, Error::DestinationLength { expected: 4, found: 1, .. }), "{error}");
    let error = reader.read("t1", Destination::elements(&mut [0f32])).unwrap_err();
    assert!(matches!(&error, Error::WrongDtype { .. }), "{error}");
    let error = reader.tensor(Request::new("t1").slice(0, 0..9)).unwrap_err();
    assert!(matches!(&error, Error::Select(SelectError::Slice(_))), "{error}");

    // A file that changes is noticed, also by one who has it open.
    let path = checkpoint.get("t2").unwrap().path().to_owned();
    reader.tensor("t2").unwrap();
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, &bytes).unwrap();
    let error = reader.tensor("t2").unwrap_err();
    assert!(
        matches!(&error, Error::Io { .. }) && error.to_string().contains("c.safetensors"),
        "{error}"
    );
}

#[test]
fn checkpoints_laid_over_others_and_renamed_load_as_they_say() {
    let dir = tempfile::tempdir().unwrap();
    let (below, above) =
        (dir.path().join("below.safetensors"), dir.path().join("above.safetensors"));
    let spec = |name, rows| (name, safetensors::Dtype::F32, vec![rows, 100]);
    fst_tests::write(&below, &[spec("m.a", 3), spec("m.b", 4000), spec("m.c", 50)]);
    fst_tests::write(&above, &[spec("b", 5), spec("d", 6)]);
    let [below, above] = [below, above].map(|path| Checkpoint::open(path).unwrap());
    let plain =
        below.renamed(|tensor| tensor.name().strip_prefix("m.").map(str::to_owned)).unwrap();
    let [under, over] = [&below, &above].map(|checkpoint| Loader::new().load(checkpoint).unwrap());
    let both = plain.overlay(&above);
    let loading = Loader::new().start(&both).unwrap();
    let reader = Loader::new().reader(&both);
    let loaded = Loader::new().load(&both).unwrap();
    assert_eq!(loaded.len(), 4);
    for (name, from, source) in
        [("a", &under, "m.a"), ("b", &over, "b"), ("c", &under, "m.c"), ("d", &over, "d")]
    {
        let want = from.get(source).unwrap().bytes().unwrap();
        assert!(loaded.get(name).unwrap().bytes().unwrap() == want, "{name}");
        assert!(loading.take(name).unwrap().bytes().unwrap() == want, "{name}");
        assert!(reader.tensor(name).unwrap().bytes().unwrap() == want, "{name}");
    }
    assert!(Loader::new().select("m.*").load(&both).is_err());
}
