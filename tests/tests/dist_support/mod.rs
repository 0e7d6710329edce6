//! Ranks on threads, and a slow and obvious way to cut tensors by rank, for the tests of loads by
//! several ranks.

#![allow(dead_code, reason = "each test binary uses its part")]

pub(crate) mod nccl;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fst::dist::group::HostCopier;
use fst::{Checkpoint, Error, Group, Loader, LocalGroup, Tensors};
use fst_cli::models::Model;
use fst_cli::synth::{Recipe, Watch};
use safetensors::SafeTensors;

pub(crate) const LONG: Duration = Duration::from_secs(60);

/// A tensor's dtype, shape and bytes.
#[derive(Clone, PartialEq)]
pub(crate) struct Values {
    pub(crate) dtype: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

impl std::fmt::Debug for Values {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?}", self.dtype, self.shape)
    }
}

pub(crate) type ByName = BTreeMap<String, Values>;

/// Models, the preset for each, and by how much they are made smaller.
pub(crate) const FAMILIES: [(&str, &str, usize, usize); 6] = [
    ("llama-2-7b", "llama", 2, 37),
    ("gpt2", "gpt2", 2, 12),
    ("falcon-40b", "falcon", 1, 40),
    ("bloom-176b", "bloom", 1, 61),
    ("qwen3-30b-a3b", "moe", 1, 32),
    ("deepseek-v3", "moe", 4, 64),
];

/// Makes a checkpoint.
pub(crate) fn synth(folder: &Path, model: &str, recipe: impl Fn(Recipe) -> Recipe) {
    let recipe = recipe(Recipe::new(Model::find(model).unwrap()));
    recipe.write(folder, &Watch::default()).unwrap();
}

/// What the official crate reads.
pub(crate) fn official(folder: &Path) -> ByName {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "safetensors") {
            continue;
        }
        let bytes = std::fs::read(path).unwrap();
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let (dtype, shape) = (view.dtype().to_string(), view.shape().to_vec());
            all.insert(name, Values { dtype, shape, bytes: view.data().to_vec() });
        }
    }
    all
}

/// What a load returned.
pub(crate) fn values(tensors: &Tensors) -> ByName {
    let values: ByName = tensors
        .iter()
        .map(|tensor| {
            let (dtype, shape) = (tensor.dtype().to_string(), tensor.shape().to_vec());
            let bytes = tensor.to_host().unwrap().bytes().unwrap().to_vec();
            assert_eq!(tensors.get(tensor.name()).unwrap().name(), tensor.name());
            (tensor.name().to_owned(), Values { dtype, shape, bytes })
        })
        .collect();
    assert_eq!(values.len(), tensors.len(), "names are unique");
    values
}

/// How a rank gets its handle of the group, on its own thread.
pub(crate) type Join<'j> = Box<dyn FnOnce() -> Arc<dyn Group> + Send + 'j>;

/// The handles of a group in this process.
pub(crate) fn local(groups: Vec<LocalGroup>) -> Vec<Join<'static>> {
    let join = |group| Box::new(move || Arc::new(group) as Arc<dyn Group>) as Join<'static>;
    groups.into_iter().map(join).collect()
}

/// Every rank loads on a thread of its own.
pub(crate) fn load(
    world: u32,
    deadline: Duration,
    loader: impl Fn(u32) -> Loader + Sync,
    checkpoint: impl Fn(u32) -> Checkpoint + Sync,
) -> Vec<Result<Tensors, Error>> {
    load_in(local(LocalGroup::with(world, HostCopier, deadline)), loader, checkpoint)
}

/// The same in a given group.
pub(crate) fn load_in(
    ranks: Vec<Join<'_>>,
    loader: impl Fn(u32) -> Loader + Sync,
    checkpoint: impl Fn(u32) -> Checkpoint + Sync,
) -> Vec<Result<Tensors, Error>> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .into_iter()
            .zip(0..)
            .map(|(join, rank)| {
                let (loader, checkpoint) = (&loader, &checkpoint);
                scope.spawn(move || loader(rank).group(join()).load(&checkpoint(rank)))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Each of the tensors is the expected one, and there are no others.
#[track_caller]
pub(crate) fn assert_same(found: &ByName, expected: &ByName, what: &str) {
    let names = |all: &ByName| all.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(found), names(expected), "{what}");
    for (name, expected) in expected {
        assert!(found[name] == *expected, "{what}: {name}: {:?} for {expected:?}", found[name]);
    }
}

/// The tensor with only the given indices of a dimension, in that order, each `None` being zeros.
pub(crate) fn pick(tensor: &Values, dim: usize, indices: &[Option<usize>]) -> Values {
    let outer: usize = tensor.shape[..dim].iter().product();
    let inner: usize = tensor.shape[dim + 1..].iter().product();
    let elements: usize = tensor.shape.iter().product();
    let size = tensor.bytes.len().checked_div(elements).unwrap_or(0);
    let mut bytes = Vec::new();
    for row in 0..outer {
        for index in indices {
            for at in 0..inner {
                match index {
                    Some(index) => {
                        let element = (row * tensor.shape[dim] + index) * inner + at;
                        bytes
                            .extend_from_slice(&tensor.bytes[element * size..(element + 1) * size]);
                    }
                    None => bytes.resize(bytes.len() + size, 0),
                }
            }
        }
    }
    let mut shape = tensor.shape.clone();
    shape[dim] = indices.len();
    Values { dtype: tensor.dtype.clone(), shape, bytes }
}

/// How a tensor is cut.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Cut {
    Whole,
    Split(usize),
    /// Along the dimension, so many tensors stored as one, each split.
    Sections(usize, usize),
    /// Rows, rounded up to a multiple of 64 and then of the world size.
    Vocabulary,
    Expert(usize),
}

