//! The command line.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{PossibleValue, PossibleValuesParser};
use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use fst::dist::group::DEFAULT_DEADLINE;
use fst::{CachedCopy, Dtype, Engine, OpenOptions, Pattern};
use fst_cli::models::MODELS;

#[cfg(feature = "object-store")]
use crate::cache::CacheArgs;
use crate::device::DeviceArg;
use crate::dtype::{parse_made, parse_target};
use crate::failure::Failure;
use crate::figures::parse_cached_copy;
use crate::ranks::{GroupArg, PresetArg};
use crate::slice::SliceArg;

/// Loads safetensors checkpoints as fast as the hardware allows.
#[derive(Debug, Parser)]
#[command(name = "fst", version, propagate_version = true, max_term_width = 100)]
pub(crate) struct Cli {
    /// Print only what was asked for: no progress, no warnings, no report of a load or of files made
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Load a checkpoint into memory and report how fast it went
    ///
    /// Without PATH this is a demonstration: it makes a checkpoint of 1 GB with the shapes of
    /// Llama 2 in a temporary folder, loads it, and removes it.
    Load(LoadArgs),
    /// Show what a checkpoint holds; reads headers only
    Inspect(InspectArgs),
    /// Print the SHA-256 of each tensor's bytes, read through an engine
    Sum(SumArgs),
    /// Make a checkpoint with a published model's tensor names, shapes and order
    Synth(SynthArgs),
    /// Show what each rank of several would read, send and receive; reads headers only
    Plan(PlanArgs),
    /// Show what this machine offers and how a checkpoint would be read here
    Doctor(DoctorArgs),
    /// Print a shell's completions of this command line
    ///
    /// For bash: fst completions bash > ~/.local/share/bash-completion/completions/fst
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Write the manual pages, one for each command, into a folder
    Man {
        /// The folder; it must exist
        #[arg(value_name = "DIR")]
        folder: PathBuf,
    },
}

impl Command {
    /// Whether a script reads what this prints, errors included. Those of one process of several would be as
    /// many documents.
    pub(crate) fn json(&self) -> bool {
        match self {
            Command::Load(args) => args.json && args.ranks.dist.is_none(),
            Command::Inspect(args) => args.json,
            Command::Sum(args) => args.json && args.dist.is_none(),
            Command::Synth(args) => args.json,
            Command::Plan(args) => args.json,
            Command::Doctor(args) => args.json,
            Command::Completions { .. } | Command::Man { .. } => false,
        }
    }
}

/// Which tensors.
#[derive(Debug, Args)]
pub(crate) struct Select {
    /// Only tensors whose name matches this glob (`*`, `?`, `[a-z]`, `{a,b}`, `{0..11}`); may be
    /// repeated
    #[arg(long = "select", value_name = "GLOB", requires = "paths")]
    pub(crate) patterns: Vec<Pattern>,
    /// Leave out tensors that an index puts into files without them, instead of failing
    #[arg(long, requires = "paths")]
    pub(crate) allow_missing: bool,
}

impl Select {
    /// How a checkpoint is opened for headers alone.
    pub(crate) fn options(&self) -> OpenOptions {
        OpenOptions::new().allow_missing(self.allow_missing)
    }
}

/// How to read and where to.
#[derive(Debug, Args)]
pub(crate) struct Reading {
    /// Where tensors go: `host`, or `cuda:N` for an NVIDIA GPU [default: host, or with `--dist nccl`
    /// the GPU of this process's local rank]
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceArg>,
    /// How files are read: auto, uring, pread, mmap or gds
    #[arg(long, value_name = "ENGINE", default_value = "auto")]
    pub(crate) engine: Engine,
    #[command(flatten)]
    pub(crate) select: Select,
    #[cfg(feature = "object-store")]
    #[command(flatten)]
    cache: CacheArgs,
    /// Do not show progress; it is shown only on a terminal anyway
    #[arg(long)]
    pub(crate) no_progress: bool,
    /// Seconds that reading may take, whatever it waits for [default: no bound]
    #[arg(long, value_name = "SECONDS", value_parser = whole::<u32>(1..=u32::MAX.into()))]
    pub(crate) timeout: Option<u32>,
    /// Load even if the system tells of less memory than the load fills
    #[arg(long)]
    pub(crate) no_memory_check: bool,
}

impl Reading {
    /// How the checkpoint is opened.
    pub(crate) fn options(&self) -> OpenOptions {
        let options = self.select.options();
        #[cfg(feature = "object-store")]
        let options = self.cache.apply(options);
        options
    }

