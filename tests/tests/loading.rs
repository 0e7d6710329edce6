//! Loads in the background: tensors by name, in any order and from several threads, while reading goes on.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod gpu_support;

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fst::{
    CachedCopy, CancelToken, Checkpoint, Destination, Device, Dtype, Engine, Error, Loader,
    Loading, Manifest, Request, SelectError,
};
use fst_tests::{crowded_checkpoint, odd_checkpoint, write};
use gpu_support::{assert_same_bytes, machine, open};

/// Tensors of this many MiB each, named `t0` and so on, in one file.
fn large(dir: &Path, tensors: usize, mib: usize) -> Checkpoint {
    let names: Vec<&'static str> = (0..tensors).map(|i| &*format!("t{i}").leak()).collect();
    let specs: Vec<fst_tests::Spec> =
        names.iter().map(|name| (*name, safetensors::Dtype::F32, vec![mib, 1 << 18])).collect();
    write(&dir.join("model.safetensors"), &specs);
    Checkpoint::open(dir).unwrap()
}

#[test]
fn tensors_come_by_name_in_any_order_to_any_thread() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(&crowded_checkpoint(dir.path()));
    let _sim = machine();
    let devices = [Device::host(), Device::cuda(0).unwrap()];
    for device in devices {
        for loader in [
            Loader::new(),
            Loader::new().dtype(Dtype::F32),
            Loader::new().slice("huge", 1, 3..700),
            Loader::new().memory_budget(256 << 20),
        ] {
            let loaded = loader.load(&checkpoint).unwrap();
            let names: Vec<&str> = loaded.iter().map(|tensor| tensor.name()).collect();
            let loading = loader.device(device.clone()).start(&checkpoint).unwrap();
            let next = AtomicUsize::new(0);
            std::thread::scope(|scope| {
                for _ in 0..3 {
                    let loading = loading.clone();
                    scope.spawn(|| {
                        let loading = loading;
                        // From the end, some of them twice.
                        while let Some(name) =
                            names.iter().rev().nth(next.fetch_add(1, Ordering::Relaxed))
                        {
                            assert_same_bytes(&loading.get(name).unwrap(), &loaded);
                            assert_same_bytes(&loading.take(name).unwrap(), &loaded);
                            let again = loading.get(name).unwrap_err();
                            assert!(matches!(again, Error::Taken { .. }), "{again}");
                        }
                    });
                }
            });
            assert!(loading.next().is_none());
            let report = loading.finish().unwrap();
            assert_eq!((report.tensors, report.bytes), (loaded.len(), loading.byte_len()));
            assert_eq!(report.bytes, loaded.report().bytes);
        }
    }
}

#[test]
fn what_is_shared_is_one_tensor_and_what_was_handed_out_outlives_the_load() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(&odd_checkpoint(dir.path()));
    let all = Loader::new().load(&checkpoint).unwrap();
    let loading = Loader::new().start(&checkpoint).unwrap();
    let name = all.iter().find(|tensor| tensor.byte_len() > 4096).unwrap().name();
    let (one, other) = (loading.get(name).unwrap(), loading.clone().get(name).unwrap());
    assert_eq!(one.bytes().unwrap().as_ptr(), other.bytes().unwrap().as_ptr());
    assert!(loading.try_get(name).unwrap().is_some() && loading.contains(name));
    assert!(matches!(loading.get("none"), Err(Error::UnknownTensor { .. })));
    let rest: Vec<_> = std::iter::from_fn(|| loading.next()).map(Result::unwrap).collect();
    assert_eq!((rest.len(), loading.remaining()), (all.len(), 0));
    drop(loading);
    assert_same_bytes(&one, &all);
    rest.iter().for_each(|tensor| assert_same_bytes(tensor, &all));
    // In the checkpoint's order where that is wanted, by whatever names some were taken before.
    let loading = Loader::new().in_order(true).start(&checkpoint).unwrap();
    loading.take(name).unwrap();
    let names: Vec<String> = std::iter::from_fn(|| loading.next())
        .map(|tensor| tensor.unwrap().name().to_owned())
        .collect();
    let others = all.iter().map(|tensor| tensor.name()).filter(|other| *other != name);
    assert_eq!(names, others.collect::<Vec<_>>());
}

