//! Loads to host memory, held to the official `safetensors` crate byte for byte.

#![allow(clippy::unwrap_used, clippy::panic)]

mod load_support;

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use fst::{CancelToken, Checkpoint, Dtype, Engine, Error, Loader, SelectError, Tensor, Tensors};
use half::bf16;

use load_support::*;

#[test]
fn every_engine_loads_what_the_official_crate_reads() {
    let dir = tempfile::tempdir().unwrap();
    let paths = checkpoint(dir.path());
    let want = official(&paths);
    for engine in ENGINES {
        for workers in [1, 3] {
            let tensors = load(&Loader::new().engine(engine).workers(workers), &paths);
            assert!(ours(&tensors) == want, "{engine}");
            let report = tensors.report();
            assert_eq!(report.tensors, 10);
            assert_eq!(
                report.bytes,
                want.values().map(|(_, _, data)| data.len() as u64).sum::<u64>()
            );
            assert!(report.engine.used == engine || engine == Engine::Auto);
            assert!(report.seconds > 0.0 && report.gb_per_s() > 0.0);
        }
    }
}

#[test]
fn tensors_outlive_loader_checkpoint_and_siblings_and_files() {
    let dir = tempfile::tempdir().unwrap();
    let paths = checkpoint(dir.path());
    let want = official(&paths);
    let kept = load(&Loader::new(), &paths).get("huge").unwrap().clone();
    drop(dir);
    let thread = std::thread::spawn(move || kept.bytes().unwrap().to_vec());
    assert!(thread.join().unwrap() == want["huge"].2);
}

#[test]
fn typed_views_check_the_dtype() {
    let dir = tempfile::tempdir().unwrap();
    let paths = checkpoint(dir.path());
    let want = official(&paths);
    let tensors = load(&Loader::new(), &paths);
    let view = tensors.get("big").unwrap().as_slice::<bf16>().unwrap();
    let expected: Vec<bf16> =
        want["big"].2.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]])).collect();
    assert!(view.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()));
    assert_eq!(view.len(), expected.len());
    assert!(matches!(
        tensors.get("big").unwrap().as_slice::<f32>(),
        Err(Error::WrongDtype { asked: Dtype::F32, found: Dtype::BF16, .. })
    ));
    assert!(matches!(tensors.get("no such"), Err(Error::UnknownTensor { .. })));
    assert!(tensors.get("empty").unwrap().as_slice::<f32>().unwrap().is_empty());
}

#[test]
fn selections_by_pattern_and_closure() {
    let dir = tempfile::tempdir().unwrap();
    let paths = checkpoint(dir.path());
    let names = |tensors: &Tensors| -> Vec<String> {
        let mut names: Vec<_> = tensors.iter().map(|t| t.name().to_owned()).collect();
        names.sort();
        names
    };
    let want = official(&paths);
    let some = load(&Loader::new().select("h*").select("b?g"), &paths);
    assert_eq!(names(&some), ["big", "half", "huge"]);
    assert!(ours(&some).iter().all(|(name, tensor)| want[name] == *tensor));
    let floats = load(&Loader::new().select_with(|t| t.dtype() == Dtype::F32), &paths);
    assert_eq!(names(&floats), ["empty", "scalar"]);
    let none = Loader::new().select("nothing*").load(&Checkpoint::open_all(&paths).unwrap());
    assert!(
        matches!(none, Err(Error::Select(SelectError::NoMatch { pattern })) if pattern == "nothing*")
    );
}

#[test]
fn slices_read_what_element_wise_slicing_gives() {
    let dir = tempfile::tempdir().unwrap();
    let paths = checkpoint(dir.path());
    let want = official(&paths);
    let cases = [
        ("big", 2, 0, 0..1500),
        ("big", 2, 0, 700..1300),
        ("big", 2, 1, 3..500),
        ("big", 2, 1, 1000..1001),
        ("huge", 2, 1, 0..1025),
        ("huge", 2, 0, 5..5),
        ("wide", 8, 1, 1..4),
        ("wide", 8, 2, 6..7),
        ("eight", 1, 1, 1..3),
    ];
    for engine in ENGINES {
        for (name, size, dim, range) in cases.clone() {
            let (_, shape, data) = &want[name];
            let tensors =
                load(&Loader::new().engine(engine).slice(name, dim, range.clone()), &paths);
            let tensor = tensors.get(name).unwrap();
            let mut sliced = shape.clone();
            sliced[dim] = range.len();
            assert_eq!(tensor.shape(), sliced);
            let expected = slice(data, shape, size, dim, range.clone());
            assert!(tensor.bytes().unwrap() == expected, "{engine} {name} {dim} {range:?}");
            // The others are whole.
            assert_eq!(tensors.get("half").unwrap().bytes().unwrap(), want["half"].2);
        }
    }
    let bad = Loader::new().slice("big", 2, 0..1).load(&Checkpoint::open_all(&paths).unwrap());
    let outside = |error: &SelectError| error.to_string().contains("\"big\": no dimension 2");
    assert!(matches!(bad, Err(Error::Select(error)) if outside(&error)));
}