    /// The device asked for, by default the host.
    pub(crate) fn device(&self) -> DeviceArg {
        self.device.clone().unwrap_or_default()
    }

    /// The device asked for, if any was.
    pub(crate) fn device_asked(&self) -> Option<&DeviceArg> {
        self.device.as_ref()
    }
}

/// What each rank of several keeps.
#[derive(Debug, Args)]
pub(crate) struct Rule {
    /// How ranks share the tensors: llama, gpt2, falcon, bloom, gpt-neox, opt, moe,
    /// replicate (all keep all), or auto to go by their names
    #[arg(long, value_name = "NAME", default_value = "auto")]
    pub(crate) preset: PresetArg,
    /// Elements of an attention head: heads then stay whole
    #[arg(long, value_name = "N", value_parser = whole::<u64>(1..=u64::MAX))]
    pub(crate) head_dim: Option<u64>,
    /// Join query, key and value, and gate and up, into one tensor each
    #[arg(long)]
    pub(crate) fused: bool,
}

impl Rule {
    /// Refuses what is said of ranks where there are none.
    pub(crate) fn without_ranks(&self) -> Result<(), Failure> {
        let said = match (&self.preset, self.head_dim, self.fused) {
            (PresetArg::Named(_), ..) => "--preset",
            (_, Some(_), _) => "--head-dim",
            (.., true) => "--fused",
            _ => return Ok(()),
        };
        Err(needs_ranks(said))
    }
}

/// How ranks work together.
#[derive(Debug, Args)]
pub(crate) struct Together {
    /// Seconds that a rank may be silent before the others give up: one that reads or sends is not; and
    /// how long ranks wait for all to come [default: 120]
    #[arg(long, value_name = "SECONDS", value_parser = whole::<u32>(1..=86_400))]
    deadline: Option<u32>,
}

impl Together {
    pub(crate) fn deadline(&self) -> Duration {
        self.deadline.map_or(DEFAULT_DEADLINE, |seconds| Duration::from_secs(seconds.into()))
    }

    /// Refuses what is said of ranks where there are none.
    pub(crate) fn without_ranks(&self) -> Result<(), Failure> {
        self.deadline.map_or(Ok(()), |_| Err(needs_ranks("--deadline")))
    }
}

fn needs_ranks(said: &str) -> Failure {
    Failure::usage(format!("{said} is for several ranks: give --world N or --dist GROUP"))
}

/// Ranks that load together.
#[derive(Debug, Args)]
#[command(next_help_heading = "Several ranks")]
pub(crate) struct Ranks {
    /// Load by N ranks of this process, each keeping its shards; with `--device cuda` on all GPUs in
    /// turn
    #[arg(long, value_name = "N", value_parser = whole::<u32>(1..=4096))]
    pub(crate) world: Option<u32>,
    /// Load as one rank of a group of processes: `mpi`, started by mpirun, or `nccl`, started by
    /// torchrun, each on the GPU of its local rank
    #[arg(long, value_name = "GROUP", conflicts_with = "world", requires = "paths")]
    pub(crate) dist: Option<GroupArg>,
    #[command(flatten)]
    pub(crate) rule: Rule,
    #[command(flatten)]
    pub(crate) together: Together,
}