#[test]
fn what_somebody_waits_for_is_read_first() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = large(dir.path(), 15, 16);
    let _sim = machine();
    for device in [Device::host(), Device::cuda(0).unwrap()] {
        for dtype in [Dtype::F32, Dtype::BF16] {
            let loader = Loader::new().engine(Engine::Pread).workers(1).trace(true).dtype(dtype);
            let loading = loader.device(device.clone()).start(&checkpoint).unwrap();
            let last = loading.take("t14").unwrap();
            drop(last);
            let report = loading.finish().unwrap();
            let start = checkpoint.get("t14").unwrap().file_range().start;
            let at = report.events.iter().position(|event| event.offset >= start).unwrap();
            assert!(at < report.events.len() / 2, "{at} of {}", report.events.len());
        }
    }
}

#[test]
fn a_load_ends_when_it_is_cancelled_or_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = large(dir.path(), 12, 16);
    let loader = Loader::new().engine(Engine::Pread).workers(1);
    let loading = loader.start(&checkpoint).unwrap();
    let first = loading.take("t0").unwrap();
    drop(loading);
    assert_eq!(first.byte_len(), 16 << 20);

    let token = CancelToken::new();
    for by_token in [false, true] {
        // Held back by its budget, so that it is not over.
        let loader = loader.clone().memory_budget(40 << 20).cancel(token.clone());
        let loading = loader.start(&checkpoint).unwrap();
        let held = loading.next().unwrap().unwrap();
        let _more = loading.next().unwrap().unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| loading.take("t11"));
            std::thread::sleep(Duration::from_millis(50));
            if by_token {
                token.cancel()
            } else {
                loading.cancel()
            }
            let error = waiting.join().unwrap().unwrap_err();
            assert!(matches!(error, Error::Cancelled), "{error}");
        });
        assert!(matches!(loading.finish(), Err(Error::Cancelled)));
        assert_eq!(held.bytes().unwrap().len(), 16 << 20);
        if by_token {
            assert!(loader.start(&checkpoint).unwrap().next().unwrap().is_err());
        }
    }
}

#[test]
fn a_budget_that_nobody_empties_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = large(dir.path(), 8, 16);
    let loader = Loader::new().memory_budget(40 << 20).stall_timeout(Duration::from_millis(200));
    let loading = loader.start(&checkpoint).unwrap();
    let (first, wanted) = (loading.get("t0").unwrap(), loading.take("t7").unwrap());
    let error = loading.get("t6").unwrap_err();
    assert!(matches!(error, Error::Stalled { budget, .. } if budget <= 40 << 20), "{error}");
    let began = Instant::now();
    assert!(loading.next_timeout(Duration::from_secs(5)).unwrap().is_some());
    assert!(began.elapsed() < Duration::from_secs(5));
    // Goes on where it was.
    drop((first, wanted));
    let others = std::iter::from_fn(|| loading.next()).map(Result::unwrap).count();
    assert_eq!((others, loading.remaining()), (6, 0));
    assert!(loading.peak_bytes() <= 40 << 20);
    loading.finish().unwrap();
}

