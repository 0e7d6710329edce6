//! The reads of one load to a device, one after the other: straight out of the page cache, through
//! pinned memory, and a sample of each where it is not known which is faster.

use std::panic::resume_unwind;
use std::thread::Builder;
use std::time::Instant;

use fst_io::plan::Block;
use fst_io::stats::Stage;
use fst_io::watch::{Part, Watch};
use fst_io::{Budget, Error, ReadOptions, ReadStats, ResolvedEngine};

use super::choice::{self, Way};
use super::{LandingSite, POLL, Result, host_options};
use crate::cuda::cached::{CachedOptions, copy_cached};
use crate::cuda::kernel::Kernel;
use crate::cuda::pipeline::Pipeline;
use crate::cuda::sink::{Admit, PipelineSink, Route};
use crate::device_copy::DeviceCopy;

impl DeviceCopy {
    /// Adds what a pipeline did.
    fn add(&mut self, pipeline: &Pipeline) {
        let stats = pipeline.stats();
        self.pinned_bytes += pipeline.pinned_bytes();
        self.streams += pipeline.streams();
        self.copy_calls += stats.copy_calls;
        self.launches += stats.launches;
        self.ring_waits += stats.ring_waits;
    }
}

/// Reads everything through pinned memory, but for what travels straight out of the page cache.
pub(super) fn run(
    site: &LandingSite<'_>,
    options: &ReadOptions,
    budget: Option<&Budget>,
    watch: &Watch,
) -> Result<Vec<ReadStats>> {
    let (load, plan) = (site.load, &site.load.plan.plan);
    let mut copy = DeviceCopy { asked: load.options.cached, ..DeviceCopy::default() };
    let way = match load.options.cached.refusal(options, budget.is_some(), load.more.len()) {
        Some(reason) => {
            copy.reason = reason.to_owned();
            Way::Staged
        }
        None => {
            let known = choice::known(&load.first, &load.files);
            let cached =
                || choice::cached_estimate(plan, |block| choice::is_cached(block, &load.files));
            choice::choose(&mut copy, load.first.can_register_read_only(), known, cached)
        }
    };
    let (reads, done) = (Vec::new(), vec![false; plan.blocks().len()]);
    let (registers, pinned, direct) = (way != Way::Staged, None, None);
    let by_cufile = load.by_cufile(options);
    let options = &host_options(options);
    let mut run = Run { site, options, budget, watch, registers, reads, done, pinned, direct };
    if by_cufile {
        // What the host takes of, it reads.
        run.done = plan.blocks().iter().map(|block| !load.lands_on_host(block)).collect();
        if run.done.contains(&true) {
            let plan = plan.only(|block| run.done[block.index as usize]);
            run.reads.push(site.run_gds(&plan, budget, watch)?);
        }
    }
    match way {
        Way::Staged => {}
        Way::Registered => {
            let all: Vec<u32> = plan.blocks().iter().map(|block| block.index).collect();
            run.registered(&all, &mut copy)?;
            if !run.done.contains(&true) && copy.refused.is_none() {
                copy.reason = "nothing is cached".to_owned();
            }
        }
        Way::Contest => run.contest(&mut copy)?,
    }
    run.staged(|_| true)?;
    let mut reads = std::mem::take(&mut run.reads);
    for (index, read) in reads.iter_mut().enumerate() {
        // Every part of the plan knows all of its extents.
        read.bytes_asked = if index == 0 { plan.bytes_asked() } else { 0 };
    }
    copy.staged_bytes = plan.bytes_read() - copy.registered_bytes;
    for pipeline in run.pinned.iter().chain(&run.direct) {
        copy.add(pipeline);
        let (began, ended) = pipeline.ring().pinning();
        site.preparations.add("read.pin", began, ended);
    }
    site.preparations.report(&mut copy);
    let copy = Some(copy).filter(|_| !by_cufile);
    *load.copy.lock().unwrap_or_else(|e| e.into_inner()) = copy;
    Ok(reads)
}