#[derive(Debug, Args)]
pub(crate) struct LoadArgs {
    /// A .safetensors file, an index.json, a folder that holds either, a URL of one (s3://, gs://, az://,
    /// https://, hf://ORG/NAME[@REVISION]), or the id ORG/NAME of a model in the local cache of the Hugging
    /// Face hub
    #[arg(value_name = "PATH")]
    pub(crate) paths: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) reading: Reading,
    /// Convert tensors of a floating-point dtype to this one, such as BF16, F32 or float8_e4m3fn
    #[arg(value_parser = parse_target, long, value_name = "DTYPE")]
    pub(crate) dtype: Option<Dtype>,
    /// Map the files instead of reading them, and bring their pages into memory: no copy but of what
    /// is cut, converted or misaligned, and the files must not be changed meanwhile
    #[arg(long, conflicts_with_all = ["world", "dist", "engine"])]
    pub(crate) map: bool,
    /// How cached files get to a GPU: `registered`, straight out of the page cache; `staged`, through
    /// pinned memory; `measured`, by the faster of both; or `auto`, which measures where that pays
    #[arg(
        long,
        value_name = "WAY",
        value_parser = parse_cached_copy,
        conflicts_with_all = ["map", "world", "dist"]
    )]
    pub(crate) cached_copy: Option<CachedCopy>,
    /// Load only START..END of dimension DIM of the tensor NAME; may be repeated, also for one tensor:
    /// ranges of one dimension are joined in this order
    #[arg(
        long,
        value_name = "NAME:DIM:START..END",
        requires = "paths",
        conflicts_with_all = ["world", "dist"]
    )]
    pub(crate) slice: Vec<SliceArg>,
    /// Hold every tensor's bytes to the sums in this file, as `fst sum -o FILE` writes them or
    /// `fst sum` prints them (but for names that it prints with escapes)
    #[arg(long, value_name = "FILE", requires = "paths")]
    pub(crate) verify: Option<PathBuf>,
    /// Write the load's timeline to this file, for chrome://tracing or https://ui.perfetto.dev
    #[arg(long, value_name = "FILE", conflicts_with_all = ["world", "dist"])]
    pub(crate) trace: Option<PathBuf>,
    /// Draw throughput over time to this file, as an SVG
    #[arg(
        long,
        value_name = "FILE.svg",
        value_parser = parse_plot,
        conflicts_with_all = ["world", "dist"]
    )]
    pub(crate) plot: Option<PathBuf>,
    /// Load N times, and report the load of median time and how far the others spread
    #[arg(
        long,
        value_name = "N",
        value_parser = whole::<u32>(1..=1000),
        default_value_t = 1,
        conflicts_with_all = ["world", "dist", "trace", "plot"]
    )]
    pub(crate) runs: u32,
    /// Take the files out of the page cache first, before each run; other files stay
    #[arg(long, conflicts_with = "dist")]
    pub(crate) cold: bool,
    /// Print one JSON document instead of text
    ///
    /// Whatever is loaded, it has `tensors`, `bytes` (as loaded), `seconds`, `gb_per_s` (of `bytes`;
    /// GB are 10^9), `engine`, `device` and `stages`, an object of `{"seconds", "bytes"}` by name.
    /// Of ranks these are sums, and the time and stages of the slowest; `ranks` has the same of
    /// each. Of several runs these are the median run's, and `runs` has `seconds`, `gb_per_s` and
    /// `resident_bytes` of each.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) ranks: Ranks,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// A .safetensors file, an index.json, a folder that holds either, a URL of one (s3://, gs://, az://,
    /// https://, hf://ORG/NAME[@REVISION]), or the id ORG/NAME of a model in the local cache of the Hugging
    /// Face hub
    #[arg(value_name = "PATH", required = true)]
    pub(crate) paths: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) select: Select,
    /// List every tensor, also where there are many
    #[arg(long)]
    pub(crate) all: bool,
    /// Print one JSON document instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct SumArgs {
    /// A .safetensors file, an index.json, a folder that holds either, a URL of one (s3://, gs://, az://,
    /// https://, hf://ORG/NAME[@REVISION]), or the id ORG/NAME of a model in the local cache of the Hugging
    /// Face hub
    #[arg(value_name = "PATH", required = true)]
    pub(crate) paths: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) reading: Reading,
    /// Read only START..END of dimension DIM of the tensor NAME; may be repeated, also for one tensor:
    /// ranges of one dimension are joined in this order
    #[arg(long, value_name = "NAME:DIM:START..END")]
    pub(crate) slice: Vec<SliceArg>,
    /// Convert tensors of a floating-point dtype to this one first, such as BF16 or F32
    #[arg(value_parser = parse_target, long, value_name = "DTYPE")]
    pub(crate) dtype: Option<Dtype>,
    /// Write the sums to this file as JSON, with dtypes and shapes, for `fst load --verify FILE`
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// Print one JSON document instead of text
    #[arg(long)]
    pub(crate) json: bool,
    /// Sum whole files instead, and hold them to the SHA-256 that the Hugging Face hub recorded when they
    /// were downloaded, into its cache or by `hf download --local-dir`
    #[arg(
        long,
        conflicts_with_all = ["patterns", "slice", "dtype", "output", "world", "dist", "device", "engine"]
    )]
    pub(crate) hub: bool,
    /// Sum the shards of N ranks of this process
    #[arg(
        long,
        value_name = "N",
        value_parser = whole::<u32>(1..=4096),
        conflicts_with_all = ["slice", "output"],
        help_heading = "Several ranks"
    )]
    pub(crate) world: Option<u32>,
    /// Sum the shards of a group of processes, of which this is one: `mpi`, started by mpirun, or
    /// `nccl`, started by torchrun
    #[arg(
        long,
        value_name = "GROUP",
        conflicts_with_all = ["world", "slice", "output"],
        help_heading = "Several ranks"
    )]
    pub(crate) dist: Option<GroupArg>,
    #[command(flatten, next_help_heading = "Several ranks")]
    pub(crate) rule: Rule,
    #[command(flatten, next_help_heading = "Several ranks")]
    pub(crate) together: Together,
}