#[test]
fn dtype_converts_floats_and_leaves_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let paths = checkpoint(dir.path());
    let want = official(&paths);
    for engine in ENGINES {
        let tensors = load(&Loader::new().engine(engine).dtype(Dtype::F32), &paths);
        for name in ["big", "huge"] {
            let got = tensors.get(name).unwrap().as_slice::<f32>().unwrap();
            for (got, bytes) in got.iter().zip(want[name].2.chunks_exact(2)) {
                let expected = bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
                assert!(got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan());
            }
        }
        assert_eq!(tensors.get("ids").unwrap().dtype(), Dtype::I64);
        assert_eq!(tensors.get("ids").unwrap().bytes().unwrap(), want["ids"].2);
        assert_eq!(tensors.get("wide").unwrap().dtype(), Dtype::F32);
        assert_eq!(tensors.get("scalar").unwrap().bytes().unwrap(), want["scalar"].2);
    }
    let bad = Loader::new().dtype(Dtype::I32).load(&Checkpoint::open_all(&paths).unwrap());
    assert!(matches!(bad, Err(Error::Select(SelectError::Cast { to: Dtype::I32, .. }))));
}

#[test]
fn tensors_that_their_file_misaligns_are_moved_and_converted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("odd.safetensors");
    let (a, b) = misaligned(&path);
    for engine in ENGINES {
        let tensors = load(&Loader::new().engine(engine), std::slice::from_ref(&path));
        assert!(tensors.get("a").unwrap().bytes().unwrap() == a);
        assert_eq!(tensors.get("a").unwrap().as_slice::<f32>().unwrap().len(), 600_001);
        assert_eq!(tensors.get("b").unwrap().as_slice::<bf16>().unwrap().len(), 3001);
        let wide =
            load(&Loader::new().engine(engine).dtype(Dtype::F64), std::slice::from_ref(&path));
        let got = wide.get("a").unwrap().as_slice::<f64>().unwrap();
        for (got, bytes) in got.iter().zip(a.chunks_exact(4)) {
            let expected = f64::from(f32::from_le_bytes(bytes.try_into().unwrap()));
            assert!(got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan());
        }
        assert_eq!(wide.get("b").unwrap().elements(), b.len() / 2);
    }
}

#[test]
fn streams_yield_everything_once_and_keep_to_their_budget() {
    let dir = tempfile::tempdir().unwrap();
    let paths = checkpoint(dir.path());
    let want = official(&paths);
    let checkpoint = Checkpoint::open_all(&paths).unwrap();
    let budget = 9 << 20; // "huge" needs 8.4e6
    for in_order in [false, true] {
        let loader = Loader::new().memory_budget(budget).in_order(in_order);
        let mut stream = loader.stream(&checkpoint).unwrap();
        let mut names = Vec::new();
        for tensor in &mut stream {
            let tensor = tensor.unwrap();
            assert!(tensor.bytes().unwrap() == want[tensor.name()].2, "{}", tensor.name());
            names.push(tensor.name().to_owned());
        }
        assert!(stream.peak_bytes() <= budget);
        assert_eq!(stream.report().unwrap().tensors, want.len());
        let order: Vec<_> = checkpoint.tensors().iter().map(|t| t.name().to_owned()).collect();
        if in_order {
            assert_eq!(names, order);
        } else {
            names.sort();
            assert_eq!(names, want.keys().cloned().collect::<Vec<_>>());
        }
    }
    let small = Loader::new().memory_budget(8 << 20).stream(&checkpoint);
    let Err(Error::Budget { needed, .. }) = small else { panic!("{small:?}") };
    assert!((8 << 20..9 << 20).contains(&needed));
    assert_eq!(Loader::new().memory_budget(needed).stream(&checkpoint).unwrap().count(), 10);
    assert!(Loader::new().memory_budget(needed - 1).stream(&checkpoint).is_err());
}