/// Rank `rank`'s block of `n` indices.
fn block(n: usize, rank: usize, world: usize) -> std::ops::Range<usize> {
    let each = n.div_ceil(world);
    (rank * each).min(n)..((rank + 1) * each).min(n)
}

/// What a rank keeps of a tensor.
pub(crate) fn kept(
    tensor: &Values,
    cut: Cut,
    experts: usize,
    rank: usize,
    world: usize,
) -> Option<Values> {
    let some = |range: std::ops::Range<usize>| range.map(Some).collect::<Vec<_>>();
    Some(match cut {
        Cut::Whole => tensor.clone(),
        Cut::Split(dim) => pick(tensor, dim, &some(block(tensor.shape[dim], rank, world))),
        Cut::Sections(dim, sections) => {
            let each = tensor.shape[dim] / sections;
            let part = block(each, rank, world);
            let of = |section: usize| section * each + part.start..section * each + part.end;
            pick(tensor, dim, &(0..sections).flat_map(of).map(Some).collect::<Vec<_>>())
        }
        Cut::Vocabulary => {
            let rows = tensor.shape[0].next_multiple_of(64).div_ceil(world);
            let row = |row| (row < tensor.shape[0]).then_some(row);
            pick(tensor, 0, &(rank * rows..(rank + 1) * rows).map(row).collect::<Vec<_>>())
        }
        Cut::Expert(expert) => {
            let mine = block(experts, rank, world).contains(&expert);
            return mine.then(|| tensor.clone());
        }
    })
}

/// How tensor-parallel engines cut the tensors of a family, told by whole names.
pub(crate) fn cut(family: &str, name: &str, shape: &[usize]) -> Cut {
    let is =
        |part: &str| name.contains(&format!(".{part}.")) || name.starts_with(&format!("{part}."));
    let weight = !name.ends_with(".bias");
    const COLUMNS: [&str; 7] =
        ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "q_b_proj", "kv_b_proj"];
    let cut = match family {
        "llama" | "moe" => {
            if let Some((_, rest)) = name.split_once(".experts.") {
                return Cut::Expert(rest.split_once('.').unwrap().0.parse().unwrap());
            }
            if is("embed_tokens") || is("lm_head") || name.ends_with("shared_head.head.weight") {
                Cut::Vocabulary
            } else if COLUMNS.into_iter().any(is) {
                Cut::Split(0)
            } else if is("o_proj") || is("down_proj") {
                Cut::Split(1)
            } else {
                Cut::Whole
            }
        }
        // Weights are stored with the inputs first.
        "gpt2" if is("wte") => Cut::Vocabulary,
        "gpt2" if is("c_attn") => Cut::Sections(usize::from(weight), 3),
        "gpt2" if is("c_fc") => Cut::Split(usize::from(weight)),
        "gpt2" if is("c_proj") && weight => Cut::Split(0),
        "falcon" | "bloom" if is("word_embeddings") || is("lm_head") => Cut::Vocabulary,
        "falcon" | "bloom" if is("query_key_value") || is("dense_h_to_4h") => Cut::Split(0),
        "falcon" | "bloom" if (is("dense") || is("dense_4h_to_h")) && weight => Cut::Split(1),
        _ => Cut::Whole,
    };
    match cut {
        // One value for all.
        Cut::Split(dim) if shape.len() <= dim || shape[dim] <= 1 => Cut::Whole,
        cut => cut,
    }
}

/// Nothing is read twice, and nobody receives what it drops: within a hundredth each.
pub(crate) fn assert_little_moves(results: &[Tensors], family: &str, all: &ByName) {
    let bytes: usize = all.values().map(|tensor| tensor.bytes.len()).sum();
    let mut read = 0;
    for (rank, tensors) in results.iter().enumerate() {
        let report = tensors.report();
        let kept = expected(family, all, rank, results.len());
        let kept: usize = kept.values().map(|tensor| tensor.bytes.len()).sum();
        let received = report.rank.as_ref().unwrap().received_bytes;
        assert!(received <= kept as u64 * 101 / 100, "rank {rank}: {received} of {kept} bytes");
        read += report.bytes_read;
    }
    assert!(read <= bytes as u64 * 101 / 100, "{read} bytes read of {bytes}");
}

/// All that a rank keeps of a checkpoint.
pub(crate) fn expected(family: &str, all: &ByName, rank: usize, world: usize) -> ByName {
    let cut_of = |(name, tensor): (&String, &Values)| cut(family, name, &tensor.shape);
    let experts = all.iter().map(|entry| match cut_of(entry) {
        Cut::Expert(index) => index + 1,
        _ => 0,
    });
    let experts = experts.max().unwrap_or(0);
    let keep = |entry: (&String, &Values)| {
        let kept = kept(entry.1, cut_of(entry), experts, rank, world)?;
        Some((entry.0.clone(), kept))
    };
    all.iter().filter_map(keep).collect()
}
