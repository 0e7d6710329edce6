//! `fst load`: a checkpoint into memory, and how fast that went. Without a path, a demonstration.

use std::fs::File;
use std::path::{Path, PathBuf};

use fst::{
    AvailableMemory, Checkpoint, Engine, Error, LoadReport, Loader, ResolvedEngine, Stage, Tensors,
};
use fst_cli::models::Model;
use fst_cli::synth::{Recipe, SynthError, Watch};
use rustix::fs::{Advice, fadvise};
use serde::Serialize;

use crate::args::LoadArgs;
use crate::failure::Failure;
use crate::figures::{CopyFigures, Figures, RemoteFigures, TouchFigures};
use crate::interrupt::{self, TemporaryFolder};
use crate::progress::Progress;
use crate::ranks;
use crate::reading;
use crate::sums;
use crate::text::{self, Align, FAINT, HEADING, RESULT, Table, counted, styled, visible};
use crate::timeline;

/// What the demonstration loads: the shapes of Llama 2, cut to about 1 GB.
const DEMO_MODEL: &str = "llama-2-7b";
const DEMO_LAYERS: usize = 1;
const DEMO_FILES: usize = 2;

/// Bytes of a file that opening it may bring into the page cache.
const OPENED: u64 = 1 << 20;

pub(crate) fn run(args: &LoadArgs) -> Result<(), Failure> {
    refuse(args)?;
    if !args.paths.is_empty() {
        return load(args, &args.paths);
    }
    // Before a gigabyte is made for a device that is not there.
    args.reading.device().open()?;
    let folder = TemporaryFolder::new().map_err(|error| {
        let what = format!("no place for the demonstration: {error}");
        Failure::at(&std::env::temp_dir(), what)
    })?;
    let path = folder.path().join(DEMO_MODEL);
    make_demo(args, &path)?;
    load(args, &[path])?;
    if !args.json {
        let hint = "That was a demonstration; fst load PATH loads a checkpoint of yours.";
        text::remark(&format!("\n{}\n", styled(FAINT, hint))).map_err(Failure::output)?;
    }
    Ok(())
}

/// Refuses options that make no sense together.
fn refuse(args: &LoadArgs) -> Result<(), Failure> {
    if args.ranks.world.is_none() && args.ranks.dist.is_none() {
        args.ranks.rule.without_ranks()?;
        args.ranks.together.without_ranks()?;
    } else if args.verify.is_some() {
        let what = "--verify is for whole tensors, and ranks keep parts of them: load without ranks to \
                    check the files, or compare what fst sum says with the same --world or --dist";
        return Err(Failure::usage(what));
    }
    if args.cached_copy.is_some() && !args.reading.device().is_cuda() {
        let what = "--cached-copy is about the way to a GPU: give --device cuda:N";
        return Err(Failure::usage(what));
    }
    Ok(())
}