#[test]
fn failures_reach_all_who_ask() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = large(dir.path(), 6, 16);
    let path = dir.path().join("model.safetensors");
    let loader = Loader::new().engine(Engine::Pread).workers(1);

    // Wrong sums, and a tensor that is handed out all the same when it was right.
    let sums = loader.checksums(&checkpoint, |_| {}).unwrap();
    let mut wrong = sums.clone();
    wrong[3].sha256 = sums[2].sha256;
    let loading = loader.clone().verify(Manifest::new(sums).unwrap()).start(&checkpoint).unwrap();
    assert_eq!(std::iter::from_fn(|| loading.next()).filter(Result::is_ok).count(), 6);
    let loading = loader.clone().verify(Manifest::new(wrong).unwrap()).start(&checkpoint).unwrap();
    let Err(Error::Failed(error)) = loading.get("t3") else { panic!("t3 was handed out") };
    assert!(matches!(&*error, Error::Verify(_)), "{error}");
    assert!(matches!(loading.finish(), Err(Error::Failed(_))));

    // A file that is cut while it is read; the budget keeps the reader from its end.
    let loading = loader.memory_budget(40 << 20).start(&checkpoint).unwrap();
    let first = loading.next().unwrap().unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(20 << 20).unwrap();
    drop(first);
    let error = loop {
        match loading.next() {
            Some(Ok(_)) => {}
            Some(Err(error)) => break error,
            None => panic!("a cut file was loaded"),
        }
    };
    let Error::Failed(error) = error else { panic!("{error}") };
    assert!(error.to_string().contains("model.safetensors"), "{error}");
    assert!(loading.get("t5").is_err() && loading.next().unwrap().is_err());
}

#[test]
fn requests_say_what_is_wanted_of_each_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(&crowded_checkpoint(dir.path()));
    let huge = checkpoint.get("huge").unwrap();
    let wide = Loader::new().dtype(Dtype::F32).load(&checkpoint).unwrap();
    let part = Loader::new().select("huge").slice("huge", 1, 3..700).load(&checkpoint).unwrap();
    let plain = Loader::new().load(&checkpoint).unwrap();
    let requests = || {
        [
            Request::new("t3").dtype(Dtype::F32).named("third"),
            Request::new("huge").slice(1, 3..700).named("part"),
            Request::from("t1"),
        ]
    };
    let loader = Loader::new().request(requests());
    let planned = loader.planned(&checkpoint).unwrap();
    let named = |name: &str| planned.iter().find(|planned| planned.name() == name).unwrap();
    assert_eq!(planned.len(), 3);
    assert_eq!((named("third").dtype(), named("third").source().name()), (Dtype::F32, "t3"));
    assert_eq!(named("part").shape(), [huge.shape()[0], 697]);
    assert_eq!(named("part").byte_len(), part.get("huge").unwrap().byte_len() as u64);
    assert_eq!(named("part").source().path(), huge.path());
    let _sim = machine();
    for device in [Device::host(), Device::cuda(0).unwrap()] {
        let tensors = loader.clone().device(device).load(&checkpoint).unwrap();
        assert_eq!(tensors.iter().map(|t| t.name()).collect::<Vec<_>>(), ["part", "t1", "third"]);
        let bytes =
            |name: &str| tensors.get(name).unwrap().to_host().unwrap().bytes().unwrap().to_vec();
        assert_eq!(bytes("third"), wide.get("t3").unwrap().bytes().unwrap());
        assert_eq!(bytes("part"), part.get("huge").unwrap().bytes().unwrap());
        assert_eq!(bytes("t1"), plain.get("t1").unwrap().bytes().unwrap());
    }
    // The loader's own wishes are for what requests leave open; patterns select more.
    let more = loader.clone().dtype(Dtype::BF16).select("t{1..4}").load(&checkpoint).unwrap();
    let dtypes = ["third", "part", "t1", "t4"].map(|name| more.get(name).unwrap().dtype());
    assert_eq!((more.len(), dtypes), (5, [Dtype::F32, Dtype::BF16, Dtype::BF16, Dtype::BF16]));
    assert_eq!(loader.stream(&checkpoint).unwrap().filter(Result::is_ok).count(), 3);
    let mut third = vec![0f32; 4];
    let into = [("third", Destination::elements(&mut third))];
    loader.load_into(&checkpoint, into).unwrap();
    let third: Vec<u8> = third.into_iter().flat_map(f32::to_le_bytes).collect();
    assert_eq!(third, wide.get("t3").unwrap().bytes().unwrap());

    assert!(Loader::new().request([""; 0]).load(&checkpoint).unwrap().is_empty());
    let refused = |loader: Loader| loader.planned(&checkpoint).unwrap_err();
    let error = refused(loader.clone().request(["t1"]));
    assert!(
        matches!(&error, Error::Select(SelectError::RequestedTwice { tensor }) if tensor == "t1"),
        "{error}"
    );
    let error = refused(loader.clone().request([Request::new("t2").named("third")]));
    assert!(
        matches!(&error, Error::Select(SelectError::NamedTwice { name }) if name == "third"),
        "{error}"
    );
    let error = refused(loader.request(["none"]));
    assert!(matches!(&error, Error::UnknownTensor { name } if name == "none"), "{error}");
}

