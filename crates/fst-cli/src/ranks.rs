//! Loads by several ranks: threads of this process, or processes that a launcher started.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use fst::dist::group::TcpControl;
use fst::dist::{GroupError, NcclStream, TensorDesc, local_groups_with};
use fst::{
    Checkpoint, Device, DeviceError, DistError, Error, Group, LaunchEnv, Loader, LocalGroup,
    NcclGroup, Preset, Tensors,
};
use serde::{Deserialize, Serialize};

use crate::args::{LoadArgs, Reading, Rule, Together};
use crate::device::DeviceArg;
use crate::failure::Failure;
use crate::figures::Figures;
use crate::reading;
use crate::text::{self, Align, HEADING, RESULT, Table, counted, styled, visible};

/// `--preset`: a family of models, or `auto`.
#[derive(Clone, Debug)]
pub(crate) enum PresetArg {
    Auto,
    Named(Preset),
}

impl FromStr for PresetArg {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let unknown = || format!("expected {} or auto", Preset::NAMES.join(", "));
        match name {
            "auto" => Ok(Self::Auto),
            name => Preset::named(name).map(Self::Named).ok_or_else(unknown),
        }
    }
}

/// `--dist`: what carries bytes between processes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum GroupArg {
    Mpi,
    Nccl,
}

impl FromStr for GroupArg {
    type Err = &'static str;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "mpi" if cfg!(feature = "mpi") => Ok(Self::Mpi),
            "mpi" => Err("this program was built without MPI: build it with --features mpi"),
            "nccl" => Ok(Self::Nccl),
            _ => Err("expected mpi or nccl"),
        }
    }
}

/// The preset that the command line asks for, for `world` ranks. Says so if it does not fit.
pub(crate) fn preset(
    checkpoint: &Checkpoint,
    rule: &Rule,
    paths: &[PathBuf],
    world: u32,
) -> Result<Preset, Failure> {
    let preset = preset_asked(checkpoint, rule, paths)?;
    warn_of_misfit(&preset, world, checkpoint, paths);
    Ok(preset)
}

/// As [`preset`], of one rank of a group: rank 0 says what there is to say, and an error ends all.
pub(crate) fn preset_of(
    group: &dyn Group,
    checkpoint: &Checkpoint,
    rule: &Rule,
    paths: &[PathBuf],
) -> Result<Preset, Failure> {
    let preset = preset_asked(checkpoint, rule, paths)
        .inspect_err(|_| group.abort("no preset fits the names of the tensors"))?;
    if group.rank() == 0 {
        warn_of_misfit(&preset, group.world_size(), checkpoint, paths);
    }
    Ok(preset)
}

fn preset_asked(
    checkpoint: &Checkpoint,
    rule: &Rule,
    paths: &[PathBuf],
) -> Result<Preset, Failure> {
    let names = || checkpoint.tensors().iter().map(|tensor| tensor.name());
    let preset = match &rule.preset {
        PresetArg::Named(preset) => Some(preset.clone()),
        PresetArg::Auto => Preset::detect(names()),
    };
    let Some(mut preset) = preset else {
        let what = format!(
            "no preset fits the names of the tensors; choose one with --preset: {}",
            Preset::NAMES.join(", ")
        );
        return Err(match paths.first() {
            Some(path) => Failure::at(path, what),
            None => Failure::of(what),
        });
    };
    if let Some(elements) = rule.head_dim {
        preset = preset.head_dim(elements);
    }
    Ok(if rule.fused { preset.fused() } else { preset })
}

