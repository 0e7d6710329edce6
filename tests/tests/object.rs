//! Checkpoints by URL, each way to load them held to the same files on disk, from a server that counts what
//! it is asked for and does wrong what it is told.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod dist_support;
mod gpu_support;
mod load_support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use dist_support::LONG;
use fst::{
    CancelToken, Checkpoint, Checksum, Device, Digest, Dtype, Engine, Error, Loader, Manifest,
    Preset, Request, VerifyError,
};
use fst_tests::server::{Fault, Server};
use load_support::*;

/// A server with the odd checkpoint as one of two shards with an index; the same files on disk.
struct Case {
    server: Server,
    _dir: tempfile::TempDir,
    local: PathBuf,
    url: String,
}

/// The names of the shards.
const SHARDS: [&str; 2] = ["/m/a.safetensors", "/m/b.safetensors"];

impl Case {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let paths = checkpoint(dir.path());
        let mut map = serde_json::Map::new();
        for path in &paths {
            let name = path.file_name().unwrap().to_str().unwrap();
            for tensor in Checkpoint::open(path).unwrap().tensors() {
                map.insert(tensor.name().to_owned(), name.into());
            }
        }
        let index = serde_json::json!({ "metadata": {}, "weight_map": map });
        fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        Self::of(dir)
    }

    /// Serves all files of a folder.
    fn of(dir: tempfile::TempDir) -> Self {
        let server = Server::start();
        put_all(&server, dir.path());
        let url = server.origin() + "/m";
        Self { server, local: dir.path().to_owned(), _dir: dir, url }
    }

    fn remote(&self) -> Checkpoint {
        Checkpoint::open(&self.url).unwrap()
    }

    fn local(&self) -> Checkpoint {
        Checkpoint::open(&self.local).unwrap()
    }

    /// The bytes of a file that were asked for, range by range.
    fn asked(&self, path: &str) -> Vec<(u64, u64)> {
        let of_file = |r: &fst_tests::server::Request| r.target == path && r.method == "GET";
        let log = self.server.log();
        let mut ranges: Vec<_> =
            log.iter().filter(|r| of_file(r)).filter_map(|r| r.range).collect();
        ranges.sort_unstable();
        ranges
    }
}

fn put_all(server: &Server, folder: &Path) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        server.put(&format!("/m/{name}"), fs::read(path).unwrap());
    }
}

type Loaded = BTreeMap<String, (String, Vec<usize>, Vec<u8>)>;
type Way = fn(&Loader, &Checkpoint) -> Loaded;

const WAYS: [(&str, Way); 6] = [
    ("load", |loader, checkpoint| ours(&loader.load(checkpoint).unwrap())),
    ("stream", |loader, checkpoint| {
        let stream = loader.clone().memory_budget(100 << 20).stream(checkpoint).unwrap();
        ours(&stream.map(Result::unwrap).collect::<Vec<_>>())
    }),
    ("stream in order", |loader, checkpoint| {
        let loader = loader.clone().memory_budget(100 << 20).in_order(true);
        let stream = loader.stream(checkpoint).unwrap();
        ours(&stream.map(Result::unwrap).collect::<Vec<_>>())
    }),
    ("start and get", |loader, checkpoint| {
        let loading = loader.start(checkpoint).unwrap();
        let names = checkpoint.tensors().iter().rev().map(|tensor| tensor.name().to_owned());
        let tensors: Vec<_> = names.map(|name| loading.get(&name).unwrap()).collect();
        loading.finish().unwrap();
        ours(&tensors)
    }),
    ("reader", |loader, checkpoint| {
        let reader = loader.reader(checkpoint);
        let tensors: Vec<_> =
            checkpoint.tensors().iter().map(|info| reader.tensor(info.name()).unwrap()).collect();
        ours(&tensors)
    }),
    ("into", |loader, checkpoint| {
        let planned = loader.load(checkpoint).unwrap();
        let mut memory: BTreeMap<String, Vec<u8>> = planned
            .into_iter()
            .map(|tensor| (tensor.name().to_owned(), vec![0xee; tensor.byte_len()]))
            .collect();
        let destinations = memory.iter_mut().map(|(name, memory)| (name.clone(), &mut memory[..]));
        loader.load_into(checkpoint, destinations).unwrap();
        let shapes = ours(&loader.load(checkpoint).unwrap());
        let entry = |(name, memory)| {
            let (dtype, shape, _): &(String, Vec<usize>, Vec<u8>) = &shapes[&name];
            (name, (dtype.clone(), shape.clone(), memory))
        };
        memory.into_iter().map(entry).collect()
    }),
];

