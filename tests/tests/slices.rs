//! Parts of tensors (ranges of several dimensions, several ranges of one), by every way into memory, held to a
//! gather that goes index by index.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::HashMap;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;

use fst::format::SliceError;
use fst::{Checkpoint, Destination, Digest, Dtype, Error, Loader, Request, SelectError};
use fst_tests::noise;
use half::bf16;
use proptest::prelude::*;

type Cuts = Vec<(usize, Range<usize>)>;

/// A tensor of a file, and what is wanted of it.
#[derive(Debug, Clone)]
struct Case {
    dtype: Dtype,
    shape: Vec<usize>,
    cuts: Cuts,
    convert: bool,
}

impl Case {
    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bits() as usize / 8
    }

    fn target(&self) -> Option<Dtype> {
        match self.dtype {
            Dtype::BF16 => Some(Dtype::F32),
            Dtype::F32 => Some(Dtype::F64),
            _ => None,
        }
        .filter(|_| self.convert)
    }

    fn request(&self, index: usize) -> Request {
        let request = Request::new(format!("t{index}"));
        let request = self.target().into_iter().fold(request, Request::dtype);
        self.cuts.iter().fold(request, |request, (dim, range)| request.slice(*dim, range.clone()))
    }

    /// Shape and bytes of what is wanted; no bytes where these are no whole ones.
    fn wanted(&self, data: &[u8]) -> (Vec<usize>, Option<Vec<u8>>) {
        let mut elements = vec![0];
        let mut shape = Vec::new();
        for (dim, &len) in self.shape.iter().enumerate() {
            let mut positions: Vec<usize> =
                self.cuts.iter().filter(|cut| cut.0 == dim).flat_map(|cut| cut.1.clone()).collect();
            if !self.cuts.iter().any(|cut| cut.0 == dim) {
                positions = (0..len).collect();
            }
            shape.push(positions.len());
            let inner = |element: usize| positions.iter().map(move |at| element * len + at);
            elements = elements.into_iter().flat_map(inner).collect();
        }
        let bits = self.dtype.bits() as usize;
        let all: Vec<usize> = elements.iter().flat_map(|e| e * bits..(e + 1) * bits).collect();
        let whole = |byte: &[usize]| {
            let one = byte.len() == 8 && byte[0].is_multiple_of(8) && byte[7] == byte[0] + 7;
            one.then(|| data[byte[0] / 8])
        };
        let bytes: Option<Vec<u8>> = all.chunks(8).map(whole).collect();
        let convert = |bytes: Vec<u8>| match self.target() {
            Some(Dtype::F32) => {
                let halves = bytes.chunks(2).map(|b| bf16::from_le_bytes([b[0], b[1]]));
                halves.flat_map(|half| half.to_f32().to_le_bytes()).collect()
            }
            Some(_) => {
                let floats = bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
                floats.flat_map(|float| f64::from(float).to_le_bytes()).collect()
            }
            None => bytes,
        };
        (shape, bytes.map(convert))
    }
}

/// Writes the tensors; data starts at an odd byte if asked.
fn write(path: &Path, cases: &[Case], odd: bool) -> Vec<Vec<u8>> {
    let mut data = Vec::new();
    let mut all = Vec::new();
    let mut header = Vec::new();
    for (index, case) in cases.iter().enumerate() {
        let mut bytes = noise(case.bytes(), index as u64 + 1);
        if case.target().is_some() {
            // No exponent of all ones: what becomes of a NaN's bits is not what is tested here.
            let size = case.dtype.bits() as usize / 8;
            bytes.iter_mut().skip(size - 1).step_by(size).for_each(|byte| *byte &= 0xbf);
        }
        let (start, end) = (data.len(), data.len() + bytes.len());
        header.push(format!(
            r#""t{index}":{{"dtype":"{}","shape":{:?},"data_offsets":[{start},{end}]}}"#,
            case.dtype, case.shape
        ));
        data.extend(&bytes);
        all.push(bytes);
    }
    let mut header = format!("{{{}}}", header.join(","));
    while header.len() % 8 != usize::from(odd) {
        header.push(' ');
    }
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(&data);
    fs::write(path, file).unwrap();
    all
}