/// Does `each` on a thread for each rank, of which rank `r` keeps its shards on `devices[r]`. Of several
/// errors it returns the cause of the others.
pub(crate) fn run<T: Send>(
    devices: &[Device],
    together: &Together,
    each: impl Fn(Arc<dyn Group>, Device) -> Result<T, Error> + Sync,
) -> Result<Vec<T>, RankFailure> {
    let rank = |group: LocalGroup, device: &Device| each(Arc::new(group), device.clone());
    let groups = local_groups_with(devices, together.deadline()).map_err(RankFailure::Load)?;
    let results: Vec<Result<T, RankFailure>> = std::thread::scope(|scope| {
        let threads: Vec<_> = groups
            .into_iter()
            .zip(devices)
            .map(|(group, device)| {
                let rank = &rank;
                // Without a thread, the group goes with the closure, and the other ranks learn of it.
                let builder = std::thread::Builder::new();
                builder.spawn_scoped(scope, move || rank(group, device))
            })
            .collect();
        let join = |thread: std::io::Result<
            std::thread::ScopedJoinHandle<'_, Result<T, Error>>,
        >| match thread {
            Ok(thread) => {
                let done = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                done.map_err(RankFailure::Load)
            }
            Err(error) => Err(RankFailure::NoThread(error)),
        };
        threads.into_iter().map(join).collect()
    });
    let mut done = Vec::with_capacity(results.len());
    let mut failed: Option<RankFailure> = None;
    for result in results {
        match result {
            Ok(value) => done.push(value),
            Err(error) if failed.as_ref().is_none_or(is_echo) => failed = Some(error),
            Err(_) => {}
        }
    }
    failed.map_or(Ok(done), Err)
}

/// Why ranks of this process failed.
pub(crate) enum RankFailure {
    /// The load of one did.
    Load(Error),
    /// One got no thread.
    NoThread(std::io::Error),
}

impl RankFailure {
    pub(crate) fn of(self, paths: &[PathBuf], checkpoint: &Checkpoint) -> Failure {
        match self {
            Self::Load(error) => reading::failure(paths, checkpoint, &error),
            Self::NoThread(error) => Failure::of(format!(
                "no thread for a rank: {error}; raise the limit, as with `ulimit -u`, or give a smaller --world"
            )),
        }
    }
}

/// Whether an error tells of another rank's.
fn is_echo(error: &RankFailure) -> bool {
    matches!(error, RankFailure::Load(Error::Dist(DistError::Group(_))))
}

/// One rank's load; it travels between processes.
#[derive(Serialize, Deserialize)]
struct Rank {
    rank: u32,
    #[serde(flatten)]
    figures: Figures,
    /// Bytes of the files that it keeps, sent to and received from other ranks.
    kept: u64,
    read: u64,
    sent: u64,
    received: u64,
}

impl Rank {
    fn of(tensors: &Tensors) -> Self {
        let figures = Figures::of(tensors);
        let rank = tensors.report().rank;
        Self {
            rank: rank.map_or(0, |rank| rank.rank),
            kept: rank.map_or(figures.bytes, |rank| rank.kept_bytes),
            read: figures.bytes_read,
            sent: rank.map_or(0, |rank| rank.sent_bytes),
            received: rank.map_or(0, |rank| rank.received_bytes),
            figures,
        }
    }
}

/// The load of all ranks.
#[derive(Serialize)]
struct Report<'r> {
    #[serde(flatten)]
    figures: Figures,
    world: usize,
    preset: &'static str,
    /// Bytes of the selected tensors in the files.
    checkpoint_bytes: u64,
    kept: u64,
    read: u64,
    sent: u64,
    received: u64,
    ranks: &'r [Rank],
}

/// A preset that cuts less than this share of a checkpoint's bytes is not for its family: those that
/// a preset is for have few bytes in norms, small projections and positions.
const FITS: f64 = 0.9;

/// Says on standard error that `preset` leaves too much of the checkpoint to every one of `world` ranks.
fn warn_of_misfit(preset: &Preset, world: u32, checkpoint: &Checkpoint, paths: &[PathBuf]) {
    if world < 2 {
        return;
    }
    let table: Vec<TensorDesc> = checkpoint.tensors().iter().map(Into::into).collect();
    let cut = preset.coverage(&table).fraction();
    if cut >= FITS {
        return;
    }
    let path = paths.first().map_or(String::new(), |path| format!("{}: ", path.display()));
    text::warn(&format!(
        "{path}preset {} cuts {:.1}% of the bytes, and every rank keeps all of the others",
        preset.name(),
        cut * 100.0
    ));
}