fn load(args: &LoadArgs, paths: &[PathBuf]) -> Result<(), Failure> {
    let mut checkpoint = reading::open_and_warn(paths, &args.reading.options())?;
    if args.cold {
        checkpoint = open(args, paths)?;
    }
    reading::spare(&checkpoint, paths, [&args.trace, &args.plot])?;
    let mut loader = reading::loader(&args.reading)?;
    if let Some(dtype) = args.dtype {
        loader = loader.dtype(dtype);
    }
    for slice in &args.slice {
        loader = loader.slice(&slice.name, slice.dim, slice.range.clone());
    }
    if let Some(path) = &args.verify {
        loader = loader.verify(sums::read(path)?);
    }
    if let Some(way) = args.cached_copy {
        loader = loader.cached_copy(way);
    }
    loader = loader.trace(args.trace.is_some() || args.plot.is_some());
    if let Some(world) = args.ranks.world {
        return ranks::load_here(args, paths, &checkpoint, &loader, world);
    }
    if let Some(group) = args.ranks.dist {
        return ranks::load_as_one(args, paths, &checkpoint, loader, group);
    }
    let mut runs = vec![load_once(args, paths, &loader, &checkpoint)?];
    for _ in 1..args.runs {
        // Opening is a part of a load.
        let checkpoint = open(args, paths)?;
        runs.push(load_once(args, paths, &loader, &checkpoint)?);
    }
    let spread = (runs.len() > 1).then(|| Spread::of(&runs));
    runs.sort_by(|(one, _), (other, _)| one.seconds.total_cmp(&other.seconds));
    // Of an even number of runs the slower of the two in the middle.
    let (report, figures) = &runs[runs.len() / 2];
    if args.cold
        // Opening brings headers back, and what the system reads ahead.
        && let least = figures.file_bytes / 100 + OPENED * report.files.len() as u64
        && let Some(left) = figures.resident_bytes.filter(|left| *left > least)
    {
        text::warn(&format!(
            "{} stayed in the page cache: another process uses these files, or they lie in memory",
            text::bytes(left)
        ));
    }
    if let Some(path) = &args.trace {
        timeline::write_trace(report, path)?;
    }
    if let Some(path) = &args.plot {
        timeline::write_plot(report, path)?;
    }
    if args.json {
        let runs = spread.map(|spread| spread.runs);
        return text::print_json(&Document { figures, runs }).map_err(Failure::output);
    }
    let mut out = render(args, report, figures, paths);
    if let Some(spread) = spread {
        out += &spread.render();
    }
    if let Some(path) = &args.verify {
        let tensors = counted(report.tensors as u64, "tensor");
        let line = format!("{tensors} verified by {}", visible(&path.display().to_string()));
        out += &format!("\n{}\n", styled(RESULT, line));
    }
    for (path, what) in
        [(&args.trace, "Timeline, for https://ui.perfetto.dev"), (&args.plot, "Throughput")]
    {
        if let Some(path) = path {
            let line = format!("{what}: {}", visible(&path.display().to_string()));
            out += &format!("\n{}\n", styled(FAINT, line));
        }
    }
    text::remark(&out).map_err(Failure::output)
}

/// Opens the checkpoint, whose files are taken out of the page cache first where that was asked for.
fn open(args: &LoadArgs, paths: &[PathBuf]) -> Result<Checkpoint, Failure> {
    let checkpoint = reading::open(paths, &args.reading.options())?;
    if !args.cold {
        return Ok(checkpoint);
    }
    for shard in checkpoint.shards() {
        forget(shard.path());
    }
    // Headers are read cold as well.
    reading::open(paths, &args.reading.options())
}

/// Takes a file out of the page cache. Where this fails, a load is as correct and only faster.
fn forget(path: &Path) {
    // What is not on storage yet would stay.
    if let Ok(file) = File::open(path)
        && file.sync_all().is_ok()
    {
        let _ = fadvise(&file, 0, None, Advice::DontNeed);
    }
}

fn load_once(
    args: &LoadArgs,
    paths: &[PathBuf],
    loader: &Loader,
    checkpoint: &Checkpoint,
) -> Result<(LoadReport, Figures), Failure> {
    let progress = Progress::new("loading", 0, !args.reading.no_progress);
    let bar = progress.bar();
    let loader = loader.clone().on_progress(move |progress| {
        bar.set_length(progress.bytes_total);
        bar.set_position(progress.bytes_done);
    });
    let tensors = match args.map {
        true => map(&loader, checkpoint)?,
        false => loader.load(checkpoint),
    };
    let tensors = tensors.map_err(|error| reading::failure(paths, checkpoint, &error))?;
    Ok((tensors.report().clone(), Figures::of(&tensors)))
}

/// What `--json` prints.
#[derive(Serialize)]
struct Document<'f> {
    #[serde(flatten)]
    figures: &'f Figures,
    #[serde(skip_serializing_if = "Option::is_none")]
    runs: Option<Vec<Run>>,
}

/// One of several runs.
#[derive(Serialize)]
struct Run {
    seconds: f64,
    gb_per_s: f64,
    resident_bytes: Option<u64>,
}

/// Several runs, in their order.
struct Spread {
    runs: Vec<Run>,
}

impl Spread {
    fn of(runs: &[(LoadReport, Figures)]) -> Self {
        let run = |(_, figures): &(LoadReport, Figures)| Run {
            seconds: figures.seconds,
            gb_per_s: figures.gb_per_s,
            resident_bytes: figures.resident_bytes,
        };
        Self { runs: runs.iter().map(run).collect() }
    }

