//! Updates in place: another checkpoint of the same tensors read into the memory of those loaded before.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod gpu_support;

use std::fs;
use std::path::Path;

use fst::{
    Checkpoint, Device, Difference, Dtype, Error, Loader, Manifest, Request, Reread, Tensors,
};
use fst_tests::noise;
use gpu_support::{assert_same_bytes, machine};
use safetensors::tensor::{Dtype as OfficialDtype, TensorView};

/// Two files of tensors of several sizes, some of no byte; of each file its own seed.
fn checkpoint(dir: &Path, seeds: [u64; 2]) -> Checkpoint {
    fs::create_dir_all(dir).unwrap();
    for (file, seed) in seeds.into_iter().enumerate() {
        let lens = [0, 4, 1000, 4096, 100_000, 3 << 20];
        let data: Vec<(String, Vec<u8>)> = lens
            .iter()
            .enumerate()
            .map(|(i, len)| (format!("f{file}.t{i}"), noise(*len, seed * 10 + i as u64)))
            .collect();
        let views = data.iter().map(|(name, data)| {
            let shape = vec![data.len() / 4, 2];
            (name.clone(), TensorView::new(OfficialDtype::BF16, shape, data).unwrap())
        });
        let path = dir.join(format!("{file}.safetensors"));
        safetensors::serialize_to_file(views, None, &path).unwrap();
    }
    Checkpoint::open_all([dir.join("0.safetensors"), dir.join("1.safetensors")]).unwrap()
}

fn assert_same(tensors: &Tensors, loaded: &Tensors) {
    assert_eq!(tensors.len(), loaded.len());
    tensors.iter().for_each(|tensor| assert_same_bytes(tensor, loaded));
    let infos = |tensors: &Tensors| -> Vec<_> {
        tensors.iter().map(|t| t.info().path().to_owned()).collect()
    };
    assert_eq!(infos(tensors), infos(loaded));
}

fn addresses(tensors: &Tensors) -> Vec<u64> {
    let address =
        |t: &fst::Tensor| t.device_ptr().unwrap_or_else(|| t.bytes().unwrap().as_ptr() as u64);
    tensors.iter().map(address).collect()
}

#[test]
fn tensors_become_those_of_the_other_checkpoint_where_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let old = checkpoint(&dir.path().join("old"), [1, 2]);
    let new = checkpoint(&dir.path().join("new"), [3, 4]);
    let _sim = machine();
    for device in [Device::host(), Device::cuda(0).unwrap()] {
        let slice = Request::new("f0.t5").slice(1, 1..2).named("half");
        for loader in [
            Loader::new(),
            Loader::new().dtype(Dtype::F32),
            Loader::new().request([slice, Request::new("f1.t3")]),
        ] {
            let want = loader.load(&new).unwrap();
            let loader = loader.device(device.clone());
            let mut tensors = loader.load(&old).unwrap();
            let before = addresses(&tensors);
            loader.update(&mut tensors, &new, Reread::All).unwrap();
            assert_same(&tensors, &want);
            assert_eq!(addresses(&tensors), before);
            assert_eq!(tensors.report().tensors, tensors.len());
            // Back, with others looking on.
            let clone = tensors.clone();
            let error = loader.update(&mut tensors, &old, Reread::All).unwrap_err();
            assert!(matches!(error, Error::NotWritable { .. }), "{error}");
            assert_same(&tensors, &want);
            // SAFETY: nobody looks at the elements meanwhile.
            let tensors = unsafe { loader.update_shared(&tensors, &old, Reread::All) }.unwrap();
            assert_same(
                &tensors,
                &Loader::device(loader.clone(), Device::host()).load(&old).unwrap(),
            );
            assert_eq!((addresses(&clone), addresses(&tensors)), (before.clone(), before));
        }
    }
}