/// `fst load --world N`.
pub(crate) fn load_here(
    args: &LoadArgs,
    paths: &[PathBuf],
    checkpoint: &Checkpoint,
    loader: &Loader,
    world: u32,
) -> Result<(), Failure> {
    let preset = preset(checkpoint, &args.ranks.rule, paths, world)?;
    let loader = loader.clone().preset(preset.clone());
    let devices = args.reading.device().of_ranks(world)?;
    let together = &args.ranks.together;
    let rank =
        |group, device| Ok(Rank::of(&loader.clone().device(device).group(group).load(checkpoint)?));
    let ranks = run(&devices, together, rank).map_err(|failure| failure.of(paths, checkpoint))?;
    print(args, paths, checkpoint, &preset, &ranks)
}

/// `fst load --dist GROUP`: this process is one rank; rank 0 tells of all.
pub(crate) fn load_as_one(
    args: &LoadArgs,
    paths: &[PathBuf],
    checkpoint: &Checkpoint,
    loader: Loader,
    group: GroupArg,
) -> Result<(), Failure> {
    let (group, loader) = join(group, &args.reading, &args.ranks.together, loader)?;
    let preset = preset_of(&*group, checkpoint, &args.ranks.rule, paths)?;
    let loader = loader.preset(preset.clone()).group(group.clone());
    let fail = |error| reading::failure(paths, checkpoint, &error);
    let tensors = loader.load(checkpoint).map_err(fail)?;
    let told = serde_json::to_vec(&Rank::of(&tensors)).map_err(Failure::of)?;
    let told = group.gather_messages(&told).map_err(Failure::of)?;
    if group.rank() != 0 {
        return Ok(());
    }
    let ranks: Result<Vec<Rank>, _> =
        told.iter().map(|rank| serde_json::from_slice(rank)).collect();
    print(args, paths, checkpoint, &preset, &ranks.map_err(Failure::of)?)
}

/// Makes this process a rank of the group that the launcher started. Over NCCL its shards go to the GPU
/// named, or to that of its rank on this machine.
pub(crate) fn join(
    group: GroupArg,
    reading: &Reading,
    together: &Together,
    loader: Loader,
) -> Result<(Arc<dyn Group>, Loader), Failure> {
    let deadline = together.deadline();
    let asked = reading.device_asked();
    match (group, asked.map(DeviceArg::is_cuda)) {
        (GroupArg::Mpi, Some(true)) => {
            Err(Failure::usage("--dist mpi loads into host memory: for GPUs, use --dist nccl"))
        }
        (GroupArg::Nccl, Some(false)) => {
            let what = "--dist nccl loads to GPUs: leave --device out for the GPU of each \
                        process's local rank, or use --dist mpi for host memory";
            Err(Failure::usage(what))
        }
        (GroupArg::Mpi, _) => Ok((join_mpi(deadline)?, loader)),
        (GroupArg::Nccl, _) => {
            let env = LaunchEnv::from_env().map_err(|error| Failure::of(launched(&error)))?;
            let device = DeviceArg::of_process(asked, env.local_rank)?;
            let group = Arc::new(join_nccl(&env, &device, deadline).map_err(Failure::of)?);
            Ok((group, loader.device(device)))
        }
    }
}

/// What to do about a launcher's variables that are not there.
fn launched(error: &GroupError) -> String {
    format!(
        "--dist nccl: {error}; start each rank with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and \
         MASTER_PORT set, as `torchrun --no-python --nproc-per-node N fst ...` does, or from srun's \
         SLURM_PROCID, SLURM_NTASKS and SLURM_LOCALID"
    )
}