#[test]
fn streams_convert_and_slice_within_their_budget() {
    let dir = tempfile::tempdir().unwrap();
    let paths = checkpoint(dir.path());
    let checkpoint = Checkpoint::open_all(&paths).unwrap();
    let loader = Loader::new().dtype(Dtype::F32).slice("huge", 1, 0..1000);
    let whole = ours(&loader.load(&checkpoint).unwrap());
    for in_order in [false, true] {
        let stream = loader.clone().memory_budget(56 << 20).in_order(in_order).stream(&checkpoint);
        let tensors: Vec<Tensor> = stream.unwrap().map(Result::unwrap).collect();
        assert!(ours(&tensors) == whole);
    }
}

#[test]
fn dropping_a_stream_ends_its_load() {
    let dir = tempfile::tempdir().unwrap();
    let paths = checkpoint(dir.path());
    let checkpoint = Checkpoint::open_all(&paths).unwrap();
    let mut stream = Loader::new().memory_budget(9 << 20).stream(&checkpoint).unwrap();
    let kept = stream.next().unwrap().unwrap();
    let began = std::time::Instant::now();
    drop(stream);
    assert!(began.elapsed().as_secs() < 60);
    assert!(kept.bytes().is_ok());
}

#[test]
fn progress_is_reported_and_tokens_cancel() {
    let dir = tempfile::tempdir().unwrap();
    let paths = checkpoint(dir.path());
    let checkpoint = Checkpoint::open_all(&paths).unwrap();
    let last = Arc::new(AtomicU64::new(0));
    let seen = last.clone();
    let loader = Loader::new().on_progress(move |p| {
        assert!(p.bytes_done <= p.bytes_total);
        seen.store(p.bytes_done, Relaxed);
    });
    let tensors = loader.load(&checkpoint).unwrap();
    assert_eq!(last.load(Relaxed), tensors.report().bytes_read);

    // However short the load is, its end is reported.
    for _ in 0..200 {
        last.store(u64::MAX, Relaxed);
        let report = loader.clone().select("scalar").load(&checkpoint).unwrap().report().clone();
        assert_eq!(last.load(Relaxed), report.bytes_read);
    }

    let token = CancelToken::new();
    token.cancel();
    let loader = Loader::new().cancel(token);
    assert!(matches!(loader.load(&checkpoint), Err(Error::Cancelled)));
    let first = loader.stream(&checkpoint).unwrap().next();
    assert!(matches!(first, Some(Err(Error::Cancelled))));
}

#[test]
fn a_file_that_shrank_or_changed_since_it_was_opened_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let paths = checkpoint(dir.path());
    let checkpoint = Checkpoint::open_all(&paths).unwrap();
    let file = fs::File::options().write(true).open(&paths[1]).unwrap();
    file.set_len(100_000).unwrap();
    for engine in ENGINES {
        let error = Loader::new().engine(engine).load(&checkpoint).unwrap_err().to_string();
        assert!(error.contains("b.safetensors") && error.contains("changed"), "{error}");
    }
}

#[test]
fn a_file_that_was_written_to_and_had_its_time_set_back_is_refused() {
    use std::os::unix::fs::{FileExt, MetadataExt};
    let dir = tempfile::tempdir().unwrap();
    let paths = checkpoint(dir.path());
    let checkpoint = Checkpoint::open_all(&paths).unwrap();
    let before = fs::metadata(&paths[0]).unwrap();
    let file = fs::File::options().write(true).open(&paths[0]).unwrap();
    while file.metadata().unwrap().ctime_nsec() == before.ctime_nsec() {
        file.write_all_at(&[7; 100], before.len() - 100).unwrap();
        file.set_modified(before.modified().unwrap()).unwrap();
    }
    for engine in ENGINES {
        let error = Loader::new().engine(engine).load(&checkpoint).unwrap_err();
        let change = fst::io::Change::Status;
        assert!(
            matches!(
                &error,
                Error::Io { source: fst::io::Error::Changed { change: c, .. }, .. } if *c == change
            ),
            "{error}"
        );
    }
    // SAFETY: nothing is mapped, as the file is another.
    assert!(unsafe { Loader::new().map(&checkpoint) }.is_err());
}

#[test]
fn a_file_that_got_another_name_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let paths = checkpoint(dir.path());
    let want = official(&paths);
    let opened = Checkpoint::open_all(&paths).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    fs::hard_link(&paths[0], dir.path().join("link")).unwrap();
    assert!(ours(&Loader::new().load(&opened).unwrap()) == want);
}

#[test]
fn types_are_send_and_sync() {
    fn check<T: Send + Sync>() {}
    check::<Tensor>();
    check::<Tensors>();
    check::<Loader>();
    check::<Checkpoint>();
    check::<Error>();
}