/// Loads the cases by every way.
fn check(cases: &[Case], odd: bool) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let data = write(&path, cases, odd);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let reader = Loader::new().reader(&checkpoint);
    let mut wanted: HashMap<String, (Vec<usize>, Vec<u8>)> = HashMap::new();
    let mut requests = Vec::new();
    for (index, (case, data)) in cases.iter().zip(&data).enumerate() {
        let (shape, bytes) = case.wanted(data);
        let request = case.request(index);
        match bytes {
            Some(bytes) => {
                wanted.insert(format!("t{index}"), (shape, bytes));
                requests.push(request);
            }
            None => {
                let error = reader.planned(request).unwrap_err();
                let partial =
                    SliceError::PartialByte { tensor: String::new(), dtype: case.dtype, bit: 0 };
                let Error::Select(SelectError::Slice(error)) = error else { panic!("{error}") };
                assert_eq!(std::mem::discriminant(&error), std::mem::discriminant(&partial));
            }
        }
    }
    let same = |name: &str, bytes: &[u8], way: &str| {
        assert!(bytes == wanted[name].1, "{name} by {way} of {cases:?}");
    };
    let loader = Loader::new().request(requests.clone());
    let loaded = loader.load(&checkpoint).unwrap();
    assert_eq!(loaded.len(), wanted.len());
    for tensor in &loaded {
        assert_eq!(tensor.shape(), wanted[tensor.name()].0, "{cases:?}");
        same(tensor.name(), tensor.bytes().unwrap(), "load");
    }

    let mut memory: Vec<(&String, Vec<u8>)> =
        wanted.iter().map(|(name, (_, bytes))| (name, vec![0xee; bytes.len()])).collect();
    let places = memory.iter_mut().map(|(name, bytes)| (*name, Destination::from(bytes)));
    loader.load_into(&checkpoint, places).unwrap();
    memory.iter().for_each(|(name, bytes)| same(name, bytes, "load_into"));

    let seen = Mutex::new(0);
    let landed = |planned: &fst::Planned, filled: fst::Filled<Vec<u8>>| {
        same(planned.name(), &filled.into_vec(), "load_owned");
        *seen.lock().unwrap() += 1;
    };
    let room = |planned: &fst::Planned| Vec::with_capacity(planned.byte_len() as usize);
    loader.load_owned(&checkpoint, room, landed).unwrap();
    assert_eq!(seen.into_inner().unwrap(), wanted.len());

    for request in requests {
        let planned = reader.planned(request.clone()).unwrap();
        let mut bytes = vec![0xee; planned.byte_len() as usize];
        reader.read(request.clone(), &mut bytes).unwrap();
        same(planned.name(), &bytes, "Reader::read");
        same(planned.name(), reader.tensor(request).unwrap().bytes().unwrap(), "Reader::tensor");
    }

    let loading = loader.start(&checkpoint).unwrap();
    for name in wanted.keys() {
        same(name, loading.take(name).unwrap().bytes().unwrap(), "start");
    }
    for tensor in loader.clone().in_order(true).stream(&checkpoint).unwrap() {
        let tensor = tensor.unwrap();
        same(tensor.name(), tensor.bytes().unwrap(), "stream");
    }
    for sum in loader.checksums(&checkpoint, |_| {}).unwrap() {
        assert_eq!(sum.sha256, Digest::of(&wanted[&sum.name].1), "{} of {cases:?}", sum.name);
    }
    // SAFETY: nobody else knows the file.
    for tensor in &unsafe { loader.map(&checkpoint) }.unwrap() {
        same(tensor.name(), tensor.bytes().unwrap(), "map");
    }
}

