//! `fst sum`: the SHA-256 of each tensor's bytes as an engine read them.

use std::collections::HashSet;

use fst::dist::{Group, TensorDesc};
use fst::{Checkpoint, Checksum, Dtype, Error, Loader, Manifest, Plan, Preset, Tensor, Topology};
use serde::{Deserialize, Serialize};

use crate::args::SumArgs;
use crate::failure::Failure;
use crate::hub;
use crate::output;
use crate::parallel;
use crate::progress::Progress;
use crate::ranks::{self, GroupArg};
use crate::reading;
use crate::text::{self, counted, visible};

/// Bytes of shards that all ranks together hold at once, unless those of one tensor are more.
const HELD_AT_ONCE: u64 = 1 << 30;

/// How many sums all ranks together tell at once: some ten megabytes, of the 64 that a group carries.
const TOLD_AT_ONCE: usize = 1 << 16;

/// Bytes that a rank hashes between two tellings for each second of the deadline at which the others
/// give up, unless one tensor has more: a fraction of what a core hashes in a second.
const HASHED_PER_SECOND: u64 = 64 << 20;

/// The sum of one rank's shard; it travels between processes.
#[derive(Serialize, Deserialize)]
struct ShardSum {
    rank: u32,
    name: String,
    dtype: String,
    shape: Vec<usize>,
    sha256: String,
}

/// Some of a rank's sums.
#[derive(Serialize, Deserialize)]
struct Told {
    sums: Vec<ShardSum>,
    /// Whether there are more to come.
    more: bool,
}

#[derive(Serialize)]
struct Shards {
    tensors: Vec<ShardSum>,
}

pub(crate) fn run(args: &SumArgs) -> Result<(), Failure> {
    if args.world.is_none() && args.dist.is_none() {
        args.rule.without_ranks()?;
        args.together.without_ranks()?;
    }
    let checkpoint = reading::open_and_warn(&args.paths, &args.reading.options())?;
    if args.hub {
        return hub::check(&checkpoint, !args.reading.no_progress, args.json);
    }
    reading::spare(&checkpoint, &args.paths, [&args.output])?;
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
    let bar = progress.bar();
    let sums = loader.checksums(&checkpoint, |progress| {
        bar.set_length(progress.bytes_total);
        bar.set_position(progress.bytes_done);
    });
    let sums = sums.map_err(|error| reading::failure(&args.paths, &checkpoint, &error))?;
    drop(progress);
    let manifest = Manifest::new(sums).map_err(Failure::of)?;
    if let Some(path) = &args.output {
        let json = manifest.to_json() + "\n";
        if path.as_os_str() == "-" {
            return text::print(&json).map_err(Failure::output);
        }
        output::write(path, json)?;
    }
    if args.json {
        return text::print_json_text(&manifest.to_json()).map_err(Failure::output);
    }
    let out = match &args.output {
        Some(path) => {
            let sums = counted(manifest.len() as u64, "sum");
            let line = format!("{sums} written to {}\n", visible(&path.display().to_string()));
            return text::remark(&line).map_err(Failure::output);
        }
        None => {
            let line = |sum: &Checksum| format!("{}  {}\n", sum.sha256, visible(&sum.name));
            let lines: String = manifest.iter().map(line).collect();
            let sizes = manifest
                .iter()
                .map(|sum| size(sum.dtype, sum.shape.as_deref().unwrap_or_default()));
            lines + &selection(args, &checkpoint, sizes)
        }
    };
    text::print(&out).map_err(Failure::output)
}

/// Bytes of a tensor.
fn size(dtype: Option<Dtype>, shape: &[usize]) -> u64 {
    let bits = dtype.map_or(0, |dtype| u64::from(dtype.bits()));
    shape.iter().map(|dim| *dim as u64).product::<u64>() * bits / 8
}

/// How much was selected and summed, as a remark under the sums; nothing where all was.
fn selection(
    args: &SumArgs,
    checkpoint: &Checkpoint,
    sizes: impl ExactSizeIterator<Item = u64>,
) -> String {
    if args.reading.select.patterns.is_empty() || text::is_quiet() {
        return String::new();
    }
    let (count, all) = (sizes.len() as u64, checkpoint.tensors().len() as u64);
    let of = match args.world.is_some() || args.dist.is_some() {
        true => counted(count, "shard"),
        false => format!("{} of {}", text::count(count), counted(all, "tensor")),
    };
    format!("# {of}, {}\n", text::bytes(sizes.sum()))
}

