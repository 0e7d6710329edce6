//! The reads of one load to a device, one after the other: straight out of the page cache, through
//! pinned memory, and a sample of each where it is not known which is faster.

use std::time::Instant;

use fst_gpu::kernel::Kernel;
use fst_gpu::{Admit, CachedOptions, Pipeline, PipelineSink, Route, copy_cached};
use fst_io::plan::{Block, ReadPlan};
use fst_io::stats::Stage;
use fst_io::{Budget, ReadOptions, ReadStats, ResolvedEngine};

use super::{LandingSite, POLL};
use crate::cached::{self, DeviceCopy, Way};
use crate::error::{DeviceError, Result};
use crate::host::{Part, Watch, from_sink, locate};

/// Reads everything through pinned memory, but for what travels straight out of the page cache.
pub(super) fn run(
    site: &LandingSite<'_>,
    options: &ReadOptions,
    budget: Option<&Budget>,
    watch: &Watch,
) -> Result<Vec<ReadStats>> {
    let (load, plan) = (site.load, &site.load.plan.plan);
    let mut copy = DeviceCopy::new(load.options.cached);
    let mut run =
        Run { site, options, budget, watch, reads: Vec::new(), pinned: None, direct: None };
    // Blocks that wait for memory must come in order: cached ones cannot go ahead of others.
    let refusal = load.options.cached.refusal(options, budget.is_some());
    let cached = match refusal {
        None => cached::cached_blocks(plan, &load.files),
        Some(_) => Vec::new(),
    };
    let bytes = |blocks: &[u32]| -> u64 {
        blocks.iter().filter_map(|i| plan.blocks().get(*i as usize)).map(|b| b.need).sum()
    };
    // The blocks that are done with, by number.
    let mut done = vec![false; plan.blocks().len()];
    let way = match refusal {
        Some(reason) => {
            copy.reason = reason.to_owned();
            Way::Staged
        }
        None => cached::choose(&mut copy, bytes(&cached), &load.device, &load.files),
    };
    match way {
        Way::Staged => {}
        Way::Registered => run.registered(&cached, &mut copy, &mut done).map(drop)?,
        Way::Contest(sample) => {
            let (first, rest) = cached::sample(plan, &cached, sample);
            let (second, rest) = cached::sample(plan, rest, sample);
            // What is made once has no part in what is measured: the rings, arenas, kernels.
            run.prepare(first)?;
            run.prepare(second)?;
            run.direct()?.ring().wait_until_pinned();
            let began = Instant::now();
            if run.registered(first, &mut copy, &mut done)? {
                copy.registered_rate = Some(rate(bytes(first), began));
                run.pipeline()?.ring().wait_until_pinned();
                let began = Instant::now();
                second.iter().for_each(|index| done[*index as usize] = true);
                run.staged(&plan.only(|block| second.binary_search(&block.index).is_ok()))?;
                copy.staged_rate = Some(rate(bytes(second), began));
            }
            cached::remember(&load.device, &load.files, &copy, bytes(first).min(bytes(second)));
            if copy.registered_is_faster() {
                run.registered(rest, &mut copy, &mut done)?;
            }
        }
    }
    if !done.iter().all(|done| *done) {
        run.staged(&plan.only(|block| !done[block.index as usize]))?;
    }
    let mut reads = std::mem::take(&mut run.reads);
    for (index, read) in reads.iter_mut().enumerate() {
        // Every part of the plan knows all of its extents.
        read.bytes_asked = if index == 0 { plan.bytes_asked() } else { 0 };
    }
    copy.staged_bytes = plan.bytes_read() - copy.registered_bytes;
    run.pinned.iter().chain(&run.direct).for_each(|pipeline| copy.add(pipeline));
    *load.copy.lock().unwrap_or_else(|e| e.into_inner()) = Some(copy);
    Ok(reads)
}

/// One load's reads through pinned memory and out of the page cache, one after the other.
struct Run<'a> {
    site: &'a LandingSite<'a>,
    options: &'a ReadOptions,
    budget: Option<&'a Budget>,
    watch: &'a Watch,
    reads: Vec<ReadStats>,
    /// Made when it is first needed: pinning its ring takes a while.
    pinned: Option<Pipeline>,
    /// The streams of copies out of the page cache.
    direct: Option<Pipeline>,
}

