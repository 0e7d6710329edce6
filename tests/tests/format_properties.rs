//! Properties of headers, written files and slices: generated cases against the official crate
//! and against slow versions that look at every element.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Write;
use std::ops::Range;

use fst_format::{
    Checkpoint, Cut, Dtype, Header, Layout, Slice, SliceError, TensorInfo, shard_file_name,
    write_index,
};
use proptest::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

/// A tensor's declaration and bytes.
#[derive(Clone, Debug)]
struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

fn dtype() -> impl Strategy<Value = Dtype> {
    proptest::sample::select(Dtype::ALL)
}

/// Names as real ones, and with all that JSON has to escape.
fn name() -> impl Strategy<Value = String> {
    prop_oneof![
        3 => "[a-z]{1,8}(\\.[0-9]{1,3})?\\.(weight|bias)",
        1 => any::<String>().prop_filter("reserved", |name| name != "__metadata__"),
    ]
}

/// Any shape, with empty and scalar ones; packed dtypes get whole bytes by a last dimension of 4.
fn tensor() -> impl Strategy<Value = Tensor> {
    (dtype(), prop::collection::vec(0usize..5, 0..5), any::<u8>()).prop_map(
        |(dtype, mut shape, fill)| {
            if dtype.bits() % 8 != 0 {
                shape.push(4);
            }
            let bits = shape.iter().product::<usize>() * dtype.bits() as usize;
            let bytes = (0..bits / 8).map(|i| fill.wrapping_add(i as u8)).collect();
            Tensor { dtype, shape, bytes }
        },
    )
}

type Tensors = BTreeMap<String, Tensor>;
type Metadata = BTreeMap<String, String>;

fn tensors() -> impl Strategy<Value = Tensors> {
    prop::collection::btree_map(name(), tensor(), 0..12)
}

fn metadata() -> impl Strategy<Value = Metadata> {
    prop::collection::btree_map(any::<String>(), any::<String>(), 0..4)
}

fn their_dtype(dtype: Dtype) -> safetensors::Dtype {
    serde_json::from_str(&format!("\"{dtype}\"")).unwrap()
}

fn written_by_official(tensors: &Tensors, metadata: &Metadata) -> Vec<u8> {
    let views = tensors.iter().map(|(name, t)| {
        let view = TensorView::new(their_dtype(t.dtype), t.shape.clone(), &t.bytes).unwrap();
        (name, view)
    });
    let metadata: HashMap<_, _> = metadata.clone().into_iter().collect();
    // With metadata that is there but empty, and no tensor, the official writer makes a header
    // that its own reader refuses.
    let metadata = (!metadata.is_empty()).then_some(metadata);
    safetensors::serialize(views, metadata).unwrap()
}