/// Also where the page cache has a part of the file, which gets to a device in another way than the rest.
#[test]
fn what_somebody_waits_for_is_read_first_where_some_is_cached() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = large(dir.path(), 15, 16);
    let file = fs::File::open(dir.path().join("model.safetensors")).unwrap();
    file.sync_all().unwrap();
    // SAFETY: advice on an open file touches no memory of this process.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    let mut half = vec![0; 120 << 20];
    file.read_exact_at(&mut half, 0).unwrap();
    let _sim = machine();
    let loader = Loader::new().workers(1).trace(true).cached_copy(CachedCopy::Registered);
    let loading = loader.device(Device::cuda(0).unwrap()).start(&checkpoint).unwrap();
    drop(loading.take("t14").unwrap());
    let report = loading.finish().unwrap();
    let start = checkpoint.get("t14").unwrap().file_range().start;
    // Where nothing was staged the file system forgets nothing.
    let staged = report.events.len();
    let at = report.events.iter().position(|event| event.offset >= start).unwrap_or(0);
    assert!(at <= staged / 2, "{at} of {staged}");
}

/// The reader ends with the last handle, also where a closure of the load itself drops that.
#[test]
fn a_hook_may_have_the_last_handle() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = large(dir.path(), 8, 16);
    let (ended, end) = std::sync::mpsc::channel();
    for panics in [false, true] {
        let slot: Arc<Mutex<Option<Loading>>> = Arc::default();
        let (mine, ended) = (slot.clone(), ended.clone());
        let loader = Loader::new().engine(Engine::Pread).workers(1).on_progress(move |_| {
            let handle = mine.lock().unwrap_or_else(|e| e.into_inner()).take();
            if handle.is_some() {
                assert!(!panics, "the hook's own");
                drop(handle);
                ended.send(()).unwrap();
            }
        });
        let loading = loader.start(&checkpoint).unwrap();
        let other = panics.then(|| loading.clone());
        *slot.lock().unwrap() = Some(loading);
        drop(loader);
        match other {
            None => end.recv_timeout(Duration::from_secs(60)).unwrap(),
            Some(other) => {
                let Error::Failed(error) = other.finish().unwrap_err() else { panic!() };
                assert!(error.to_string().contains("the hook's own"), "{error}");
            }
        }
    }
}

/// One that lands in the very moment in which a stall is looked for is not lost.
#[test]
fn nothing_is_lost_where_loads_stall() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = large(dir.path(), 12, 16);
    let sums = Loader::new().checksums(&checkpoint, |_| {}).unwrap();
    let manifest = Manifest::new(sums).unwrap();
    for stall in [3, 10, 20, 40] {
        let loader = Loader::new().memory_budget(20 << 20).verify(manifest.clone());
        let loader = loader.stall_timeout(Duration::from_millis(stall));
        let mut stream = loader.stream(&checkpoint).unwrap();
        assert_eq!(stream.by_ref().filter(Result::is_ok).count(), 12);
        assert!(stream.report().is_some());
    }
}

#[test]
fn a_load_that_is_over_leaves_no_file_open_and_no_cancelling() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = large(dir.path(), 2, 1);
    let path = dir.path().join("model.safetensors").canonicalize().unwrap();
    let open = || {
        let all = fs::read_dir("/proc/self/fd").unwrap().flatten();
        all.filter(|fd| fs::read_link(fd.path()).is_ok_and(|to| to == path)).count()
    };
    let token = CancelToken::new();
    let loading = Loader::new().cancel(token.clone()).start(&checkpoint).unwrap();
    loading.finish().unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while open() > 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(open(), 0);
    token.cancel();
    assert!(loading.get("t0").is_ok() && loading.finish().is_ok());
}
