//! `fst sum`: the SHA-256 of each tensor's bytes as an engine read them.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, sync_channel};

use fst::{Checkpoint, Checksum, Error, Loader, Manifest, Tensor, Tensors};
use serde::{Deserialize, Serialize};

use crate::args::SumArgs;
use crate::failure::Failure;
use crate::progress::Progress;
use crate::ranks::{self, GroupArg};
use crate::reading;
use crate::text::{self, counted, visible};

/// Memory for tensors on their way from the reader to the hash, unless one tensor needs more.
const MEMORY_BUDGET: u64 = 1 << 30;

/// The sum of one rank's shard; it travels between processes.
#[derive(Serialize, Deserialize)]
struct ShardSum {
    rank: u32,
    name: String,
    dtype: String,
    shape: Vec<usize>,
    sha256: String,
}

#[derive(Serialize)]
struct Shards {
    tensors: Vec<ShardSum>,
}

pub(crate) fn run(args: &SumArgs) -> Result<(), Failure> {
    let checkpoint = reading::open(&args.paths)?;
    let mut loader = reading::loader(&args.reading)?;
    for slice in &args.slice {
        loader = loader.slice(&slice.name, slice.dim, slice.range.clone());
    }
    if let Some(dtype) = args.dtype {
        loader = loader.dtype(dtype);
    }
    if let Some(world) = args.world {
        return shards(args, &loader, &checkpoint, world);
    }
    if let Some(group) = args.dist {
        return shards_as_one(args, loader, &checkpoint, group);
    }
    let progress = Progress::new("summing", 0, !args.reading.no_progress);
    let sums = sums(&loader, &checkpoint, &progress)
        .map_err(|error| reading::failure(&args.paths, &checkpoint, &error))?;
    drop(progress);
    let manifest = Manifest::new(in_order(sums, &checkpoint)).map_err(Failure::of)?;
    if let Some(path) = &args.output {
        let json = manifest.to_json() + "\n";
        std::fs::write(path, json).map_err(|error| Failure::at(path, error))?;
    }
    let out = match (args.json, &args.output) {
        (true, _) => manifest.to_json() + "\n",
        (false, Some(path)) => {
            let sums = counted(manifest.len() as u64, "sum");
            format!("{sums} written to {}\n", visible(&path.display().to_string()))
        }
        (false, None) => {
            let line = |sum: &Checksum| format!("{}  {}\n", sum.sha256, visible(&sum.name));
            manifest.iter().map(line).collect()
        }
    };
    text::print(&out).map_err(Failure::output)
}

/// Sums the shards of `world` ranks, rank by rank.
fn shards(
    args: &SumArgs,
    loader: &Loader,
    checkpoint: &Checkpoint,
    world: u32,
) -> Result<(), Failure> {
    let preset = ranks::preset(checkpoint, &args.rule, &args.paths)?;
    let loader = loader.clone().preset(preset);
    let devices = args.reading.device.of_ranks(world)?;
    let sums = ranks::run(&devices, &loader, checkpoint, |rank, tensors| sums_of(rank, &tensors));
    let sums = sums.map_err(|error| reading::failure(&args.paths, checkpoint, &error))?;
    print_shards(args, sums)
}

/// Sums the shards of this process, one rank of `group`; rank 0 tells those of all.
fn shards_as_one(
    args: &SumArgs,
    loader: Loader,
    checkpoint: &Checkpoint,
    group: GroupArg,
) -> Result<(), Failure> {
    let (group, loader) = ranks::join(group, &args.reading.device, loader)?;
    let preset = ranks::preset(checkpoint, &args.rule, &args.paths).inspect_err(|_| {
        group.abort("no preset fits the names of the tensors");
    })?;
    let loader = loader.preset(preset).group(group.clone());
    let fail = |error| reading::failure(&args.paths, checkpoint, &error);
    let tensors = loader.load(checkpoint).map_err(fail)?;
    // The others wait for these sums.
    let sums = sums_of(group.rank(), &tensors)
        .inspect_err(|error| group.abort(&error.to_string()))
        .map_err(fail)?;
    let told = serde_json::to_vec(&sums).map_err(Failure::of)?;
    let told = group.gather_messages(&told).map_err(Failure::of)?;
    if group.rank() != 0 {
        return Ok(());
    }
    let all: Result<Vec<Vec<ShardSum>>, _> =
        told.iter().map(|sums| serde_json::from_slice(sums)).collect();
    print_shards(args, all.map_err(Failure::of)?)
}