proptest! {
    #[test]
    fn what_the_official_writer_writes_is_read_as_written(
        tensors in tensors(),
        metadata in metadata(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.safetensors");
        let file = written_by_official(&tensors, &metadata);
        std::fs::write(&path, &file).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        let read = checkpoint.metadata().iter().map(|(k, v)| (k.to_owned(), v.to_owned()));
        prop_assert_eq!(read.collect::<Metadata>(), metadata);
        prop_assert_eq!(checkpoint.tensors().len(), tensors.len());
        for (name, tensor) in &tensors {
            let info = checkpoint.get(name).unwrap();
            let range = info.file_range();
            prop_assert_eq!(info.name(), name);
            prop_assert_eq!(info.dtype(), tensor.dtype);
            prop_assert_eq!(info.shape(), &tensor.shape[..]);
            prop_assert_eq!(info.elements(), tensor.shape.iter().product::<usize>() as u64);
            prop_assert_eq!(&file[range.start as usize..range.end as usize], &tensor.bytes[..]);
        }
        let ends = checkpoint.tensors().iter().map(|t| t.file_range().end);
        prop_assert!(ends.is_sorted());
    }

    #[test]
    fn what_the_writer_writes_is_read_by_the_official_reader(
        tensors in tensors(),
        metadata in metadata(),
        alignment in 0u64..200,
        pieces in 1usize..100,
    ) {
        let mut layout = Layout::new();
        layout.align_data(alignment);
        for (key, value) in &metadata {
            layout.metadata(key, value);
        }
        for (name, t) in &tensors {
            layout.tensor(name, t.dtype, &t.shape).unwrap();
        }
        let bytes: Vec<u8> = tensors.values().flat_map(|t| t.bytes.clone()).collect();
        prop_assert_eq!(layout.data_len(), bytes.len() as u64);
        let mut writer = layout.write_to(Vec::new()).unwrap();
        for piece in bytes.chunks(pieces) {
            writer.write_all(piece).unwrap();
        }
        let file = writer.finish().unwrap();
        prop_assert_eq!((file.len() - bytes.len()) as u64 % alignment.max(1), 0);

        let read = SafeTensors::deserialize(&file).unwrap();
        prop_assert_eq!(read.len(), tensors.len());
        for (name, t) in &tensors {
            let view = read.tensor(name).unwrap();
            prop_assert_eq!(view.dtype(), their_dtype(t.dtype));
            prop_assert_eq!(view.shape(), &t.shape[..]);
            prop_assert_eq!(view.data(), &t.bytes[..]);
        }
        let (_, header) = SafeTensors::read_metadata(&file).unwrap();
        let own: Metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
        prop_assert_eq!(own, metadata);
        // Order is that of the declarations.
        let start = file.len() - bytes.len();
        let ours = Header::parse(&file[8..start], bytes.len() as u64).unwrap();
        let with_bytes = |name: &&str| !tensors[*name].bytes.is_empty();
        let names: Vec<&str> = ours.tensors().map(|t| t.name()).filter(with_bytes).collect();
        let declared: Vec<&str> = tensors.keys().map(String::as_str).filter(with_bytes).collect();
        prop_assert_eq!(names, declared);
    }

    #[test]
    fn an_index_that_we_write_opens(split in 1usize..6, count in 1usize..20) {
        let folder = tempfile::tempdir().unwrap();
        let names: Vec<String> = (0..count).map(|i| format!("t{i}")).collect();
        let shards: Vec<&[String]> = names.chunks(split).collect();
        let mut map = Vec::new();
        for (i, shard) in shards.iter().enumerate() {
            let file_name = shard_file_name(i, shards.len());
            let mut layout = Layout::new();
            for name in *shard {
                layout.tensor(name, Dtype::I16, &[3]).unwrap();
                map.push((name.clone(), file_name.clone()));
            }
            let file = File::create(folder.path().join(file_name)).unwrap();
            let mut writer = layout.write_to(file).unwrap();
            for _ in *shard {
                writer.write_tensor(&[7; 6]).unwrap();
            }
            writer.finish().unwrap();
        }
        let path = write_index(folder.path(), map, 6 * count as u64).unwrap();
        for path in [path.as_path(), folder.path()] {
            let checkpoint = Checkpoint::open(path).unwrap();
            prop_assert_eq!(checkpoint.shards().len(), shards.len());
            prop_assert_eq!(checkpoint.byte_len(), 6 * count as u64);
            let found: Vec<&str> = checkpoint.tensors().iter().map(TensorInfo::name).collect();
            prop_assert_eq!(&found, &names);
            prop_assert!(checkpoint.shards().iter().all(|s| s.data_start() == 4096));
        }
    }
}

/// A tensor in a file that is a header and a hole.
fn declared(dtype: Dtype, shape: &[usize]) -> TensorInfo {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let mut layout = Layout::new();
    layout.tensor("t", dtype, shape).unwrap();
    let mut file = File::create(&path).unwrap();
    let header = layout.header_bytes().unwrap();
    file.write_all(&header).unwrap();
    file.set_len(header.len() as u64 + layout.data_len()).unwrap();
    Checkpoint::open(path).unwrap().get("t").unwrap().clone()
}

/// The bytes of a slice found by walking all elements of the tensor, as byte ranges that do not
/// touch; `None` where they are no whole bytes.
fn runs_by_element(bits: usize, shape: &[usize], cuts: &[Cut]) -> Option<Vec<Range<u64>>> {
    let mut kept = vec![0];
    for (dim, &len) in shape.iter().enumerate() {
        let own = || cuts.iter().filter(|cut| cut.dim == dim);
        let mut positions: Vec<usize> =
            own().flat_map(|cut| cut.range.clone().step_by(cut.step.get())).collect();
        if own().next().is_none() {
            positions = (0..len).collect();
        }
        let inner = |element: usize| positions.iter().map(move |at| element * len + at);
        kept = kept.into_iter().flat_map(inner).collect();
    }
    let bits: Vec<usize> = kept.into_iter().flat_map(|e| e * bits..(e + 1) * bits).collect();
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for byte in bits.chunks(8) {
        if byte.len() != 8 || byte[0] % 8 != 0 || byte.windows(2).any(|w| w[1] != w[0] + 1) {
            return None;
        }
        let at = byte[0] as u64 / 8;
        match ranges.last_mut() {
            Some(last) if last.end == at => last.end += 1,
            _ => ranges.push(at..at + 1),
        }
    }
    Some(ranges)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn slices_are_the_runs_that_walking_all_elements_finds(
        dtype in prop_oneof![
            dtype(),
            proptest::sample::select(&[Dtype::F4, Dtype::F6E2M3, Dtype::F6E3M2][..]),
        ],
        shape in prop::collection::vec(prop_oneof![9 => 1usize..7, 1 => Just(0)], 1..5),
        cuts in prop::collection::vec((any::<[prop::sample::Index; 3]>(), 1usize..4), 0..4),
    ) {
        let mut shape = shape;
        if !(shape.iter().product::<usize>() * dtype.bits() as usize).is_multiple_of(8) {
            shape[0] *= 4;
        }
        let cut = |([dim, a, b], step): ([prop::sample::Index; 3], usize)| {
            let dim = dim.index(shape.len());
            let (a, b) = (a.index(shape[dim] + 1), b.index(shape[dim] + 1));
            Cut { dim, range: a.min(b)..a.max(b), step: step.try_into().unwrap() }
        };
        let cuts: Vec<Cut> = cuts.into_iter().map(cut).collect();
        let tensor = declared(dtype, &shape);
        let slice = Slice::new(&tensor, cuts.clone());
        match runs_by_element(dtype.bits() as usize, &shape, &cuts) {
            Some(expected) => {
                let slice = slice.unwrap();
                let mut ranges: Vec<Range<u64>> = Vec::new();
                for range in slice.ranges() {
                    match ranges.last_mut() {
                        Some(last) if last.end == range.start => last.end = range.end,
                        _ => ranges.push(range),
                    }
                }
                prop_assert_eq!(&ranges, &expected);
                if ranges.len() < 2 {
                    prop_assert_eq!(slice.runs().len(), ranges.len());
                }
                let byte_len: u64 = expected.iter().map(|r| r.end - r.start).sum();
                prop_assert_eq!(slice.byte_len(), byte_len);
                let extent = |(dim, len): (usize, &usize)| {
                    let own: Vec<_> = cuts.iter().filter(|cut| cut.dim == dim).collect();
                    if own.is_empty() { *len } else { own.iter().map(|cut| cut.len()).sum() }
                };
                let cut: Vec<usize> = shape.iter().enumerate().map(extent).collect();
                prop_assert_eq!(slice.shape(), &cut[..]);
            }
            None => {
                let refused = matches!(slice, Err(SliceError::PartialByte { .. }));
                prop_assert!(refused, "{:?}", slice);
            }
        }
    }
}

#[test]
fn slices_outside_of_the_tensor_are_refused() {
    let tensor = declared(Dtype::F32, &[2, 3]);
    let error = tensor.slice(2, 0..1).unwrap_err();
    assert_eq!(error.to_string(), r#"tensor "t": no dimension 2: it has 2, counted from 0"#);
    #[expect(clippy::reversed_empty_ranges)]
    for range in [0..4, 4..4, 2..1, usize::MAX..usize::MAX, 0..usize::MAX] {
        let error = tensor.slice(1, range.clone()).unwrap_err();
        let expected =
            SliceError::OutOfRange { tensor: "t".into(), dim: 1, range: range.clone(), len: 3 };
        assert_eq!(error, expected);
    }
    let scalar = declared(Dtype::F32, &[]);
    assert!(matches!(scalar.slice(0, 0..0), Err(SliceError::NoSuchDim { rank: 0, .. })));
}

#[test]
fn slices_of_tensors_larger_than_any_file_do_not_overflow() {
    // An empty tensor may have dimensions whose product no integer holds.
    let huge = usize::MAX;
    let tensor = declared(Dtype::F64, &[0, huge, huge]);
    assert_eq!(tensor.elements(), 0);
    assert_eq!(tensor.slice(1, 3..huge).unwrap().runs(), []);
    let twice = Slice::new(&tensor, [(1, 0..huge), (1, 0..1)]).unwrap_err();
    assert!(matches!(twice, SliceError::TooLong { .. }), "{twice}");
    assert_eq!(tensor.slice(0, 0..0).unwrap().shape(), [0, huge, huge]);
}