/// One load's reads through pinned memory and out of the page cache, one after the other.
struct Run<'a> {
    site: &'a LandingSite<'a>,
    options: &'a ReadOptions,
    budget: Option<&'a Budget>,
    watch: &'a Watch,
    /// Whether blocks may travel straight out of the page cache: the other ring leaves room for theirs.
    registers: bool,
    reads: Vec<ReadStats>,
    /// The blocks that are done with, by number.
    done: Vec<bool>,
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
                let options = load.staging(self.registers);
                self.made(|| Pipeline::to(&load.first, &load.more, options))?
            }
        };
        Ok(self.pinned.insert(pipeline))
    }

    fn direct(&mut self) -> Result<&Pipeline> {
        let pipeline = match self.direct.take() {
            Some(pipeline) => pipeline,
            None => {
                let load = self.site.load;
                self.made(|| Pipeline::new(&load.first, load.registering()))?
            }
        };
        Ok(self.direct.insert(pipeline))
    }

    fn made<T>(&self, make: impl FnOnce() -> T) -> T {
        self.site.preparations.time("read.streams", make)
    }

    /// Makes what blocks need on the device before they arrive: memory, and kernels.
    fn prepare(&self, blocks: &[u32]) -> Result<()> {
        let load = self.site.load;
        for block in blocks.iter().filter_map(|i| load.plan.plan.blocks().get(*i as usize)) {
            self.site.transform.admit(block, false).map_err(Error::Sink)?;
        }
        // The gather is done without where a driver does not take it.
        let mut casts = load.kernels().into_iter().filter(|kernel| *kernel != Kernel::GatherBatch);
        Ok(casts.try_for_each(|kernel| load.first.prepare(kernel))?)
    }

    /// Copies blocks out of the page cache, if all of their window is there, and marks them as done; `false`
    /// if some are left, or the driver refused to register them.
    fn registered(&mut self, blocks: &[u32], copy: &mut DeviceCopy) -> Result<bool> {
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
        // The threads that map windows ask for what is cached, each for its own.
        let admit = |block: &Block, _wait: bool| {
            Ok(choice::is_cached(block, &load.files)
                && !load.lands_on_host(block)
                && site.transform.admit(block, false)?)
        };
        let (route, admit): (Route<'_>, Admit<'_>) = (&route, &admit);
        let control = self.watch.next_of(Part::Transformed);
        let options = CachedOptions::default();
        let pipeline = self.direct()?;
        // SAFETY: as for staged blocks.
        let result = unsafe {
            copy_cached(pipeline, &load.files, plan.blocks(), route, Some(admit), options, &control)
        };
        let copied = result?;
        site.take_arrivals().map_err(Error::Sink)?;
        // Their numbers count the blocks of this part of the plan.
        blocks.iter().for_each(|index| self.done[*index as usize] = true);
        for left in &copied.left {
            if let Some(index) = blocks.get(*left as usize) {
                self.done[*index as usize] = false;
            }
        }
        copy.registered_bytes += copied.bytes;
        let complete = copied.left.is_empty();
        if let Some(error) = copied.refused {
            copy.reason = "the driver refused to register the files' mappings".to_owned();
            copy.refused = Some(error.to_string());
        }
        let engine = ResolvedEngine::resolve(self.options.engine);
        let engine = engine?;
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

    /// Stages all but the last cached blocks; then some of these from a warm ring, and the last of all by the
    /// direct way, each against the clock: what turns out to be slow has little of the load.
    fn contest(&mut self, copy: &mut DeviceCopy) -> Result<()> {
        let load = self.site.load;
        let plan = &load.plan.plan;
        let tail = choice::samples(plan);
        let bytes = |blocks: &[u32]| -> u64 {
            blocks.iter().filter_map(|i| plan.blocks().get(*i as usize)).map(|b| b.need).sum()
        };
        // What is cached of the samples is asked beside the first reads.
        let cached = |index: &u32| {
            let block = plan.blocks().get(*index as usize);
            block.is_some_and(|block| choice::is_cached(block, &load.files))
        };
        let first = tail[0].start;
        let look = || tail.clone().map(|part| part.filter(cached).collect::<Vec<_>>());
        let [staged, direct] = std::thread::scope(|scope| {
            let census = Builder::new().name("fst-census".into()).spawn_scoped(scope, look);
            self.staged(|index| *index < first)?;
            Result::Ok(match census {
                Ok(census) => census.join().unwrap_or_else(|panic| resume_unwind(panic)),
                Err(_) => look(),
            })
        })?;
        if direct.is_empty() {
            copy.reason = "nothing is cached".to_owned();
            return Ok(());
        }
        // What is made once has no part in what is measured: the rings, arenas, kernels.
        self.prepare(&staged)?;
        self.prepare(&direct)?;
        self.pipeline()?.ring().wait_until_pinned();
        let began = Instant::now();
        self.staged(|index| staged.binary_search(index).is_ok())?;
        let staged_rate = rate(bytes(&staged), began);
        copy.staged_rate = Some(staged_rate).filter(|_| !staged.is_empty());
        self.direct()?.ring().wait_until_pinned();
        let (probe, rest) = direct.split_at(choice::part(plan, direct.iter(), choice::PROBE));
        let began = Instant::now();
        if self.registered(probe, copy)? {
            copy.registered_rate = Some(rate(bytes(probe), began));
            if copy.registered_rate >= Some(staged_rate / 2.0) && self.registered(rest, copy)? {
                copy.registered_rate = Some(rate(bytes(&direct), began));
            }
        }
        choice::remember(&load.first, &load.files, copy, bytes(&direct).min(bytes(&staged)));
        Ok(())
    }

    /// Reads what is not done and `wanted` into pinned memory, and copies it from there.
    fn staged(&mut self, wanted: impl Fn(&u32) -> bool) -> Result<()> {
        let (site, load) = (self.site, self.site.load);
        let keep = |block: &Block| !self.done[block.index as usize] && wanted(&block.index);
        let plan = &load.plan.plan.only(keep);
        if plan.blocks().is_empty() {
            return Ok(());
        }
        let of_plan = load.plan.plan.blocks().iter().filter(|block| keep(block));
        let numbers: Vec<u32> = of_plan.map(|block| block.index).collect();
        numbers.iter().for_each(|index| self.done[*index as usize] = true);
        let budget = self.budget;
        let (options, control) = (self.options, self.watch.next_of(Part::Transformed));
        let pipeline = self.pipeline()?;
        let route = |block: &Block| site.route(block);
        let admit = |block: &Block, wait: bool| {
            let seen = budget.map(Budget::generation);
            pipeline.poll()?;
            site.take_arrivals()?;
            if site.transform.admit(block, false)? {
                return Ok(true);
            }
            // Waiting for the budget must not keep anybody from seeing copies end: it is these
            // that complete the tensors whose memory will come back.
            match (budget, seen) {
                (Some(budget), Some(seen)) if wait && !budget.wait_past_for(seen, POLL) => {
                    // Closed: nobody listens any more.
                    Err(Error::Cancelled.into())
                }
                _ => Ok(false),
            }
        };
        let prefer = |block: &Block| site.transform.prefer(block);
        let take = |block: &Block, bytes: &[u8]| site.transform.take(block, bytes);
        // SAFETY: every destination lies in an arena of the plan, at the place of one tensor;
        // source bytes arrive once and have one place each. Whoever finishes a submission holds
        // its arenas (see `route`), and what has not arrived stays in the site, which outlives the
        // pipeline: they live until the copies are done.
        let sink = unsafe { PipelineSink::new(pipeline, &route) };
        let sink = sink.with_admission(&admit).with_preference(&prefer).with_take(&take);
        let stats = fst_io::read(&load.files, plan, &sink, options, &control)?;
        pipeline.flush()?;
        site.take_arrivals().map_err(Error::Sink)?;
        self.reads.push(site.transform.counted(stats));
        Ok(())
    }
}

/// Bytes per second since `began`.
fn rate(bytes: u64, began: Instant) -> f64 {
    bytes as f64 / began.elapsed().as_secs_f64().max(1e-9)
}