impl Run<'_> {
    fn pipeline(&mut self) -> Result<&Pipeline> {
        let pipeline = match self.pinned.take() {
            Some(pipeline) => pipeline,
            None => {
                let load = self.site.load;
                let options = load.staging(self.direct.is_some());
                Pipeline::new(&load.device, options).map_err(DeviceError::Cuda)?
            }
        };
        Ok(self.pinned.insert(pipeline))
    }

    fn direct(&mut self) -> Result<&Pipeline> {
        let pipeline = match self.direct.take() {
            Some(pipeline) => pipeline,
            None => {
                let load = self.site.load;
                Pipeline::new(&load.device, load.registering()).map_err(DeviceError::Cuda)?
            }
        };
        Ok(self.direct.insert(pipeline))
    }

    /// Makes what blocks need on the device before they arrive: memory, and kernels.
    fn prepare(&self, blocks: &[u32]) -> Result<()> {
        let load = self.site.load;
        let mut casts = Vec::new();
        for block in blocks.iter().filter_map(|i| load.plan.plan.blocks().get(*i as usize)) {
            self.site.has_room(block).map_err(from_sink)?;
            for (_, work, _) in load.plan.parts_of(block) {
                if let Some((from, to)) = work.cast
                    && !casts.contains(&(from, to))
                {
                    load.device.prepare(Kernel::Cast { from, to }).map_err(DeviceError::Cuda)?;
                    casts.push((from, to));
                }
            }
        }
        Ok(())
    }

    /// Copies blocks out of the page cache and marks them as done; `false` if the driver refused
    /// to register some of them.
    fn registered(
        &mut self,
        blocks: &[u32],
        copy: &mut DeviceCopy,
        done: &mut [bool],
    ) -> Result<bool> {
        let began = Instant::now();
        let (site, load) = (self.site, self.site.load);
        if blocks.is_empty() {
            return Ok(true);
        }
        let plan = load.plan.plan.only(|block| blocks.binary_search(&block.index).is_ok());
        let route = |block: &Block| {
            site.take_arrivals()?;
            site.route(block)
        };
        let admit = |block: &Block, _wait: bool| site.has_room(block);
        let (route, admit): (Route<'_>, Admit<'_>) = (&route, &admit);
        let control = self.watch.next_of(Part::Transformed);
        let options = CachedOptions::default();
        let pipeline = self.direct()?;
        // SAFETY: as for staged blocks.
        let result = unsafe {
            copy_cached(pipeline, &load.files, plan.blocks(), route, Some(admit), options, &control)
        };
        let copied = result.map_err(|e| locate(e, &load.items))?;
        site.take_arrivals().map_err(from_sink)?;
        // Their numbers count the blocks of this part of the plan.
        blocks.iter().for_each(|index| done[*index as usize] = true);
        for left in &copied.left {
            if let Some(index) = blocks.get(*left as usize) {
                done[*index as usize] = false;
            }
        }
        copy.registered_bytes += copied.bytes;
        let complete = copied.left.is_empty();
        if let Some(error) = copied.refused {
            copy.reason = "the driver refused to register the files' mappings".to_owned();
            copy.refused = Some(error.to_string());
        }
        let engine = ResolvedEngine::resolve(self.options.engine);
        let engine = engine.map_err(|e| locate(e, &load.items))?;
        let mut stats = ReadStats::new(engine, copied.threads, &plan);
        stats.bytes_read = copied.bytes + copied.short_bytes;
        stats.seconds = began.elapsed().as_secs_f64();
        let mapped = &mut stats.stages[Stage::Mapped as usize];
        (mapped.blocks, mapped.bytes) = (copied.windows, copied.bytes);
        mapped.latency = began.elapsed();
        stats.stages[Stage::Cached as usize].bytes = copied.short_bytes;
        self.reads.push(stats);
        Ok(complete)
    }

    /// Reads a part of the plan into pinned memory, and copies it from there.
    fn staged(&mut self, plan: &ReadPlan) -> Result<()> {
        if plan.blocks().is_empty() {
            return Ok(());
        }
        let (site, load, budget) = (self.site, self.site.load, self.budget);
        let (options, control) = (self.options, self.watch.next_of(Part::Transformed));
        let pipeline = self.pipeline()?;
        let route = |block: &Block| site.route(block);
        let admit = |block: &Block, wait: bool| {
            let seen = budget.map(Budget::generation);
            pipeline.poll()?;
            site.take_arrivals()?;
            if site.has_room(block)? {
                return Ok(true);
            }
            // Waiting for the budget must not keep anybody from seeing copies end: it is these
            // that complete the tensors whose memory will come back.
            match (budget, seen) {
                (Some(budget), Some(seen)) if wait && !budget.wait_past_for(seen, POLL) => {
                    // Closed: nobody listens any more.
                    Err(fst_io::Error::Cancelled.into())
                }
                _ => Ok(false),
            }
        };
        // SAFETY: every destination lies in an arena of the plan, at the place of one tensor;
        // source bytes arrive once and have one place each. Whoever finishes a submission holds
        // its arenas (see `route`), and what has not arrived stays in the site, which outlives the
        // pipeline: they live until the copies are done.
        let sink = unsafe { PipelineSink::new(pipeline, &route) }.with_admission(&admit);
        let stats = fst_io::read(&load.files, plan, &sink, options, &control)
            .map_err(|e| locate(e, &load.items))?;
        pipeline.flush().map_err(DeviceError::Cuda)?;
        site.take_arrivals().map_err(from_sink)?;
        self.reads.push(stats);
        Ok(())
    }
}

/// Bytes per second since `began`.
fn rate(bytes: u64, began: Instant) -> f64 {
    bytes as f64 / began.elapsed().as_secs_f64().max(1e-9)
}