fn case() -> impl Strategy<Value = Case> {
    let dtype =
        prop::sample::select(vec![Dtype::U8, Dtype::BF16, Dtype::F32, Dtype::F64, Dtype::F4]);
    let shape = prop::collection::vec(prop_oneof![9 => 1usize..8, 1 => Just(0)], 1..5);
    let cut = (any::<prop::sample::Index>(), any::<[prop::sample::Index; 2]>());
    let cuts = prop::collection::vec(cut, 0..5);
    (dtype, shape, cuts, any::<bool>()).prop_map(|(dtype, mut shape, cuts, convert)| {
        if dtype == Dtype::F4 {
            *shape.last_mut().unwrap() *= 2;
        }
        let cut = |(dim, [a, b]): (prop::sample::Index, [prop::sample::Index; 2])| {
            let dim = dim.index(shape.len());
            let (a, b) = (a.index(shape[dim] + 1), b.index(shape[dim] + 1));
            (dim, a.min(b)..a.max(b))
        };
        let cuts = cuts.into_iter().map(cut).collect();
        Case { dtype, shape, cuts, convert }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_cuts_are_what_a_gather_gives(
        cases in prop::collection::vec(case(), 1..6), odd in any::<bool>(),
    ) {
        check(&cases, odd);
    }
}

#[test]
fn cuts_of_large_tensors_are_what_a_gather_gives() {
    let all: [Cuts; 6] = [
        vec![(0, 1000..1500), (0, 100..600)],
        vec![(1, 2..700), (0, 7..1900), (1, 701..1024)],
        vec![(1, 900..1000), (1, 0..3), (1, 950..1024)],
        vec![(0, 0..2), (0, 1998..2000), (1, 5..6), (1, 1000..1001)],
        vec![(0, 0..2000), (0, 0..2000)],
        vec![(1, 0..512), (1, 512..1024)],
    ];
    for odd in [false, true] {
        let of = |(index, cuts): (usize, &Cuts)| {
            let (dtype, shape) = (Dtype::BF16, vec![2000, 1024]);
            Case { dtype, shape, cuts: cuts.clone(), convert: (index % 2 == 0) == odd }
        };
        let mut cases: Vec<Case> = all.iter().enumerate().map(of).collect();
        let stack = vec![(0, 3..5), (1, 100..333), (2, 1..200), (0, 0..1)];
        let shape = vec![6, 400, 256];
        cases.push(Case { dtype: Dtype::F32, shape, cuts: stack, convert: odd });
        check(&cases, odd);
    }
}

/// Of a tensor of 20 MiB, no more is read than what is wanted and what lies between that is close.
#[test]
fn only_what_is_wanted_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let case = Case { dtype: Dtype::U8, shape: vec![20, 1 << 20], cuts: vec![], convert: false };
    write(&path, std::slice::from_ref(&case), false);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let read = |cuts: Cuts| {
        let request = Case { cuts, ..case.clone() }.request(0);
        let tensors = Loader::new().request([request]).load(&checkpoint).unwrap();
        let report = tensors.report();
        (report.bytes, report.bytes_read)
    };
    // Two megabytes of each of three rows, in any order; at most a block at each end of them is aligned.
    let (bytes, bytes_read) =
        read(vec![(0, 9..11), (0, 2..3), (1, 0..1 << 17), (1, 3 << 18..7 << 17)]);
    assert_eq!(bytes, 6 << 17);
    assert!((bytes..bytes + (6 << 14)).contains(&bytes_read), "{bytes_read}");
    // What overlaps is read once.
    let (bytes, bytes_read) = read(vec![(0, 1..3), (0, 2..4), (0, 0..3)]);
    assert_eq!(bytes, 7 << 20);
    assert!((4 << 20..(4 << 20) + (1 << 14)).contains(&bytes_read), "{bytes_read}");
}