#[test]
fn only_what_differs_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let old = checkpoint(&dir.path().join("old"), [1, 2]);
    let new = checkpoint(&dir.path().join("new"), [1, 4]);
    let loader = Loader::new();
    let sums = |checkpoint: &Checkpoint| {
        Manifest::new(loader.checksums(checkpoint, |_| {}).unwrap()).unwrap()
    };
    let (before, after) = (sums(&old), sums(&new));
    let want = loader.load(&new).unwrap();
    // By sums: half of it, and what is read is verified.
    let mut tensors = loader.load(&old).unwrap();
    let error = loader.update(&mut tensors, &new, Reread::OtherSums(&before)).unwrap_err();
    assert!(matches!(error, Error::NoSums) && tensors.len() == want.len(), "{error}");
    let verifying = loader.clone().verify(after.clone());
    verifying.update(&mut tensors, &new, Reread::OtherSums(&before)).unwrap();
    assert_same(&tensors, &want);
    let half = tensors.iter().filter(|t| t.name().starts_with("f1.") && t.byte_len() > 0);
    assert_eq!(tensors.report().tensors, half.count());
    verifying.update(&mut tensors, &new, Reread::OtherSums(&after)).unwrap();
    assert_eq!(tensors.report().tensors, 0);
    assert_same(&tensors, &want);
    // By files: the same one by another name, and a copy of it.
    let mut tensors = loader.load(&old).unwrap();
    let mixed = dir.path().join("mixed");
    fs::create_dir(&mixed).unwrap();
    fs::hard_link(dir.path().join("old/0.safetensors"), mixed.join("0.safetensors")).unwrap();
    fs::copy(dir.path().join("new/1.safetensors"), mixed.join("1.safetensors")).unwrap();
    // Opened anew: the link is a change of status.
    let old = Checkpoint::open_all([0, 1].map(|i| dir.path().join(format!("old/{i}.safetensors"))))
        .unwrap();
    let mixed =
        Checkpoint::open_all([0, 1].map(|i| mixed.join(format!("{i}.safetensors")))).unwrap();
    loader.update(&mut tensors, &old, Reread::OtherFiles).unwrap();
    loader.update(&mut tensors, &mixed, Reread::OtherFiles).unwrap();
    assert_eq!(tensors.report().tensors, 6);
    assert_same(&tensors, &loader.load(&mixed).unwrap());
    loader.update(&mut tensors, &mixed, Reread::OtherFiles).unwrap();
    assert_eq!(tensors.report().tensors, 0);
    // A slice may have been another.
    let sliced = |range| Loader::new().slice("f0.t5", 1, range);
    let mut tensors = sliced(0..1).load(&mixed).unwrap();
    sliced(1..2).update(&mut tensors, &mixed, Reread::OtherFiles).unwrap();
    assert_eq!(tensors.report().tensors, 1);
    assert_same(&tensors, &sliced(1..2).load(&mixed).unwrap());
}

#[test]
fn what_fails_leaves_all_or_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let old = checkpoint(&dir.path().join("old"), [1, 2]);
    let new = checkpoint(&dir.path().join("new"), [3, 4]);
    let _sim = machine();
    for device in [Device::host(), Device::cuda(0).unwrap()] {
        let loader = Loader::new().device(device.clone());
        let want = Loader::new().load(&old).unwrap();
        let mut tensors = loader.load(&old).unwrap();
        let mut refused = |loader: &Loader| {
            let error = loader.update(&mut tensors, &new, Reread::All).unwrap_err();
            assert_same(&tensors, &want);
            let Error::OtherPlan { tensor, difference } = error else { panic!("{error}") };
            (tensor, difference)
        };
        let (_, difference) = refused(&loader.clone().dtype(Dtype::F32));
        assert!(matches!(difference, Difference::Dtype { .. }), "{difference}");
        let (tensor, difference) = refused(&loader.clone().select("f1.*"));
        assert_eq!((&*tensor, difference), ("f0.t0", Difference::Missing));
        let (tensor, difference) = refused(&loader.clone().slice("f0.t4", 0, 0..10));
        assert!(
            tensor == "f0.t4" && matches!(difference, Difference::Shape { .. }),
            "{difference}"
        );
        if !device.is_host() {
            let (_, difference) = refused(&Loader::new());
            assert!(matches!(difference, Difference::Device { .. }), "{difference}");
        }
        let mut part = loader.clone().select("f1.*").load(&old).unwrap();
        let error = loader.update(&mut part, &new, Reread::All).unwrap_err();
        let Error::OtherPlan { difference, .. } = error else { panic!("{error}") };
        assert_eq!((difference, part.len()), (Difference::New, 6));

        // Sums that are not those of the files show when some of it is written.
        let wrong = Manifest::new(loader.checksums(&old, |_| {}).unwrap()).unwrap();
        let error =
            loader.clone().verify(wrong).update(&mut tensors, &new, Reread::All).unwrap_err();
        assert!(matches!(error, Error::Verify(_)), "{error}");
        assert!(tensors.is_empty() && tensors.get("f0.t5").is_err());
        // A file that was cut since it was opened.
        let mut tensors = loader.load(&old).unwrap();
        let cut = checkpoint(&dir.path().join("cut"), [3, 4]);
        let path = dir.path().join("cut/1.safetensors");
        fs::File::options().write(true).open(path).unwrap().set_len(1 << 20).unwrap();
        let error = loader.update(&mut tensors, &cut, Reread::All).unwrap_err();
        assert!(error.to_string().contains("1.safetensors"), "{error}");
        assert!(
            tensors.is_empty() || tensors.iter().all(|t| t.info().path().starts_with(dir.path()))
        );
    }
    // SAFETY: nobody changes the files meanwhile.
    let mut mapped = unsafe { Loader::new().map(&old) }.unwrap();
    let error = Loader::new().update(&mut mapped, &new, Reread::All).unwrap_err();
    assert!(matches!(error, Error::NotWritable { .. }), "{error}");
}
