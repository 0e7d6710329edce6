//! Properties of headers, written files and slices: generated cases against the official crate
//! and against slow versions that look at every element.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Write;
use std::ops::Range;

use fst_format::{
    Checkpoint, Dtype, Header, Layout, Runs, SliceError, TensorInfo, shard_file_name, write_index,
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
fn runs_by_element(
    bits: usize,
    shape: &[usize],
    dim: usize,
    range: &Range<usize>,
) -> Option<Vec<Range<u64>>> {
    let inner: usize = shape[dim + 1..].iter().product();
    let elements: usize = shape.iter().product();
    let kept = (0..elements).filter(|e| range.contains(&(e / inner.max(1) % shape[dim].max(1))));
    let bits: Vec<usize> = kept.flat_map(|e| e * bits..(e + 1) * bits).collect();
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
        dim in any::<prop::sample::Index>(),
        a in any::<prop::sample::Index>(),
        b in any::<prop::sample::Index>(),
    ) {
        let mut shape = shape;
        if !(shape.iter().product::<usize>() * dtype.bits() as usize).is_multiple_of(8) {
            shape[0] *= 4;
        }
        let dim = dim.index(shape.len());
        let (a, b) = (a.index(shape[dim] + 1), b.index(shape[dim] + 1));
        let range = a.min(b)..a.max(b);
        let tensor = declared(dtype, &shape);
        let slice = tensor.slice(dim, range.clone());
        match runs_by_element(dtype.bits() as usize, &shape, dim, &range) {
            Some(expected) => {
                let slice = slice.unwrap();
                let runs: Vec<_> = slice.runs().iter().collect();
                prop_assert_eq!(slice.runs().count, expected.len() as u64);
                prop_assert_eq!(&runs, &expected);
                let byte_len: u64 = expected.iter().map(|r| r.end - r.start).sum();
                prop_assert_eq!(slice.byte_len(), byte_len);
                let mut cut = shape.clone();
                cut[dim] = range.len();
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
    assert_eq!(tensor.slice(1, 3..huge).unwrap().runs(), Runs::default());
    assert_eq!(tensor.slice(0, 0..0).unwrap().shape(), [0, huge, huge]);
}