    fn render(&self) -> String {
        let seconds = || self.runs.iter().map(|run| run.seconds);
        let (least, most) = seconds()
            .fold((f64::INFINITY, 0.0f64), |(least, most), one| (least.min(one), most.max(one)));
        let each: Vec<String> = seconds().map(text::seconds).collect();
        format!(
            "\n{}\n  {} to {}, in their order: {}\n",
            styled(HEADING, format!("{} runs, of which the above is the median", self.runs.len())),
            text::seconds(least),
            text::seconds(most),
            each.join(", ")
        )
    }
}

/// Maps the checkpoint and brings all of it into memory, so that the time is that of tensors ready
/// for use.
fn map(loader: &Loader, checkpoint: &Checkpoint) -> Result<Result<Tensors, Error>, Failure> {
    // All is brought in at once here: there is nothing to be ahead of.
    let (loader, checkpoint) = (loader.clone().read_ahead(false), checkpoint.clone());
    // Nothing that is mapped can be half done: a load that is stopped is left to itself.
    interrupt::unless_stopped(move || {
        // SAFETY: this program looks at mapped bytes only to sum them, and who asks for `--map` was
        // told to leave the files alone. Otherwise pages are brought in by the kernel, which answers
        // with an error where a read would be a signal.
        let mut tensors = unsafe { loader.map(&checkpoint) }?;
        tensors.populate()?;
        Ok(tensors)
    })
}

fn render(args: &LoadArgs, report: &LoadReport, figures: &Figures, paths: &[PathBuf]) -> String {
    let paths: Vec<String> =
        paths.iter().map(|path| visible(&path.display().to_string())).collect();
    let mut out = format!("{}\n", styled(HEADING, paths.join(" ")));
    out += &format!("  {}\n\n", headline(args, report, figures));
    let mut facts = Table::new(&[Align::Left, Align::Left]);
    facts.row(["engine".into(), engine(report)]);
    if report.workers > 0 {
        let rest = if figures.mapped_bytes > 0 { "what is not mapped: " } else { "" };
        facts.row([
            "reading".into(),
            format!(
                "{rest}{}, up to {} in flight, of up to {} each",
                counted(report.workers as u64, "thread"),
                counted(report.depth as u64, "request"),
                text::bytes(report.block_bytes),
            ),
        ]);
    }
    facts.row(["read".into(), bytes_read(report)]);
    if let Some(remote) = &figures.remote {
        facts.row(["requests".into(), requests(remote)]);
    }
    if let Some(resident) = report.resident_bytes.filter(|_| figures.remote.is_none()) {
        facts.row(["cached".into(), share(resident, report.file_bytes)]);
    }
    let pages = match figures.first_touch {
        Some(TouchFigures { scarce: true, .. }) => {
            Some("in small pages: few huge ones are free".to_owned())
        }
        Some(TouchFigures {
            huge_gb_per_s,
            small_gb_per_s: Some(small),
            takes_small: true,
            ..
        }) => {
            let (huge, small) = (text::rate(huge_gb_per_s), text::rate(small));
            Some(format!(
                "in small pages: fresh ones come at {small} a thread here, huge ones at {huge}"
            ))
        }
        _ => None,
    };
    if let Some(pages) = pages {
        facts.row(["memory".into(), pages]);
    }
    if let Some(copy) = &figures.device_copy {
        facts.row(["copied".into(), copied(copy)]);
    }
    out += &facts.render();
    out += &stage_tables(report);
    out
}