#[test]
fn every_way_gives_what_local_files_give() {
    let case = Case::new();
    let (local, remote) = (case.local(), case.remote());
    assert_eq!(local.tensors().len(), remote.tensors().len());
    let slices = Loader::new().slice("big", 1, 3..700).slice("huge", 0, 100..1900);
    for (what, loader) in [
        ("plain", Loader::new()),
        ("casts", Loader::new().dtype(Dtype::F32)),
        ("slices", slices.clone()),
        ("slices and casts", slices.dtype(Dtype::F16)),
    ] {
        for (way, load) in WAYS {
            let (expected, found) = (load(&loader, &local), load(&loader, &remote));
            assert!(expected == found, "{what}, {way}");
        }
    }
    let report = Loader::new().load(&remote).unwrap().report().clone();
    assert_eq!(report.engine.used, Engine::Object);
    assert!(report.stage("read.remote").is_some_and(|stage| stage.bytes > 0));
}

#[test]
fn files_indices_and_folders_are_found() {
    let case = Case::new();
    let origin = case.server.origin();
    for url in ["/m", "/m/", "/m/model.safetensors.index.json"] {
        assert_eq!(Checkpoint::open(origin.clone() + url).unwrap().shards().len(), 2, "{url}");
    }
    let one = Checkpoint::open(origin.clone() + SHARDS[0]).unwrap();
    assert_eq!(one.shards()[0].path(), Path::new(&(origin.clone() + SHARDS[0])));
    // Together with a local file.
    let paths = [PathBuf::from(origin.clone() + SHARDS[0]), case.local.join("b.safetensors")];
    assert!(
        ours(&load(&Loader::new(), &paths)) == ours(&Loader::new().load(&case.local()).unwrap())
    );
    for (url, says) in [
        ("/none/", "holds no .safetensors file"),
        ("/none", ""),
        ("/none/a.safetensors", "no such object"),
    ] {
        let error = Checkpoint::open(origin.clone() + url).unwrap_err().to_string();
        assert!(error.starts_with(&origin), "{error}");
        assert!(error.contains(says), "{error}");
    }
    let error = Checkpoint::open("https://host/m?X-Amz-Signature=abc").unwrap_err().to_string();
    assert!(!error.contains("abc"), "{error}");
    let error = Checkpoint::open("ftp://host/m").unwrap_err().to_string();
    assert!(error.starts_with("ftp://host/m: "), "{error}");
    case.server.remove(SHARDS[1]);
    let error = Checkpoint::open(&case.url).unwrap_err().to_string();
    assert!(error.contains("b.safetensors") && error.contains("index"), "{error}");
}

#[test]
fn opening_takes_one_request_a_shard_and_slices_what_they_need() {
    let case = Case::new();
    let remote = Checkpoint::open(format!("{}/model.safetensors.index.json", case.url)).unwrap();
    for shard in SHARDS {
        let asked = case.asked(shard);
        assert_eq!(asked.len(), 1, "{asked:?}");
        assert_eq!(asked[0].0, 0);
    }
    case.server.clear_log();
    let huge = remote.get("huge").unwrap().file_range();
    let row = 2051 * 2;
    let loader = Loader::new().select("huge").slice("huge", 0, 10..20);
    loader.load(&remote).unwrap();
    assert!(case.asked(SHARDS[0]).is_empty());
    assert_eq!(case.asked(SHARDS[1]), [(huge.start + 10 * row, huge.start + 20 * row)]);
}