/// The tensors of a plan, by name, in the order of their files, in batches of which all ranks together keep at
/// most `most` bytes as they are in the files, unless one tensor has more. Tensors that are fused into one stay together.
fn batches(plan: &Plan, most: u64) -> Vec<Vec<String>> {
    let tensors = plan.tensors();
    // For each tensor the first of those that it is fused with, and for that the bytes that ranks keep.
    let mut first: Vec<usize> = (0..tensors.len()).collect();
    let mut kept = vec![0u64; tensors.len()];
    let ranks: Vec<_> = (0..plan.world()).map(|rank| plan.rank(rank)).collect();
    let outputs = || ranks.iter().flat_map(|rank| rank.outputs());
    for output in outputs() {
        let of = output.tensors.iter().map(|tensor| first[*tensor as usize]).min();
        for tensor in output.tensors.iter().map(|tensor| *tensor as usize) {
            let (before, of) = (first[tensor], of.unwrap_or(tensor));
            (first[before], first[tensor]) = (of, of);
        }
    }
    (0..first.len()).for_each(|tensor| first[tensor] = first[first[tensor]]);
    for output in outputs() {
        if let Some(tensor) = output.tensors.first() {
            kept[first[*tensor as usize]] += output.bytes;
        }
    }
    let mut batches: Vec<Vec<String>> = Vec::new();
    // For each tensor that is first, its batch.
    let mut batch = vec![0; tensors.len()];
    let mut left = 0u64;
    for (index, tensor) in tensors.iter().enumerate() {
        if first[index] == index {
            if batches.is_empty() || kept[index] > left {
                batches.push(Vec::new());
                left = most;
            }
            left = left.saturating_sub(kept[index]);
            batch[index] = batches.len() - 1;
        }
        if let Some(names) = batches.get_mut(batch[first[index]]) {
            names.push(tensor.name.clone());
        }
    }
    batches
}

/// The loader that cuts as `preset` does with all that is selected, whatever part is loaded.
fn sharded(loader: &Loader, preset: &Preset, checkpoint: &Checkpoint, world: u32) -> Loader {
    let table: Vec<TensorDesc> = checkpoint.tensors().iter().map(Into::into).collect();
    let rules = preset.rules(&table, world);
    loader.clone().shard(move |tensor| rules.shard(&tensor.into()))
}

/// The loader for a part of what it selects.
fn part(loader: &Loader, names: &[String]) -> Loader {
    let names: HashSet<String> = names.iter().cloned().collect();
    loader.clone().select_with(move |tensor| names.contains(tensor.name()))
}

/// Sums the shards of `world` ranks, rank by rank.
fn shards(
    args: &SumArgs,
    loader: &Loader,
    checkpoint: &Checkpoint,
    world: u32,
) -> Result<(), Failure> {
    let preset = ranks::preset(checkpoint, &args.rule, &args.paths, world)?;
    let planner = loader.clone().preset(preset.clone()).topology(Topology::one_node(world));
    let fail = |error| reading::failure(&args.paths, checkpoint, &error);
    let batches = batches(&planner.rank_plan(checkpoint).map_err(fail)?, HELD_AT_ONCE);
    let loader = sharded(loader, &preset, checkpoint, world);
    let devices = args.reading.device().of_ranks(world)?;
    let threads = parallel::cores() / world as usize;
    let sums = ranks::run(&devices, &args.together, |group, device| {
        let loader = loader.clone().device(device).group(group.clone());
        sums_of_batches(&loader, checkpoint, &batches, group.rank(), threads)
    });
    let sums = sums.map_err(|failure| failure.of(&args.paths, checkpoint))?;
    print_shards(args, checkpoint, sums)
}

/// Sums the shards of this process, one rank of `group`; rank 0 tells those of all.
fn shards_as_one(
    args: &SumArgs,
    loader: Loader,
    checkpoint: &Checkpoint,
    group: GroupArg,
) -> Result<(), Failure> {
    let (group, loader) = ranks::join(group, &args.reading, &args.together, loader)?;
    let preset = ranks::preset_of(&*group, checkpoint, &args.rule, &args.paths)?;
    let fail = |error| reading::failure(&args.paths, checkpoint, &error);
    let world = group.world_size();
    let planner = loader.clone().preset(preset.clone()).topology(Topology::one_node(world));
    let plan = planner.rank_plan(checkpoint).inspect_err(|error| group.abort(&error.to_string()));
    let batches = batches(&plan.map_err(fail)?, HELD_AT_ONCE);
    let loader = sharded(&loader, &preset, checkpoint, world).group(group.clone());
    let at_once = (TOLD_AT_ONCE / world as usize).max(1);
    let mut sums: Vec<Vec<ShardSum>> = (0..world).map(|_| Vec::new()).collect();
    for batch in &batches {
        let tensors = part(&loader, batch).load(checkpoint).map_err(fail)?;
        let tensors: Vec<&Tensor> = tensors.iter().collect();
        let now = sums_of_all(&*group, &tensors, at_once, &fail)?;
        sums.iter_mut().zip(now).for_each(|(sums, now)| sums.extend(now));
    }
    if group.rank() != 0 {
        return Ok(());
    }
    print_shards(args, checkpoint, sums)
}