/// What is there now, and how long that took.
fn headline(args: &LoadArgs, report: &LoadReport, figures: &Figures) -> String {
    let (tensors, bytes) = (counted(report.tensors as u64, "tensor"), text::bytes(report.bytes));
    let took = text::seconds(report.seconds);
    if !args.map {
        let rate = styled(RESULT, text::rate(report.gb_per_s()));
        return format!("{tensors}, {bytes} on {} in {took}: {rate}", report.device);
    }
    // What is mapped is not moved, so that the whole has no rate to speak of.
    let took = styled(RESULT, took);
    // Pages of files count as available: what is more than that cannot all have stayed.
    let available = AvailableMemory::now().map_or(u64::MAX, |available| available.bytes);
    match (mapping_time(report), figures.mapped_bytes) {
        (Some(mapped), bytes_mapped) if bytes_mapped > available => format!(
            "{tensors}, {bytes} mapped in {}, all read once after {took}; {} of memory hold a part",
            text::seconds(mapped),
            text::bytes(available)
        ),
        (Some(mapped), _) => format!(
            "{tensors}, {bytes} mapped in {}, all in memory after {took}",
            text::seconds(mapped)
        ),
        (None, 0) => {
            format!(
                "{tensors}, {bytes} in memory after {took}: none could be mapped, all were read"
            )
        }
        (None, mapped) => format!(
            "{tensors}, {bytes} in memory after {took}: {} mapped, {} read, as they are cut, converted or \
             not aligned to their elements",
            text::bytes(mapped),
            text::bytes(report.bytes - mapped)
        ),
    }
}

/// Which way bytes took to a device, and why.
fn copied(copy: &CopyFigures) -> String {
    let ways: Vec<String> = [
        (copy.registered_bytes, "straight out of the page cache"),
        (copy.staged_bytes, "through pinned memory"),
    ]
    .into_iter()
    .filter(|(bytes, _)| *bytes > 0)
    .map(|(bytes, way)| format!("{} {way}", text::bytes(bytes)))
    .collect();
    let mut out = match ways.is_empty() {
        true => "nothing".to_owned(),
        false => ways.join(", "),
    };
    out += &format!(" ({})", visible(&copy.reason));
    if let Some((registered, staged)) = copy.registered_gb_per_s.zip(copy.staged_gb_per_s) {
        out += &format!(": {} against {}", text::rate(registered), text::rate(staged));
    }
    if let Some(refused) = &copy.refused {
        out += &format!("; the driver refused to register the files: {}", visible(refused));
    }
    out
}

/// How long it took until tensors could be used, if all of them are mapped.
fn mapping_time(report: &LoadReport) -> Option<f64> {
    let stage = |name: &str| report.stages.iter().find(|stage| stage.name == name);
    let mapped = stage("map").filter(|_| stage("read").is_none())?;
    Some(stage("open").map_or(0.0, |open| open.seconds) + mapped.seconds)
}

/// The engine, which ways bytes took through it, and why it is not the usual one.
fn engine(report: &LoadReport) -> String {
    let mut parts: Vec<String> = [
        ("read.direct", "from storage"),
        ("read.buffered", "from storage through the page cache"),
        ("read.cached", "out of the page cache"),
        ("read.mapped", "out of a mapping"),
        ("read.remote", "by range, from where it is stored"),
    ]
    .into_iter()
    .filter_map(|(stage, way)| {
        let bytes = report.stage(stage).map_or(0, |stage| stage.bytes);
        (bytes > 0).then(|| format!("{} {way}", text::bytes(bytes)))
    })
    .collect();
    // That an engine is there is no news; that one is missing is.
    let ResolvedEngine { asked, used, reason } = &report.engine;
    if parts.is_empty() || (*asked == Engine::Auto && *used != Engine::Uring) {
        parts.push(visible(reason));
    }
    format!("{used}: {}", parts.join(", "))
}

/// What was read, and how much of it nobody had asked for.
fn bytes_read(report: &LoadReport) -> String {
    let (asked, read) = (report.bytes_asked, report.bytes_read);
    match read.checked_sub(asked) {
        // Mapped tensors are asked for and not read.
        None => format!("{} of the {} asked for", text::bytes(read), text::bytes(asked)),
        // File headers and the ragged ends of blocks.
        Some(more) if more <= asked / 100 => format!("{}, as asked for", text::bytes(read)),
        Some(more) => format!(
            "{}: the {} asked for and {} between them, which cost less than more requests",
            text::bytes(read),
            text::bytes(asked),
            text::bytes(more)
        ),
    }
}

