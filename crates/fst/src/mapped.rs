//! Tensors that are backed by a mapping of their files: no copy, no memory of their own.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use fst_format::{Checkpoint, Planned, TensorInfo};
use fst_io::mapping::{self, Mapping};
use fst_io::watch::Watch;
use fst_io::{Engine, ResolvedEngine};

use crate::device::Device;
use crate::error::{Error, Result};
use crate::files::{from_sink, locate, locate_in, open_shard};
use crate::loader::Loader;
use crate::report::LoadReport;
use crate::tensor::{Data, Tensor, Tensors};
use crate::verify::{Hashed, verified};

impl Loader {
    /// Maps the files instead of reading them: the selected tensors' bytes are the page cache's.
    ///
    /// It returns at once. Pages come in when they are first touched, and threads of this call
    /// bring them in ahead of that unless [`read_ahead`](Self::read_ahead) says no;
    /// [`Tensors::populate`] waits for all. Nothing is copied and no memory is taken: other
    /// processes that map the same files share it, and the system may drop pages and read them
    /// again.
    ///
    /// Tensors that cannot be used where they lie in their file are loaded into memory of their
    /// own, as [`load`](Self::load) does: those whose [dtype](Self::dtype) changes, slices that are
    /// not one run of bytes (of a dimension that others enclose), tensors that their file
    /// leaves misaligned for their elements, and those whose [request](fst_format::Request::device) names a
    /// device. [`Tensor::is_mapped`] tells.
    ///
    /// [`load`](Self::load) is the default for a reason. Mapped, a model is slower to arrive from
    /// cold storage, its first use pays for page faults, its pages are small ones on most file
    /// systems, and the safety of the whole process hangs on files that others can change.
    ///
    /// # Errors
    ///
    /// What is wrong with the request, the files or the machine; see [`Error`]. [`Error::Engine`]
    /// for a device other than the host.
    ///
    /// # Safety
    ///
    /// While any of the tensors lives, nobody may write to the files or truncate them, in this
    /// process or any other. What is written shows through in bytes that Rust takes for constant,
    /// and a read behind the end of a truncated file kills the process (SIGBUS). Replacing a file by
    /// renaming another onto its name is harmless, and is how the Hugging Face cache and package
    /// managers update files.
    pub unsafe fn map(&self, checkpoint: &Checkpoint) -> Result<Tensors> {
        self.ranks.refuse("a mapping")?;
        if !self.target().is_host() {
            return Err(Error::Engine {
                engine: Engine::Mmap,
                device: self.target().clone(),
                reason: "a mapping of a file is host memory".to_owned(),
            });
        }
        let began = Instant::now();
        let asked = self.read.engine;
        let reason = "mapped without a copy".to_owned();
        let engine = ResolvedEngine { asked, used: Engine::Mmap, reason };
        let mut report = LoadReport::new(engine, Device::host());
        report.push("open", checkpoint.open_time(), 0);
        let items = self.planned(checkpoint)?;
        self.check_manifest(checkpoint, &items)?;
        let mut tensors: Vec<Option<Tensor>> = vec![None; items.len()];

        let mut rest = Vec::new();
        let mut ranges: Vec<(Arc<Mapping>, Range<usize>)> = Vec::new();
        let mut maps: Vec<Option<Arc<Mapping>>> = vec![None; checkpoint.shards().len()];
        for (index, item) in items.iter().enumerate() {
            let lies =
                item.contiguous().filter(|_| item.conversion().is_none() && self.is_to_host(item));
            let align = item.dtype().alignment() as u64;
            let Some(lies) = lies.filter(|lies| lies.start.is_multiple_of(align)) else {
                rest.push(index);
                continue;
            };
            let shard = &mut maps[item.source().shard()];
            let map = match shard {
                Some(map) => map,
                None => {
                    let file = open_shard(checkpoint, &items, item.source().shard())?;
                    // SAFETY: passed on to our caller.
                    let map = unsafe { Mapping::new(&file) }.map_err(|e| locate(e, &items))?;
                    report.add_files(std::slice::from_ref(&file));
                    shard.insert(Arc::new(map))
                }
            };
            let (tensor, range) = mapped(item, lies, map)?;
            report.bytes_asked += range.len() as u64;
            match ranges.last_mut() {
                Some((last, before)) if Arc::ptr_eq(last, map) && before.end == range.start => {
                    before.end = range.end;
                }
                _ => ranges.push((map.clone(), range)),
            }
            tensors[index] = Some(tensor);
        }
        report.push("map", began.elapsed(), report.bytes_asked);
        if !self.lazy {
            mapping::read_ahead(&ranges);
        }

        if let Some(manifest) = &self.manifest {
            let hashed = Hashed::default();
            let watch = Watch::new(self.cancel.flag());
            verified(manifest, &hashed, &watch, &|_, _| Ok(()), |check| {
                let mut mapped = tensors.iter().flatten();
                mapped.try_for_each(|tensor| check(0, tensor.clone()).map_err(from_sink))
            })?;
            hashed.report(&mut report);
        }

        if !rest.is_empty() {
            let began = Instant::now();
            let items = rest.iter().map(|index| items[*index].clone()).collect();
            let loaded = self.load_items(checkpoint, items, began, &mut report)?;
            for (index, tensor) in rest.into_iter().zip(loaded) {
                tensors[index] = Some(tensor);
            }
        }
        let tensors: Vec<Tensor> = tensors.into_iter().flatten().collect();
        report.tensors = tensors.len();
        report.bytes = tensors.iter().map(|t| t.byte_len() as u64).sum();
        Ok(Tensors::new(tensors, report))
    }