fn sums_of(rank: u32, tensors: &Tensors) -> Result<Vec<ShardSum>, Error> {
    let sum = |tensor: &Tensor| {
        Ok(ShardSum {
            rank,
            name: tensor.name().to_owned(),
            dtype: tensor.dtype().as_str().to_owned(),
            shape: tensor.shape().to_vec(),
            sha256: Checksum::of(tensor)?.sha256.to_string(),
        })
    };
    tensors.iter().map(sum).collect()
}

fn print_shards(args: &SumArgs, by_rank: Vec<Vec<ShardSum>>) -> Result<(), Failure> {
    let report = Shards { tensors: by_rank.into_iter().flatten().collect() };
    if args.json {
        return text::print_json(&report).map_err(Failure::output);
    }
    let line = |sum: &ShardSum| format!("{}  {}  {}\n", sum.sha256, sum.rank, visible(&sum.name));
    text::print(&report.tensors.iter().map(line).collect::<String>()).map_err(Failure::output)
}

/// Reads and hashes all tensors, in no particular order. Hashing is slower than reading, so each
/// core hashes, and memory stays within a budget.
fn sums(
    loader: &Loader,
    checkpoint: &Checkpoint,
    progress: &Progress,
) -> Result<Vec<Checksum>, Error> {
    // A tensor as large as the budget holds the reading up for as long as it is hashed.
    let loader = loader.clone().stall_timeout(std::time::Duration::MAX);
    let stream = match loader.clone().memory_budget(MEMORY_BUDGET).stream(checkpoint) {
        Err(Error::Budget { needed, .. }) => loader.memory_budget(needed).stream(checkpoint)?,
        stream => stream?,
    };
    progress.bar().set_length(stream.byte_len());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let (send, receive) = sync_channel::<Tensor>(threads);
    let receive = Mutex::new(receive);
    std::thread::scope(|scope| {
        let hashers: Vec<_> =
            (0..threads).map(|_| scope.spawn(|| hash_received(&receive))).collect();
        for tensor in stream {
            let tensor = tensor?;
            progress.add(tensor.byte_len() as u64);
            // The receivers are there until `send` is dropped.
            let _ = send.send(tensor);
        }
        drop(send);
        let mut sums = Vec::new();
        for hasher in hashers {
            match hasher.join() {
                Ok(part) => sums.extend(part?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(sums)
    })
}

fn hash_received(receive: &Mutex<Receiver<Tensor>>) -> Result<Vec<Checksum>, Error> {
    let mut sums = Vec::new();
    let mut failed = None;
    loop {
        let next = receive.lock().unwrap_or_else(|poison| poison.into_inner()).recv();
        let Ok(tensor) = next else { break };
        // After a failure tensors are only taken, so that the sender does not wait for ever.
        if failed.is_none() {
            match Checksum::of(&tensor) {
                Ok(sum) => sums.push(sum),
                Err(error) => failed = Some(error),
            }
        }
    }
    failed.map_or(Ok(sums), Err)
}

/// The sums in the checkpoint's order of tensors.
fn in_order(sums: Vec<Checksum>, checkpoint: &Checkpoint) -> Vec<Checksum> {
    let mut by_name: HashMap<String, Checksum> =
        sums.into_iter().map(|sum| (sum.name.clone(), sum)).collect();
    checkpoint.tensors().iter().filter_map(|tensor| by_name.remove(tensor.name())).collect()
}