/// The sums of all ranks, by rank; those of this one are of `tensors`. They are told as they come, at
/// most `at_once` of each rank at a time. Empty on ranks other than rank 0.
fn sums_of_all(
    group: &dyn Group,
    tensors: &[&Tensor],
    at_once: usize,
    fail: &dyn Fn(Error) -> Failure,
) -> Result<Vec<Vec<ShardSum>>, Failure> {
    let threads = parallel::cores() / ranks_here(group)?;
    let mut all: Vec<Vec<ShardSum>> = (0..group.world_size()).map(|_| Vec::new()).collect();
    let mut left = tensors;
    loop {
        let bytes = HASHED_PER_SECOND.saturating_mul(group.deadline().as_secs().max(1));
        let (now, later) = left.split_at(portion(left, at_once, bytes));
        left = later;
        // The others wait for these sums.
        let sums = sums_of(group.rank(), now, threads)
            .inspect_err(|error| group.abort(&error.to_string()))
            .map_err(fail)?;
        let told = Told { sums, more: !left.is_empty() };
        let told = serde_json::to_vec(&told).map_err(Failure::of)?;
        let mut more = false;
        let told = group.gather_messages(&told).map_err(Failure::of)?;
        for (sums, told) in all.iter_mut().zip(told) {
            let told: Told = serde_json::from_slice(&told).map_err(Failure::of)?;
            more |= told.more;
            if group.rank() == 0 {
                sums.extend(told.sums);
            }
        }
        if !more {
            return Ok(all);
        }
    }
}

/// How many of `tensors` to hash before their sums are told: of `most` bytes, if there are several.
fn portion(tensors: &[&Tensor], at_once: usize, most: u64) -> usize {
    let mut bytes = 0u64;
    let fit = tensors.iter().take(at_once).take_while(|tensor| {
        bytes = bytes.saturating_add(tensor.byte_len() as u64);
        bytes <= most
    });
    fit.count().max(1).min(tensors.len())
}

/// How many ranks share this machine's cores.
fn ranks_here(group: &dyn Group) -> Result<usize, Failure> {
    // The same for all processes until the machine starts anew (`random(4)`).
    let here = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let all = group.gather_messages(&here).map_err(Failure::of)?;
    Ok(all.iter().filter(|other| **other == here).count().max(1))
}

/// Loads a rank's shards batch by batch, and sums them.
fn sums_of_batches(
    loader: &Loader,
    checkpoint: &Checkpoint,
    batches: &[Vec<String>],
    rank: u32,
    threads: usize,
) -> Result<Vec<ShardSum>, Error> {
    let mut sums = Vec::new();
    for batch in batches {
        let tensors = part(loader, batch).load(checkpoint)?;
        sums.extend(sums_of(rank, &tensors.iter().collect::<Vec<_>>(), threads)?);
    }
    Ok(sums)
}

/// Hashes on so many threads; the sums are in the order of the tensors.
fn sums_of(rank: u32, tensors: &[&Tensor], threads: usize) -> Result<Vec<ShardSum>, Error> {
    parallel::map(threads, tensors.len(), |at| {
        let tensor = tensors[at];
        Ok(ShardSum {
            rank,
            name: tensor.name().to_owned(),
            dtype: tensor.dtype().as_str().to_owned(),
            shape: tensor.shape().to_vec(),
            sha256: tensor.checksum()?.sha256.to_string(),
        })
    })
}

fn print_shards(
    args: &SumArgs,
    checkpoint: &Checkpoint,
    by_rank: Vec<Vec<ShardSum>>,
) -> Result<(), Failure> {
    let report = Shards { tensors: by_rank.into_iter().flatten().collect() };
    if args.json {
        return text::print_json(&report).map_err(Failure::output);
    }
    let line = |sum: &ShardSum| format!("{}  {}  {}\n", sum.sha256, sum.rank, visible(&sum.name));
    let lines: String = report.tensors.iter().map(line).collect();
    let sizes = report.tensors.iter().map(|sum| size(sum.dtype.parse().ok(), &sum.shape));
    text::print(&(lines + &selection(args, checkpoint, sizes))).map_err(Failure::output)
}

#[cfg(test)]
mod tests {
    use fst::dist::LocalGroup;
    use std::sync::Arc;

