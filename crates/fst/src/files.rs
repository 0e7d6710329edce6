//! The files of a checkpoint, what of them items are, and which tensor an error hit.

use std::sync::Arc;

use fst_format::{Checkpoint, Dtype, Planned, TensorInfo};
use fst_gpu::cast::{self, CastType};
use fst_gpu::{LoadError, Piece, PieceError, Runs};
use fst_io::SourceFile;
use fst_io::sink::SinkError;

use crate::error::{DeviceError, Error, Result};
use crate::remote;

/// Opens the files that items have bytes in; says for each shard which of them it is.
pub(crate) fn open_files(
    checkpoint: &Checkpoint,
    items: &[Planned],
) -> Result<(Vec<SourceFile>, Vec<Option<u32>>)> {
    open_shards(checkpoint, items, shards_of(items))
}

/// The shards that items have bytes in, in the order of the items, some more than once.
pub(crate) fn shards_of(items: &[Planned]) -> impl Iterator<Item = usize> {
    items.iter().filter(|item| item.source_len() > 0).map(|item| item.source().shard())
}

/// Opens these shards; says for each shard of the checkpoint which of them it is.
pub(crate) fn open_shards(
    checkpoint: &Checkpoint,
    items: &[Planned],
    shards: impl Iterator<Item = usize>,
) -> Result<(Vec<SourceFile>, Vec<Option<u32>>)> {
    let mut number = vec![None; checkpoint.shards().len()];
    let mut files = Vec::new();
    for shard in shards {
        if number[shard].is_none() {
            number[shard] = Some(files.len() as u32);
            files.push(open_shard(checkpoint, items, shard)?);
        }
    }
    Ok((files, number))
}

/// Opens a shard, wherever it is, unless it has changed since its header was read; one that was given as an
/// open file is read through that.
pub(crate) fn open_shard(
    checkpoint: &Checkpoint,
    items: &[Planned],
    shard: usize,
) -> Result<SourceFile> {
    let shard = &checkpoint.shards()[shard];
    let opened = match (shard.file_metadata(), shard.file()) {
        (Some(metadata), Some(file)) => SourceFile::of(file, shard.path(), metadata),
        (Some(metadata), None) => SourceFile::open(shard.path(), Some(metadata)),
        (None, _) => remote::source(shard),
    };
    opened.map_err(|e| locate(e, items))
}

/// The files that items have bytes in, and the pieces of them that the items are.
pub(crate) fn open_pieces(
    checkpoint: &Checkpoint,
    items: &[Planned],
) -> Result<(Arc<Vec<SourceFile>>, Vec<Piece>)> {
    let (files, number) = open_files(checkpoint, items)?;
    // Items without a byte may be of a shard that is not opened.
    let piece = |item: &Planned| piece_of(item, number[item.source().shard()].unwrap_or_default());
    Ok((Arc::new(files), items.iter().map(piece).collect::<Result<_>>()?))
}

/// All that is wanted of `item`, whose bytes are in file number `file`.
pub(crate) fn piece_of(item: &Planned, file: u32) -> Result<Piece> {
    let start = item.source().file_range().start;
    let runs = item.runs().map(|fst_format::Runs { first, len, stride, count }| {
        let start = start + first;
        Runs { start, len, stride, count }
    });
    let piece = || {
        let piece = Piece::joined(file, runs)?.aligned(item.dtype().alignment() as u64);
        match cast_of(item) {
            Some((from, to)) => piece.converted(from, to),
            None => Ok(piece),
        }
    };
    piece().map_err(|error: PieceError| Error::Io {
        tensor: Some(item.name().to_owned()),
        source: fst_io::Error::Sink(error.into()),
    })
}

/// How source elements become loaded ones, when they differ.
pub(crate) fn cast_of(item: &Planned) -> Option<(CastType, CastType)> {
    let (from, to) = item.conversion()?;
    cast_type(from).zip(cast_type(to))
}

/// Whether elements can be converted.
pub(crate) fn converts(from: Dtype, to: Dtype) -> bool {
    cast_type(from).zip(cast_type(to)).is_some_and(|(from, to)| cast::supported(from, to))
}

/// The element types that can be converted.
fn cast_type(dtype: Dtype) -> Option<CastType> {
    Some(match dtype {
        Dtype::F64 => CastType::F64,
        Dtype::F32 => CastType::F32,
        Dtype::F16 => CastType::F16,
        Dtype::BF16 => CastType::BF16,
        Dtype::F8E4M3 => CastType::F8E4M3,
        Dtype::F8E5M2 => CastType::F8E5M2,
        Dtype::F8E8M0 => CastType::F8E8M0,
        _ => return None,
    })
}

/// Turns what a sink passed through a reader back into this crate's error.
pub(crate) fn from_sink(error: SinkError) -> Error {
    let error = match error.downcast::<Error>() {
        Ok(own) => return *own,
        Err(other) => other,
    };
    let error = match error.downcast::<fst_io::Error>() {
        Ok(io) => return (*io).into(),
        Err(other) => other,
    };
    match error.downcast::<fst_gpu::Error>() {
        Ok(gpu) => DeviceError::Cuda(*gpu).into(),
        Err(other) => Error::Io { tensor: None, source: fst_io::Error::Sink(other) },
    }
}

/// Says which tensor an error of a load hit whose pieces are `items`.
pub(crate) fn locate_load(error: LoadError, items: &[Planned]) -> Error {
    match error {
        LoadError::Io(error) => return locate(error, items),
        LoadError::Memory(shortage) => return shortage.into(),
        LoadError::Cuda(error) => DeviceError::Cuda(error),
        LoadError::Gds(error) => DeviceError::Gds(error),
        LoadError::TooLarge { source, largest } => match items.get(largest) {
            Some(item) => {
                let (largest, bytes) = (item.source().name().to_owned(), item.byte_len());
                DeviceError::TooLarge { source, largest, bytes }
            }
            None => DeviceError::Cuda(source),
        },
        other => return Error::Io { tensor: None, source: fst_io::Error::Sink(other.into()) },
    }
    .into()
}

/// Says which tensor an I/O error hit.
pub(crate) fn locate(error: fst_io::Error, items: &[Planned]) -> Error {
    locate_in(error, items.iter().map(Planned::source))
}

/// Says which of `tensors` an I/O error hit.
pub(crate) fn locate_in<'t>(
    error: fst_io::Error,
    mut tensors: impl Iterator<Item = &'t TensorInfo>,
) -> Error {
    let (path, offset) = match error {
        fst_io::Error::Cancelled => return Error::Cancelled,
        fst_io::Error::Sink(error) => return from_sink(error),
        fst_io::Error::Read { ref path, offset, len, .. } => (path, offset..offset + len.max(1)),
        fst_io::Error::EarlyEnd { ref path, end, .. } => (path, end..end + 1),
        source => return Error::Io { tensor: None, source },
    };
    let hit = tensors.find(|info| {
        let range = info.file_range();
        info.path() == path && range.start < offset.end && offset.start < range.end
    });
    Error::Io { tensor: hit.map(|info| info.name().to_owned()), source: error }
}
