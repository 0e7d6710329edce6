//! `fst synth`: a checkpoint with a published model's tensors and pseudo-random values.

use std::time::Instant;

use fst_cli::models::Model;
use fst_cli::synth::{Recipe, SynthError, Watch};
use serde::Serialize;

use crate::args::SynthArgs;
use crate::failure::Failure;
use crate::interrupt;
use crate::progress::Progress;
use crate::text::{self, RESULT, counted, styled, visible};

#[derive(Serialize)]
struct Report {
    model: &'static str,
    tensors: usize,
    bytes: u64,
    files: Vec<String>,
    seconds: f64,
    gb_per_s: f64,
}

pub(crate) fn run(args: &SynthArgs) -> Result<(), Failure> {
    let model = Model::find(&args.model)
        .ok_or_else(|| Failure::usage(format!("unknown model {}", args.model)))?;
    let recipe = recipe(model, args)?;
    let plan = recipe.plan().map_err(|error| match args.shards {
        Some(files) => Failure::usage(format!("--shards {files}: {error}")),
        None => Failure::usage(error),
    })?;
    let bytes = plan.iter().map(|shard| shard.bytes()).sum();
    let start = Instant::now();
    let progress = Progress::new("writing", bytes, !args.no_progress);
    let count = |bytes| progress.add(bytes);
    let watch = Watch { progress: Some(&count), cancelled: Some(interrupt::flag()) };
    let written = recipe.write(&args.folder, &watch).map_err(|error| match error {
        SynthError::Cancelled { .. } => Failure::Interrupted,
        error => Failure::of(error),
    })?;
    drop(progress);
    let seconds = start.elapsed().as_secs_f64();
    let report = Report {
        model: model.name(),
        tensors: written.tensors,
        bytes: written.bytes,
        files: written.files.iter().map(|file| file.display().to_string()).collect(),
        seconds,
        gb_per_s: written.bytes as f64 / 1e9 / seconds,
    };
    if args.json {
        return text::print_json(&report).map_err(Failure::output);
    }
    text::remark(&format!(
        "{}: {} of {}, {} in {}, written in {} ({})\n",
        visible(&args.folder.display().to_string()),
        counted(report.tensors as u64, "tensor"),
        report.model,
        styled(RESULT, text::bytes(report.bytes)),
        counted(report.files.len() as u64, "file"),
        text::seconds(report.seconds),
        text::rate(report.gb_per_s)
    ))
    .map_err(Failure::output)
}

fn recipe(model: &'static Model, args: &SynthArgs) -> Result<Recipe, Failure> {
    let mut recipe = Recipe::new(model).seed(args.seed).shrink(usize::from(args.shrink));
    if let Some(layers) = args.layers {
        if layers > model.layers() {
            let what = format!("--layers {layers}: {} has {} layers", model.name(), model.layers());
            return Err(Failure::usage(what));
        }
        recipe = recipe.layers(layers);
    }
    if let Some(files) = args.shards {
        recipe = recipe.shards(files as usize);
    }
    if let Some(dtype) = args.dtype {
        recipe = recipe.dtype(dtype);
    }
    Ok(recipe)
}