    /// Whether [`map`](Self::map) brings pages in from threads of its own, before they are touched;
    /// it does unless told otherwise. Say no where only a little of what is selected will be used.
    #[must_use]
    pub fn read_ahead(mut self, read_ahead: bool) -> Self {
        self.lazy = !read_ahead;
        self
    }
}

/// A tensor in a mapping, and where in it.
fn mapped(
    item: &Planned,
    Range { start, end }: Range<u64>,
    map: &Arc<Mapping>,
) -> Result<(Tensor, Range<usize>)> {
    let too_long = || {
        let (path, needed) = (item.source().path().to_owned(), end);
        let source = fst_io::Error::EarlyEnd { path, end: map.len() as u64, needed };
        Error::Io { tensor: Some(item.source().name().to_owned()), source }
    };
    let range = usize::try_from(start).ok().zip(usize::try_from(end).ok()).map(|(a, b)| a..b);
    let range = range.filter(|range| range.end <= map.len()).ok_or_else(too_long)?;
    let data = Data::Mapped { map: map.clone(), offset: range.start, len: range.len() };
    Ok((Tensor::of(item, data), range))
}

impl Tensors {
    /// Waits until all bytes of [mapped](Loader::map) tensors are in memory and reading them costs
    /// no page fault any more; several threads see to it. The report gets a stage `populate`.
    /// Without mapped tensors there is nothing to do.
    ///
    /// The system may drop pages of a mapping again when memory runs short.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when storage fails, or a file was truncated, written to or replaced: here
    /// that is an error, where touching the bytes would be a signal.
    pub fn populate(&mut self) -> Result<()> {
        let began = Instant::now();
        let mut ranges: Vec<(Arc<Mapping>, Range<usize>)> = Vec::new();
        for (map, range) in self.iter().filter_map(Tensor::mapping) {
            match ranges.last_mut() {
                Some((last, before)) if Arc::ptr_eq(last, map) && before.end == range.start => {
                    before.end = range.end;
                }
                _ => ranges.push((map.clone(), range)),
            }
        }
        if ranges.is_empty() {
            return Ok(());
        }
        let infos = || self.iter().map(|tensor: &Tensor| -> &TensorInfo { tensor.info() });
        mapping::populate(&ranges, &AtomicBool::new(false)).map_err(|e| locate_in(e, infos()))?;
        let bytes = ranges.iter().map(|(_, range)| range.len() as u64).sum();
        self.report_mut().push("populate", began.elapsed(), bytes);
        Ok(())
    }
}