#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    /// A .safetensors file, an index.json, a folder that holds either, a URL of one (s3://, gs://, az://,
    /// https://, hf://ORG/NAME[@REVISION]), or the id ORG/NAME of a model in the local cache of the Hugging
    /// Face hub
    #[arg(value_name = "PATH", required = true)]
    pub(crate) paths: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) select: Select,
    /// How many ranks
    #[arg(long, value_name = "N", value_parser = whole::<u32>(1..=65536))]
    pub(crate) world: u32,
    #[command(flatten)]
    pub(crate) rule: Rule,
    /// Spread the ranks over K nodes
    #[arg(long, value_name = "K", default_value_t = 1, value_parser = whole::<u32>(1..=u32::MAX.into()))]
    pub(crate) nodes: u32,
    /// Each node has the checkpoint on storage of its own, rather than all on shared storage
    #[arg(long)]
    pub(crate) local_storage: bool,
    /// Measure the rates that are not given: read up to 1 GB of the checkpoint on this machine, and
    /// copy between ranks in its memory
    #[arg(long)]
    pub(crate) measure: bool,
    /// Rate of a storage, for all its ranks together
    #[arg(long, value_name = "GB/S", allow_hyphen_values = true)]
    pub(crate) storage_gb_s: Option<f64>,
    /// Rate of a rank's link to others of its node, each way
    #[arg(long, value_name = "GB/S", allow_hyphen_values = true)]
    pub(crate) link_gb_s: Option<f64>,
    /// Rate of a rank's link to other nodes, each way
    #[arg(long, value_name = "GB/S", allow_hyphen_values = true)]
    pub(crate) net_gb_s: Option<f64>,
    /// Print one JSON document instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct SynthArgs {
    /// The folder to make; it must not hold a checkpoint yet
    #[arg(value_name = "DIR")]
    pub(crate) folder: PathBuf,
    /// The model to imitate
    #[arg(long, value_name = "NAME", value_parser = model_names(), ignore_case = true)]
    pub(crate) model: String,
    /// Keep only the first N layers
    #[arg(long, value_name = "N")]
    pub(crate) layers: Option<usize>,
    /// Cut the checkpoint into N files of about the same size instead of as published
    #[arg(long, value_name = "N", value_parser = whole::<u32>(1..=u32::MAX.into()))]
    pub(crate) shards: Option<u32>,
    /// Give tensors of a floating-point dtype this one
    #[arg(value_parser = parse_made, long, value_name = "DTYPE")]
    pub(crate) dtype: Option<Dtype>,
    /// Choose other values; the same seed gives the same bytes
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// Divide every dimension of 64 or more by N: all tensors of a large model on a small disk
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = whole::<u16>(1..=u16::MAX.into()))]
    pub(crate) shrink: u16,
    /// Print one JSON document instead of text
    #[arg(long)]
    pub(crate) json: bool,
    /// Do not show progress; it is shown only on a terminal anyway
    #[arg(long)]
    pub(crate) no_progress: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// A file, index or folder to judge: how would it be read?
    #[arg(value_name = "PATH")]
    pub(crate) path: Option<PathBuf>,
    /// Read up to 1 GB of this checkpoint by each engine, and tell the rates
    #[arg(long, value_name = "PATH")]
    pub(crate) measure: Option<PathBuf>,
    /// Print one JSON document instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

/// A whole number in this range.
fn whole<T: TryFrom<u64>>(
    range: RangeInclusive<u64>,
) -> impl Fn(&str) -> Result<T, String> + Clone + Send + Sync {
    move |text| {
        let number = text.parse().ok().filter(|number| range.contains(number));
        let (least, most) = (range.start(), range.end());
        number.and_then(|number: u64| T::try_from(number).ok()).ok_or_else(|| match *most {
            u64::MAX => format!("expected a whole number, at least {least}"),
            most => format!("expected a whole number from {least} to {most}"),
        })
    }
}

/// The file of a drawing, whose name says what it is.
fn parse_plot(name: &str) -> Result<PathBuf, &'static str> {
    let path = PathBuf::from(name);
    match path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("svg")) {
        true => Ok(path),
        false => Err("drawings are SVG: name a file that ends in .svg"),
    }
}

/// The models by name, so that help and errors list them.
fn model_names() -> PossibleValuesParser {
    PossibleValuesParser::new(
        MODELS
            .iter()
            .map(|model| PossibleValue::new(model.name()).aliases(model.aliases().iter().copied())),
    )
}