fn join_nccl(env: &LaunchEnv, device: &Device, deadline: Duration) -> Result<NcclGroup, Error> {
    // First, so that the others do not wait for a process that has no GPU.
    let not_cuda = || DistError::NotCuda { device: device.clone() };
    let stream = NcclStream::new(device.as_cuda().ok_or_else(not_cuda)?);
    let stream = stream.map_err(DeviceError::Cuda)?;
    let control = TcpControl::from_env(env, deadline).map_err(DistError::Group)?;
    Ok(NcclGroup::init(Box::new(control), Box::new(stream)).map_err(DistError::Group)?)
}

#[cfg(feature = "mpi")]
fn join_mpi(deadline: Duration) -> Result<Arc<dyn Group>, Failure> {
    Ok(Arc::new(fst::MpiGroup::init(deadline).map_err(Failure::of)?))
}

#[cfg(not(feature = "mpi"))]
fn join_mpi(_deadline: Duration) -> Result<Arc<dyn Group>, Failure> {
    // The command line is not accepted without the feature.
    Err(Failure::usage("--dist mpi: this program was built without MPI"))
}

fn print(
    args: &LoadArgs,
    paths: &[PathBuf],
    checkpoint: &Checkpoint,
    preset: &Preset,
    ranks: &[Rank],
) -> Result<(), Failure> {
    let Some(figures) = Figures::of_all(ranks.iter().map(|rank| &rank.figures)) else {
        return Ok(());
    };
    let selected = reading::selected(checkpoint, &args.reading.select)
        .map_err(|error| reading::failure(paths, checkpoint, &error))?;
    let sum = |of: fn(&Rank) -> u64| ranks.iter().map(of).sum::<u64>();
    let report = Report {
        figures,
        world: ranks.len(),
        preset: preset.name(),
        checkpoint_bytes: selected.iter().map(|tensor| tensor.byte_len()).sum(),
        kept: sum(|rank| rank.kept),
        read: sum(|rank| rank.read),
        sent: sum(|rank| rank.sent),
        received: sum(|rank| rank.received),
        ranks,
    };
    if args.json {
        return text::print_json(&report).map_err(Failure::output);
    }
    text::remark(&render(&report, paths)).map_err(Failure::output)
}

fn render(report: &Report<'_>, paths: &[PathBuf]) -> String {
    let paths: Vec<String> =
        paths.iter().map(|path| visible(&path.display().to_string())).collect();
    let mut out = format!("{}\n", styled(HEADING, paths.join(" ")));
    let all = &report.figures;
    out += &format!(
        "  {} by {} (preset {}) to {} in {}: {}\n\n",
        text::bytes(all.bytes),
        counted(report.world as u64, "rank"),
        report.preset,
        all.device,
        text::seconds(all.seconds),
        styled(RESULT, text::rate(all.gb_per_s))
    );
    let mut table = Table::new(&[Align::Right; 7]);
    let heads = ["rank", "tensors", "keeps", "read", "sent", "received", "time"];
    table.row(heads.map(str::to_owned));
    let cells = |name: String, tensors: usize, bytes: [u64; 4], seconds: f64| {
        let [kept, read, sent, received] = bytes.map(text::bytes);
        [name, text::count(tensors as u64), kept, read, sent, received, text::seconds(seconds)]
    };
    for rank in report.ranks {
        let bytes = [rank.figures.bytes, rank.read, rank.sent, rank.received];
        table.row(cells(rank.rank.to_string(), rank.figures.tensors, bytes, rank.figures.seconds));
    }
    let bytes = [all.bytes, report.read, report.sent, report.received];
    table.row(cells("all".to_owned(), all.tensors, bytes, all.seconds));
    out += &table.render();
    out += &format!("\n  engine {}: {}\n", all.engine, visible(&all.engine_reason));
    out
}