    use fst::dist::group::Control;
    use safetensors::tensor::{Dtype, TensorView, serialize_to_file};

    use super::*;

    #[test]
    fn batches_sum_to_the_same_as_all_at_once_and_keep_what_is_fused_together() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let names = (0..3).flat_map(|layer| {
            let of = move |name: &str| format!("model.layers.{layer}.{name}.weight");
            let attention =
                ["v_proj", "k_proj", "o_proj", "q_proj"].map(|m| format!("self_attn.{m}"));
            let mlp = ["up_proj", "gate_proj", "down_proj"].map(|m| format!("mlp.{m}"));
            attention.into_iter().chain(mlp).chain(["input_layernorm".into()]).map(move |n| of(&n))
        });
        let bytes: Vec<u8> = (0..24 * 24 * 2).map(|i| (i * 7 % 251) as u8).collect();
        let views = names.enumerate().map(|(i, name)| {
            (name, TensorView::new(Dtype::U8, vec![24, 24], &bytes[i..i + 24 * 24]).unwrap())
        });
        serialize_to_file(views, None, &path).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        let (world, preset) = (2, Preset::llama().head_dim(12).fused());
        let planner = Loader::new().preset(preset.clone()).topology(Topology::one_node(world));
        let plan = planner.rank_plan(&checkpoint).unwrap();
        let loader = sharded(&Loader::new(), &preset, &checkpoint, world);
        let sums = |batches: &[Vec<String>]| -> Vec<(u32, String, Vec<usize>, String)> {
            let mut all = std::thread::scope(|scope| {
                let ranks: Vec<_> = LocalGroup::host(world)
                    .into_iter()
                    .map(|group| {
                        let (loader, checkpoint) = (&loader, &checkpoint);
                        scope.spawn(move || {
                            let rank = group.rank();
                            let loader = loader.clone().group(Arc::new(group));
                            sums_of_batches(&loader, checkpoint, batches, rank, 1).unwrap()
                        })
                    })
                    .collect();
                ranks.into_iter().flat_map(|rank| rank.join().unwrap()).collect::<Vec<_>>()
            });
            all.sort_by(|a, b| (a.rank, &a.name).cmp(&(b.rank, &b.name)));
            all.into_iter().map(|sum| (sum.rank, sum.name, sum.shape, sum.sha256)).collect()
        };
        let [whole] = &batches(&plan, u64::MAX)[..] else { panic!("one batch") };
        assert_eq!(whole.len(), 24);
        let expected = sums(std::slice::from_ref(whole));
        assert!(expected.iter().any(|(_, name, ..)| name.contains("qkv_proj")), "{expected:?}");
        for (most, count) in [(1, 5 * 3), (24 * 24 * 4, 9)] {
            let batches = batches(&plan, most);
            assert_eq!(batches.concat().len(), 24);
            assert!(batches.len() <= count && batches.len() > 5, "{batches:?}");
            assert_eq!(sums(&batches), expected);
        }
    }

    #[test]
    fn sums_told_piece_by_piece_are_all_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let bytes: Vec<u8> = (0..10).collect();
        let view = |i: usize| TensorView::new(Dtype::U8, vec![i], &bytes[..i]).unwrap();
        let views = (0..10).map(|i| (format!("t{i}"), view(i)));
        serialize_to_file(views, None, &path).unwrap();
        let tensors = Loader::new().load(&Checkpoint::open(&path).unwrap()).unwrap();
        let tensors: Vec<&Tensor> = tensors.iter().collect();
        // Ranks that have more than others, or nothing, and tell it in several pieces, or in one.
        let counts = [3, 10, 0, 4];
        for at_once in [1, 2, 4, 100] {
            let told = std::thread::scope(|scope| {
                let ranks: Vec<_> = LocalGroup::host(4)
                    .into_iter()
                    .zip(counts)
                    .map(|(group, count)| {
                        let tensors = &tensors[..count];
                        scope.spawn(move || {
                            sums_of_all(&group, tensors, at_once, &Failure::of).unwrap()
                        })
                    })
                    .collect();
                let told: Vec<_> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
                told.into_iter().next().unwrap()
            });
            for ((rank, told), count) in (0u32..).zip(&told).zip(counts) {
                assert_eq!(told.len(), count, "rank {rank}, {at_once} at once");
                for (told, tensor) in told.iter().zip(&tensors) {
                    let sum = tensor.checksum().unwrap().sha256.to_string();
                    assert_eq!(
                        (told.rank, &*told.name, &*told.sha256),
                        (rank, tensor.name(), &*sum)
                    );
                }
            }
        }
    }
}