/// What was asked of servers, and how they answered.
fn requests(remote: &RemoteFigures) -> String {
    let mut out = format!(
        "{} to {}, answered in {} (99 of 100 in {})",
        counted(remote.requests, "request"),
        visible(&remote.endpoints.join(", ")),
        text::seconds(remote.first_byte_p50_seconds),
        text::seconds(remote.first_byte_p99_seconds),
    );
    if remote.retries > 0 {
        out += &format!("; {} after failures, {} throttled", remote.retries, remote.throttled);
    }
    if remote.repeated_bytes > 0 {
        out += &format!("; {} came twice", text::bytes(remote.repeated_bytes));
    }
    out
}

/// How much of the files the page cache held.
fn share(resident: u64, files: u64) -> String {
    match resident {
        0 => "nothing was in the page cache before".to_owned(),
        _ if resident >= files => "all was in the page cache before".to_owned(),
        _ => format!(
            "{} of {} ({:.0}%) were in the page cache before",
            text::bytes(resident),
            text::bytes(files),
            resident as f64 / files as f64 * 100.0
        ),
    }
}

/// The stages that follow each other, and then what each is made of.
fn stage_tables(report: &LoadReport) -> String {
    let stages = &report.stages;
    let cells = |stage: &Stage, name: &str| {
        let bytes = if stage.bytes > 0 { text::bytes(stage.bytes) } else { String::new() };
        [name.to_owned(), text::seconds(stage.seconds), bytes]
    };
    let mut table =
        Table::new(&[Align::Left, Align::Right, Align::Right, Align::Right, Align::Left]);
    let wholes = || stages.iter().filter(|stage| stage.part_of().is_none());
    for stage in wholes() {
        // Mapping moves no byte, and finds some or all of them in memory.
        let moved = stage.bytes > 0 && !["map", "populate"].contains(&stage.name);
        let rate = if moved { stage.bytes as f64 / stage.seconds / 1e9 } else { f64::INFINITY };
        let rate = if moved { text::rate(rate) } else { String::new() };
        let meaning = styled(FAINT, stage.meaning());
        table.row(cells(stage, stage.name).into_iter().chain([rate, meaning]));
    }
    let heading = styled(HEADING, "Stages, one after the other");
    let mut out = format!("\n{heading}\n{}", table.render());
    for whole in wholes() {
        let mut table = Table::new(&[Align::Left, Align::Right, Align::Right, Align::Left]);
        let mut any = false;
        for stage in stages.iter().filter(|stage| stage.part_of() == Some(whole.name)) {
            let (_, name) = stage.name.split_once('.').unwrap_or_default();
            let meaning = styled(FAINT, stage.meaning());
            table.row(cells(stage, name).into_iter().chain([meaning]));
            any = true;
        }
        if any {
            let what = format!("Within {}, added up over threads and requests", whole.name);
            out += &format!("\n{}\n{}", styled(HEADING, what), table.render());
        }
    }
    out
}

/// Makes the demonstration's checkpoint and takes it out of the page cache, so that the load shows
/// what storage gives.
fn make_demo(args: &LoadArgs, path: &Path) -> Result<(), Failure> {
    let model = Model::find(DEMO_MODEL)
        .ok_or_else(|| Failure::usage(format!("unknown model {DEMO_MODEL}")))?;
    let recipe = Recipe::new(model).layers(DEMO_LAYERS).shards(DEMO_FILES);
    let plan = recipe.plan().map_err(Failure::usage)?;
    let bytes = plan.iter().map(|shard| shard.bytes()).sum();
    if !args.json {
        let size = text::bytes(bytes);
        let line = format!("Making a checkpoint of {size} with the shapes of Llama 2 ...");
        text::remark(&format!("{}\n\n", styled(FAINT, line))).map_err(Failure::output)?;
    }
    let progress = Progress::new("writing", bytes, !args.reading.no_progress);
    let count = |bytes| progress.add(bytes);
    let watch = Watch { progress: Some(&count), cancelled: Some(interrupt::flag()) };
    let written = recipe.write(path, &watch).map_err(|error| match error {
        SynthError::Cancelled { .. } => Failure::Interrupted,
        error => Failure::of(error),
    })?;
    written.files.iter().for_each(|file| forget(file));
    Ok(())
}
