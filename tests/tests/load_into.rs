//! Loads into the caller's memory, held to the official `safetensors` crate byte for byte.

#![allow(clippy::unwrap_used, clippy::panic)]

mod load_support;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use fst::io::SourceFile;
use fst::{CancelToken, Checkpoint, Destination, Dtype, Error, Loader};
use half::bf16;

use load_support::*;

/// Takes files out of the page cache, as far as the file system does that.
fn chill(paths: &[PathBuf]) {
    for path in paths {
        let file = File::open(path).unwrap();
        file.sync_all().unwrap();
        // SAFETY: advice on an open file touches no memory of this process.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    }
}

/// Memory whose every tensor starts `skew` bytes after an address that equals its file offset
/// modulo 4096; starts as 0xee.
struct Room {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Room {
    fn new(offset: u64, len: usize, skew: usize) -> Self {
        let bytes = vec![0xee; len + 8192];
        let phase = (offset as usize + skew) % 4096;
        let start = (phase + 4096 - bytes.as_ptr() as usize % 4096) % 4096;
        Self { bytes, start, len }
    }

    fn memory(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }

    /// Nothing around the memory was touched.
    fn check(&self, want: &[u8], what: &str) {
        let (before, rest) = self.bytes.split_at(self.start);
        let (memory, after) = rest.split_at(self.len);
        assert!(memory == want, "{what}");
        assert!(before.iter().chain(after).all(|byte| *byte == 0xee), "around {what}");
    }
}

#[test]
fn any_memory_receives_what_the_official_crate_reads() {
    let dir = tempfile::tempdir().unwrap();
    let paths = checkpoint(dir.path());
    let want = official(&paths);
    let checkpoint = Checkpoint::open_all(&paths).unwrap();
    let first = SourceFile::open(&paths[0], None).unwrap();
    let direct = first.direct().is_some() && first.memory_align() <= 512;
    for engine in ENGINES {
        for (skew, cold) in [(0, true), (0, false), (512, true), (1, true), (1, false), (16, true)]
        {
            if cold {
                chill(&paths);
            }
            let mut rooms: BTreeMap<&str, Room> = checkpoint
                .tensors()
                .iter()
                .map(|t| (t.name(), Room::new(t.file_range().start, t.byte_len() as usize, skew)))
                .collect();
            let destinations = rooms.iter_mut().map(|(name, room)| (*name, room.memory()));
            let loader = Loader::new().engine(engine).workers(2);
            let report = loader.load_into(&checkpoint, destinations).unwrap();
            for (name, room) in &rooms {
                room.check(&want[*name].2, &format!("{name} {engine} {skew} {cold}"));
            }
            let bytes = want.values().map(|(_, _, data)| data.len() as u64).sum::<u64>();
            assert_eq!((report.tensors, report.bytes, report.bytes_asked), (10, bytes, bytes));
            assert!(report.stage("read").unwrap().bytes >= bytes);
            // Long reads in place or, of cold files into memory that direct I/O cannot use, shorter
            // ones through scratch. Of files that are partly cached, either.
            let cold = report.resident_bytes == Some(0);
            let warm = report.resident_bytes == Some(report.file_bytes);
            match skew {
                0 | 512 if direct && cold => assert_eq!(report.block_bytes, 4 << 20),
                1 if direct && cold => assert_eq!(report.block_bytes, 512 << 10),
                1 if warm => assert_eq!(report.block_bytes, 4 << 20),
                _ => {}
            }
        }
    }
}

#[test]
fn slices_and_conversions_arrive_in_the_caller_s_memory() {
    let dir = tempfile::tempdir().unwrap();
    let paths = checkpoint(dir.path());
    let checkpoint = Checkpoint::open_all(&paths).unwrap();
    let loader = Loader::new().dtype(Dtype::F32).slice("huge", 1, 3..500).slice("wide", 0, 1..2);
    let owned = loader.load(&checkpoint).unwrap();
    let mut memory: Vec<(String, Vec<MaybeUninit<u8>>)> = owned
        .iter()
        .map(|t| (t.name().to_owned(), Vec::with_capacity(t.byte_len())))
        .map(|(name, vec): (_, Vec<u8>)| (name, vec.capacity()))
        .map(|(name, len)| (name, vec![MaybeUninit::uninit(); len]))
        .collect();
    let report = loader
        .load_into(&checkpoint, memory.iter_mut().map(|(name, vec)| (name, vec.as_mut_slice())))
        .unwrap();
    assert_eq!(report.bytes, owned.report().bytes);
    for (name, vec) in memory {
        // SAFETY: the load succeeded.
        let bytes: Vec<u8> = vec.iter().map(|b| unsafe { b.assume_init() }).collect();
        assert!(bytes == owned.get(&name).unwrap().bytes().unwrap(), "{name}");
    }
}

#[test]
fn elements_are_typed_and_destinations_choose() {
    let dir = tempfile::tempdir().unwrap();
    let paths = checkpoint(dir.path());
    let want = official(&paths);
    let checkpoint = Checkpoint::open_all(&paths).unwrap();
    let mut ids = [0i64; 9];
    let mut big = vec![bf16::ZERO; 1500 * 1001];
    let destinations =
        [("ids", Destination::elements(&mut ids)), ("big", Destination::elements(&mut big))];
    let report = Loader::new().load_into(&checkpoint, destinations).unwrap();
    assert_eq!(report.tensors, 2);
    assert!(report.bytes_read < 4 << 20);
    let expected: Vec<i64> =
        want["ids"].2.chunks(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!(ids[..], expected);
    let at = 1_000_001;
    assert_eq!(big[at].to_bits().to_le_bytes(), want["big"].2[2 * at..2 * at + 2]);

    let nothing: [(&str, &mut [u8]); 0] = [];
    assert_eq!(Loader::new().load_into(&checkpoint, nothing).unwrap().bytes, 0);
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let paths = checkpoint(dir.path());
    let checkpoint = Checkpoint::open_all(&paths).unwrap();
    let mut ids = [7u8; 72];
    let mut bytes = [7u8; 34];
    fn pair<'d>(ids: &'d mut [u8], bytes: &'d mut [u8]) -> [(&'static str, Destination<'d>); 2] {
        [("ids", ids.into()), ("bytes", bytes.into())]
    }
    let error =
        Loader::new().load_into(&checkpoint, pair(&mut ids[..], &mut bytes[..])).unwrap_err();
    assert!(
        matches!(&error, Error::DestinationLength { tensor, expected: 33, found: 34 } if tensor == "bytes"),
        "{error}"
    );
    let loader = Loader::new().select("i*");
    let error = loader.load_into(&checkpoint, pair(&mut ids[..], &mut bytes[..33])).unwrap_err();
    assert!(matches!(&error, Error::NotSelected { tensor } if tensor == "bytes"), "{error}");
    let twice = {
        let (a, b) = bytes.split_at_mut(17);
        [("ids", a), ("ids", b)]
    };
    let error = Loader::new().load_into(&checkpoint, twice).unwrap_err();
    assert!(matches!(&error, Error::DuplicateDestination { tensor } if tensor == "ids"));
    let error = Loader::new().load_into(&checkpoint, [("idz", &mut ids[..])]).unwrap_err();
    assert!(matches!(&error, Error::UnknownTensor { name } if name == "idz"));
    let mut typed = [0u64; 9];
    let wrong = [("ids", Destination::elements(&mut typed))];
    let error = Loader::new().load_into(&checkpoint, wrong).unwrap_err();
    assert!(matches!(&error, Error::WrongDtype { asked: Dtype::U64, found: Dtype::I64, .. }));
    let token = CancelToken::new();
    token.cancel();
    let one = [("bytes", &mut bytes[..33])];
    let error = Loader::new().cancel(token).load_into(&checkpoint, one).unwrap_err();
    assert!(matches!(error, Error::Cancelled));
    assert_eq!((typed, ids, bytes), ([0; 9], [7; 72], [7; 34]));
    let file = fs::File::options().write(true).open(&paths[1]).unwrap();
    file.set_len(100_000).unwrap();
    let error = Loader::new().load_into(&checkpoint, [("ids", &mut ids[..])]).unwrap_err();
    assert!(error.to_string().contains("b.safetensors"), "{error}");
}
