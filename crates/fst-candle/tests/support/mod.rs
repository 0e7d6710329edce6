//! What the tests have in common: checkpoints, and tensors as bytes.

#![allow(dead_code, reason = "no test file uses all of it")]

use std::collections::HashMap;
use std::path::Path;

use candle_core::{CpuStorage, DType, Storage, Tensor};
use fst::Dtype;
use fst::format::{Layout, shard_file_name, write_index};

/// A tensor to write: name, type, shape and bytes.
#[derive(Clone)]
pub(crate) struct Given(
    pub(crate) String,
    pub(crate) Dtype,
    pub(crate) Vec<usize>,
    pub(crate) Vec<u8>,
);

/// Bytes that look random.
pub(crate) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len).map(next).collect()
}

/// A tensor of noise.
pub(crate) fn given(name: &str, dtype: Dtype, shape: &[usize]) -> Given {
    let elements: usize = shape.iter().product();
    let bytes = elements * dtype.bits() as usize / 8;
    let seed = name.bytes().fold(7u64, |sum, byte| sum.wrapping_mul(31) + u64::from(byte));
    Given(name.to_owned(), dtype, shape.to_vec(), noise(bytes, seed))
}

/// Writes one file; its data starts where a reader with alignment finds the edges ragged.
pub(crate) fn write_file(path: &Path, tensors: &[Given]) {
    let mut layout = Layout::new();
    layout.align_data(8);
    for Given(name, dtype, shape, _) in tensors {
        layout.tensor(name, *dtype, shape).unwrap();
    }
    let mut writer = layout.write_to(std::fs::File::create(path).unwrap()).unwrap();
    for Given(.., bytes) in tensors {
        writer.write_tensor(bytes).unwrap();
    }
    writer.finish().unwrap();
}

/// Writes shards and their index. The files' paths.
pub(crate) fn write_shards(folder: &Path, shards: &[Vec<Given>]) -> Vec<std::path::PathBuf> {
    let mut map = HashMap::new();
    let mut paths = Vec::new();
    for (index, tensors) in shards.iter().enumerate() {
        let file = shard_file_name(index, shards.len());
        write_file(&folder.join(&file), tensors);
        map.extend(tensors.iter().map(|given| (given.0.clone(), file.clone())));
        paths.push(folder.join(file));
    }
    let total = shards.iter().flatten().map(|given| given.3.len() as u64).sum();
    write_index(folder, map, total).unwrap();
    paths
}

/// The elements of a tensor as numbers, for which NaN equals NaN: bits otherwise.
pub(crate) fn elements(tensor: &Tensor) -> Vec<u64> {
    let tensor = tensor.contiguous().unwrap();
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { panic!("not on the host") };
    let (from, count) = (layout.start_offset(), layout.shape().elem_count());
    macro_rules! plain {
        ($vec:expr, $to:expr) => {
            $vec[from..from + count].iter().map($to).collect()
        };
    }
    macro_rules! float {
        ($vec:expr) => {
            plain!($vec, |v| if v.is_nan() { u64::MAX } else { u64::from(v.to_bits()) })
        };
    }
    match storage {
        CpuStorage::U8(vec) => plain!(vec, |v| u64::from(*v)),
        CpuStorage::U32(vec) => plain!(vec, |v| u64::from(*v)),
        CpuStorage::I16(vec) => plain!(vec, |v| *v as u64),
        CpuStorage::I32(vec) => plain!(vec, |v| *v as u64),
        CpuStorage::I64(vec) => plain!(vec, |v| *v as u64),
        CpuStorage::BF16(vec) => float!(vec),
        CpuStorage::F16(vec) => float!(vec),
        CpuStorage::F32(vec) => float!(vec),
        CpuStorage::F64(vec) => float!(vec),
        CpuStorage::F8E4M3(vec) => float!(vec),
        // Packed elements: all the bytes there are.
        CpuStorage::F6E2M3(vec)
        | CpuStorage::F6E3M2(vec)
        | CpuStorage::F4(vec)
        | CpuStorage::F8E8M0(vec) => vec.iter().map(|v| u64::from(*v)).collect(),
    }
}

/// Whether two tensors are the same in type, shape and elements.
#[track_caller]
pub(crate) fn assert_same(ours: &Tensor, candles: &Tensor, what: &str) {
    assert_eq!(ours.dtype(), candles.dtype(), "{what}");
    assert_eq!(ours.dims(), candles.dims(), "{what}");
    let (ours, candles) = (elements(ours), elements(candles));
    assert_eq!(ours.len(), candles.len(), "{what}");
    if let Some(at) = (0..ours.len()).find(|at| ours[*at] != candles[*at]) {
        panic!("{what}: element {at} is {:#x}, not {:#x}", ours[at], candles[at]);
    }
}

/// Where a tensor's elements are in memory.
pub(crate) fn address(tensor: &Tensor) -> usize {
    let (storage, _) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(CpuStorage::BF16(vec)) => vec.as_ptr() as usize,
        Storage::Cpu(CpuStorage::F32(vec)) => vec.as_ptr() as usize,
        Storage::Cpu(CpuStorage::U8(vec)) => vec.as_ptr() as usize,
        _ => panic!("no address of {:?}", tensor.dtype()),
    }
}

/// Every type of candle's.
pub(crate) const DTYPES: [DType; 14] = [
    DType::U8,
    DType::U32,
    DType::I16,
    DType::I32,
    DType::I64,
    DType::BF16,
    DType::F16,
    DType::F32,
    DType::F64,
    DType::F8E4M3,
    DType::F6E2M3,
    DType::F6E3M2,
    DType::F4,
    DType::F8E8M0,
];

/// An error without the backtrace that candle adds to it where the environment asks for one.
pub(crate) fn plain(error: candle_core::Error) -> candle_core::Error {
    match error {
        candle_core::Error::WithBacktrace { inner, .. } => *inner,
        error => error,
    }
}