#[test]
fn ranks_ask_for_each_byte_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    dist_support::synth(&path, "llama-2-7b", |recipe| recipe.layers(1).shrink(4).shards(3));
    for entry in fs::read_dir(&path).unwrap() {
        let entry = entry.unwrap();
        fs::rename(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    fs::remove_dir(&path).unwrap();
    let case = Case::of(dir);
    let loader = |_| Loader::new().preset(Preset::llama());
    let remote = case.remote();
    let shards: Vec<String> = remote
        .shards()
        .iter()
        .map(|shard| {
            let path = shard.path().to_str().unwrap();
            path.strip_prefix(&case.server.origin()).unwrap().to_owned()
        })
        .collect();
    case.server.clear_log();
    let expected = dist_support::load(4, LONG, loader, |_| case.local());
    let found = dist_support::load(4, LONG, loader, |_| remote.clone());
    for (expected, found) in expected.into_iter().zip(found) {
        assert!(ours(&expected.unwrap()) == ours(&found.unwrap()));
    }
    for shard in shards {
        let asked = case.asked(&shard);
        assert!(!asked.is_empty());
        for pair in asked.windows(2) {
            assert!(pair[0].1 <= pair[1].0, "{shard}: {pair:?} asked for twice");
        }
    }
}

#[test]
fn a_simulated_device_gets_what_the_host_gets() {
    let Some(_sim) = gpu_support::machine() else { return };
    let case = Case::new();
    let remote = case.remote();
    for loader in [Loader::new(), Loader::new().dtype(Dtype::F32).slice("big", 1, 3..700)] {
        let host = loader.load(&case.local()).unwrap();
        let loader = loader.device(Device::cuda(0).unwrap());
        gpu_support::assert_same(&loader.load(&remote).unwrap(), &host, &"load");
        let stream = loader.clone().memory_budget(200 << 20).stream(&remote).unwrap();
        let tensors: Vec<_> = stream.map(Result::unwrap).collect();
        gpu_support::assert_same(&tensors, &host, &"stream");
        let error = loader.engine(Engine::Gds).load(&remote).unwrap_err();
        assert!(error.to_string().contains("local files only"), "{error}");
    }
}

#[test]
fn faults_are_survived_or_name_object_offset_and_tensor() {
    for fault in
        [Fault::Cut(100_000, true), Fault::Short, Fault::Status("503 Slow Down", "SlowDown", "")]
    {
        let case = Case::new();
        let remote = case.remote();
        SHARDS.iter().for_each(|shard| case.server.fault(shard, 0, 2, fault.clone()));
        let loaded = Loader::new().load(&remote).unwrap();
        assert!(ours(&loaded) == ours(&Loader::new().load(&case.local()).unwrap()), "{fault:?}");
    }
    for fault in [
        Fault::Long,
        Fault::WrongRange,
        Fault::Whole,
        Fault::Gzip,
        Fault::Status("403 Forbidden", "AccessDenied", ""),
        Fault::Status("404 Not Found", "NoSuchKey", ""),
    ] {
        let case = Case::new();
        let remote = case.remote();
        case.server.fault(SHARDS[1], 0, usize::MAX, fault.clone());
        let error = Loader::new().select("huge").load(&remote).unwrap_err();
        let Error::Io { tensor, source } = &error else { panic!("{fault:?}: {error:?}") };
        assert_eq!(tensor.as_deref(), Some("huge"), "{fault:?}: {error}");
        let fst::io::Error::Read { offset, .. } = source else { panic!("{source:?}") };
        assert!(remote.get("huge").unwrap().file_range().contains(offset), "{fault:?}");
        let text = error.to_string();
        assert!(text.starts_with(&(case.server.origin() + SHARDS[1])), "{text}");
    }
}

#[test]
fn another_object_is_refused_whenever_it_comes() {
    // Between the header and the first range, and at the end.
    for at_end in [false, true] {
        let case = Case::new();
        let remote = case.remote();
        let mut other = fs::read(case.local.join("b.safetensors")).unwrap();
        *other.last_mut().unwrap() ^= 1;
        if at_end {
            // The only request behind the data is the one at the end.
            let gets =
                Loader::new().load(&remote).map(|_| case.asked(SHARDS[1]).len() - 1).unwrap();
            case.server.fault(SHARDS[1], gets, 1, Fault::OtherTag);
        } else {
            case.server.put(SHARDS[1], other);
        }
        let error = Loader::new().load(&remote).unwrap_err();
        let changed = matches!(
            error,
            Error::Io {
                source: fst::io::Error::Changed { change: fst::io::Change::Version, .. },
                ..
            }
        );
        assert!(changed, "{at_end}: {error}");
    }
}

#[test]
fn a_flipped_byte_is_found_by_a_manifest() {
    let case = Case::new();
    let paths: Vec<PathBuf> =
        ["a", "b"].map(|n| case.local.join(format!("{n}.safetensors"))).into();
    let sums = official(&paths).into_iter();
    let sums = sums.map(|(name, (_, _, data))| Checksum::new(name, Digest::of(&data)));
    let loader = Loader::new().verify(Manifest::new(sums).unwrap());
    let remote = case.remote();
    loader.load(&remote).unwrap();
    case.server.fault(SHARDS[1], 0, 1, Fault::Flip);
    let error = loader.select("huge").load(&remote).unwrap_err();
    assert!(
        matches!(&error, Error::Verify(VerifyError::Mismatch { tensor, .. }) if tensor == "huge")
    );
}

#[test]
fn a_load_is_cancelled_in_a_stall() {
    let case = Case::new();
    let remote = case.remote();
    SHARDS.iter().for_each(|shard| case.server.fault(shard, 0, usize::MAX, Fault::StallHead));
    let cancel = CancelToken::new();
    let loader = Loader::new().cancel(cancel.clone());
    let load = thread::spawn(move || (loader.load(&remote).map(drop), Instant::now()));
    thread::sleep(Duration::from_millis(200));
    let at = Instant::now();
    cancel.cancel();
    let (result, ended) = load.join().unwrap();
    assert!(matches!(result, Err(Error::Cancelled)), "{result:?}");
    assert!(ended - at < Duration::from_secs(1), "{:?}", ended - at);
}

#[test]
fn engines_for_local_files_and_mappings_are_refused() {
    let case = Case::new();
    let remote = case.remote();
    for engine in [Engine::Uring, Engine::Pread, Engine::Mmap] {
        let error = Loader::new().engine(engine).load(&remote).unwrap_err();
        assert!(error.to_string().contains("local files only"), "{error}");
    }
    // SAFETY: nobody changes the files.
    let error = unsafe { Loader::new().map(&remote) }.unwrap_err();
    assert!(error.to_string().contains("no local file"), "{error}");
    let small = Request::new("scalar");
    Loader::new().reader(&remote).tensor(small).unwrap();
}
