//! Random tensors, specifications and topologies, with the slow, obvious account of what each rank
//! keeps.

use std::collections::HashMap;
use std::ops::Range;

use fst_dist::{
    Links, Place, Plan, PlanError, Planner, Remainder, Shard, Split, Storage, TensorDesc, Topology,
};
use proptest::prelude::*;

/// A specification, as data that both the planner and the oracle understand.
#[derive(Clone, Debug)]
pub(crate) enum Spec {
    Replicate,
    Split {
        dim: usize,
        rule: u8,
        sections: u64,
    },
    /// `first` heads in a section of their own, as queries before the keys and values that are shared.
    Heads {
        dim: usize,
        head: u64,
        heads: u64,
        first: u64,
    },
    Keep(Vec<u32>),
    Vocab(u64),
    Ranges {
        dim: usize,
        lists: Vec<Vec<Range<u64>>>,
    },
    Fused {
        dim: usize,
        output: u32,
        position: u32,
    },
}

impl Spec {
    pub(crate) fn shard(&self) -> Shard {
        match self.clone() {
            Spec::Replicate => Shard::replicate(),
            Spec::Split { dim, rule, sections } => {
                let rule =
                    [Remainder::CeilDiv, Remainder::Chunk, Remainder::Balanced][rule as usize];
                Split::along(dim).remainder(rule).sections(sections).into()
            }
            Spec::Heads { dim, head, heads, first } => {
                let sections = match first {
                    0 => vec![heads * head],
                    _ => vec![first * head, (heads - first) * head],
                };
                Split::along(dim).heads(head).section_sizes(sections).into()
            }
            Spec::Keep(ranks) => Shard::keep_on_ranks(ranks),
            Spec::Vocab(multiple) => Shard::vocab_rows(multiple),
            Spec::Ranges { dim, lists } => Shard::ranges(dim, lists),
            Spec::Fused { dim, output, position } => {
                Split::along(dim).fused_into(format!("fused{output}"), position).into()
            }
        }
    }

    pub(crate) fn dim(&self) -> usize {
        match *self {
            Spec::Split { dim, .. }
            | Spec::Heads { dim, .. }
            | Spec::Ranges { dim, .. }
            | Spec::Fused { dim, .. } => dim,
            _ => 0,
        }
    }

    /// Indices along the dimension that a rank keeps, one by one; `None` where it has no tensor.
    pub(crate) fn indices(&self, extent: u64, rank: u64, world: u64) -> Option<Vec<u64>> {
        // Deals `count` things to the ranks; the rule is told apart by who gets thing `i`.
        let ceil = |i: u64, count: u64| i / count.div_ceil(world).max(1);
        let balanced = |i: u64, count: u64| {
            let (each, extra) = (count / world, count % world);
            if i < extra * (each + 1) { i / (each + 1) } else { (i - extra) / each }
        };
        match self {
            Spec::Replicate => Some((0..extent).collect()),
            Spec::Keep(ranks) => ranks.contains(&(rank as u32)).then(|| (0..extent).collect()),
            Spec::Split { rule, sections, .. } => {
                let size = extent / sections;
                let owner = |i: u64| {
                    if *rule == 2 { balanced(i % size, size) } else { ceil(i % size, size) }
                };
                let list: Vec<u64> = (0..extent).filter(|&i| owner(i) == rank).collect();
                (*rule != 1 || extent == 0 || !list.is_empty()).then_some(list)
            }
            Spec::Heads { head, heads, first, .. } => {
                let mine = |h: u64| {
                    let (h, heads) =
                        if h < *first { (h, *first) } else { (h - first, heads - first) };
                    match heads < world {
                        true => rank / (world / heads) == h,
                        false => ceil(h, heads) == rank,
                    }
                };
                Some((0..extent).filter(|&i| mine(i / head)).collect())
            }
            Spec::Vocab(multiple) => {
                let rows = extent.div_ceil(*multiple) * multiple;
                Some((0..extent).filter(|&i| i / rows.div_ceil(world) == rank).collect())
            }
            Spec::Ranges { lists, .. } => {
                let list = &lists[rank as usize];
                (!list.is_empty()).then(|| list.iter().cloned().flatten().collect())
            }
            Spec::Fused { .. } => Some((0..extent).filter(|&i| ceil(i, extent) == rank).collect()),
        }
    }
}

/// Kept tensors by name: for each of their bytes the tensor and byte on disk that it is, `None` for
/// a zero of padding.
pub(crate) type Contents = Vec<(String, Vec<Option<(u32, u64)>>)>;

/// The tensors of a case with what is asked of each.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) tensors: Vec<TensorDesc>,
    pub(crate) specs: Vec<Spec>,
    pub(crate) topology: Topology,
    pub(crate) budget: u64,
    pub(crate) gap: Option<u64>,
}

impl Case {
    pub(crate) fn plan(&self) -> Result<Plan, PlanError> {
        let names: HashMap<&str, &Spec> =
            self.tensors.iter().map(|t| t.name.as_str()).zip(&self.specs).collect();
        let mut planner = Planner::new(self.topology.clone()).budget(self.budget);
        if let Some(gap) = self.gap {
            planner = planner.coalesce_gap(gap);
        }
        planner.plan(self.tensors.clone(), |tensor| names[tensor.name.as_str()].shard())
    }

    /// For each kept tensor of a rank: which byte of which tensor each of its bytes is; `None` is a
    /// padding zero.
    pub(crate) fn expected(&self, rank: u32) -> Contents {
        let world = self.topology.world();
        let mut outputs: Vec<(String, Vec<u32>)> = Vec::new();
        for (index, (tensor, spec)) in self.tensors.iter().zip(&self.specs).enumerate() {
            let name = match spec {
                Spec::Fused { output, .. } => format!("fused{output}"),
                _ => tensor.name.clone(),
            };
            match outputs.iter_mut().find(|(known, _)| *known == name) {
                Some((_, members)) => members.push(index as u32),
                None => outputs.push((name, vec![index as u32])),
            }
        }
        let mut all = Vec::new();
        for (name, mut members) in outputs {
            members.sort_by_key(|&m| match self.specs[m as usize] {
                Spec::Fused { position, .. } => position,
                _ => 0,
            });
            let mut bytes = Vec::new();
            let dim = self.specs[members[0] as usize].dim();
            let first = &self.tensors[members[0] as usize].shape;
            let rows: u64 = first.iter().take(dim).product();
            let mut present = false;
            for row in 0..rows {
                for &member in &members {
                    let tensor = &self.tensors[member as usize];
                    let extent = tensor.shape.get(dim).copied().unwrap_or(1);
                    let inner: u64 = tensor.shape.iter().skip(dim + 1).product();
                    let bits = inner * u64::from(tensor.bits);
                    let spec = &self.specs[member as usize];
                    let list = spec.indices(extent, rank.into(), world.into());
                    let Some(list) = list else { continue };
                    present = true;
                    // Sub-byte elements: collect the bits kept, then take every eighth.
                    let all_bits = list.iter().flat_map(|i| {
                        let start = (row * extent + i) * bits;
                        start..start + bits
                    });
                    bytes.extend(all_bits.step_by(8).map(|bit| Some((member, bit / 8))));
                    if let Spec::Vocab(multiple) = spec {
                        let rows = (extent.div_ceil(*multiple) * multiple).div_ceil(world.into());
                        let missing = rows - list.len() as u64;
                        bytes.extend(std::iter::repeat_n(None, (missing * bits / 8) as usize));
                    }
                }
            }
            if rows == 0 {
                present = members.iter().any(|&m| {
                    let extent = self.tensors[m as usize].shape[dim];
                    self.specs[m as usize].indices(extent, rank.into(), world.into()).is_some()
                });
            }
            if present {
                all.push((name, bytes));
            }
        }
        all
    }
}

pub(crate) fn spec(shape: Vec<u64>, bits: u32, world: u32) -> BoxedStrategy<Spec> {
    let keep = proptest::collection::btree_set(0..world, 0..=world as usize)
        .prop_map(|ranks| Spec::Keep(ranks.into_iter().collect()));
    let mut ways = vec![Just(Spec::Replicate).boxed(), keep.boxed()];
    if !shape.is_empty() {
        ways.push((1u64..9).prop_map(Spec::Vocab).boxed());
        for (dim, &extent) in shape.iter().enumerate() {
            ways.push(
                (0u8..3).prop_map(move |rule| Spec::Split { dim, rule, sections: 1 }).boxed(),
            );
            if extent.is_multiple_of(3) && extent > 0 {
                let cut = (0u8..3).prop_map(move |rule| Spec::Split { dim, rule, sections: 3 });
                ways.push(cut.boxed());
            }
            for head in [1, 2, 4] {
                let heads = extent / head;
                let fits = |heads: u64| {
                    let world = u64::from(world);
                    heads >= world || heads > 0 && world.is_multiple_of(heads)
                };
                if !extent.is_multiple_of(head) {
                    continue;
                }
                let cut = |first: u64| fits(heads - first) && (first == 0 || fits(first));
                let ways_to_cut = (0..heads.max(1)).filter(|&first| cut(first));
                let spec = |first| Just(Spec::Heads { dim, head, heads, first }).boxed();
                ways.extend(ways_to_cut.map(spec));
            }
            if extent > 0 {
                let cuts = proptest::collection::vec(0..=extent, 0..4).prop_map(|mut cuts| {
                    cuts.sort_unstable();
                    let mut list: Vec<_> = cuts.chunks_exact(2).map(|c| c[0]..c[1]).collect();
                    // The order of the kept tensor need not be that of the file.
                    list.reverse();
                    list
                });
                let lists = proptest::collection::vec(cuts, world as usize);
                ways.push(lists.prop_map(move |lists| Spec::Ranges { dim, lists }).boxed());
            }
        }
    }
    let _ = bits;
    proptest::strategy::Union::new(ways).boxed()
}

pub(crate) fn topology() -> impl Strategy<Value = Topology> {
    let rate = prop_oneof![Just(1e8), Just(1e9), Just(1e10), Just(1e12)];
    let requests = prop_oneof![Just(1e3), Just(1e6)];
    let places = proptest::collection::vec((0u32..3, 0u32..12), 1..7);
    let rates = (rate.clone(), rate.clone(), requests, rate.clone(), rate);
    let with_blind = proptest::bool::weighted(0.2);
    (places, rates, with_blind).prop_map(|(places, (a, b, requests_per_s, c, d), blind)| {
        let place = |(index, &(node, storage)): (usize, &(u32, u32))| Place {
            node,
            // The first rank can read, others perhaps not.
            storage: (index == 0 || !blind || storage < 9).then_some(storage % 2),
        };
        let places = places.iter().enumerate().map(place).collect();
        let storage = Storage { bytes_per_s: a, rank_bytes_per_s: b, requests_per_s };
        let links = Links { node_bytes_per_s: c, net_bytes_per_s: d, latency_s: 1e-5 };
        Topology::new(places, vec![storage; 2], links).unwrap()
    })
}

/// Shapes small enough to account for each byte; some larger than the smallest block.
pub(crate) fn shape() -> impl Strategy<Value = Vec<u64>> {
    prop_oneof![
        Just(vec![]),
        proptest::collection::vec(0u64..13, 1..4),
        (1u64..40, 1u64..4000).prop_map(|(a, b)| vec![a, b]),
        (1u64..9, 1u64..60, 1u64..90).prop_map(|(a, b, c)| vec![a, b, c]),
    ]
}

pub(crate) fn case() -> impl Strategy<Value = Case> {
    let bits = prop_oneof![Just(4u32), Just(8), Just(16), Just(32)];
    let tensors = proptest::collection::vec((shape(), bits, 0u32..3, 0u64..2), 1..7);
    let fused = proptest::collection::vec((1u64..30, 0usize..2), 0..4);
    let gap = prop_oneof![Just(None), Just(Some(0)), Just(Some(1 << 20))];
    let budget = prop_oneof![Just(900u64 << 10), Just(4 << 20)];
    (topology(), tensors, fused, budget, gap).prop_flat_map(
        |(topology, tensors, fused, budget, gap)| {
            let world = topology.world();
            let mut specs = Vec::new();
            let mut table = Vec::new();
            let mut ends = [8u64; 3];
            let mut add = |shape: Vec<u64>, bits: u32, shard: u32, gap: u64| {
                let len = shape.iter().product::<u64>() * u64::from(bits) / 8;
                let start = ends[shard as usize] + gap * 5000;
                ends[shard as usize] = start + len;
                let name = format!("t{}", table.len());
                table.push(TensorDesc { name, bits, shape, shard, file_range: start..start + len });
            };
            for (shape, bits, shard, gap) in tensors {
                // Four-bit cuts fall on bytes when the last dimension is even and not itself cut.
                let mut shape = shape;
                let mut dims = usize::MAX;
                if bits == 4 {
                    match shape.last_mut() {
                        Some(last) => *last = *last / 2 * 2,
                        None => shape = vec![2],
                    }
                    dims = shape.len() - 1;
                }
                let open = spec(shape.clone(), bits, world);
                let open = open.prop_map(move |spec| match spec {
                    Spec::Vocab(_) if dims == 0 => Spec::Replicate,
                    spec if spec.dim() >= dims => Spec::Replicate,
                    spec => spec,
                });
                specs.push(open.boxed());
                add(shape, bits, shard, gap);
            }
            let members: Vec<u64> = fused.iter().map(|(extent, _)| *extent).collect();
            let dim = fused.first().map_or(0, |(_, dim)| *dim);
            for (position, extent) in (0u32..).zip(members) {
                let shape = if dim == 0 { vec![extent, 37] } else { vec![41, extent, 3] };
                specs.push(Just(Spec::Fused { dim, output: 0, position }).boxed());
                add(shape, 16, 0, 0);
            }
            let order = Just(table).prop_shuffle();
            (specs, Just(topology), order).prop_map(move |(specs, topology, tensors)| {
                // The table may come in any order; specifications follow their names.
                let spec = |t: &TensorDesc| specs[t.name[1..].parse::<usize>().unwrap()].clone();
                let specs = tensors.iter().map(spec).collect();
                Case { tensors, specs, topology, budget, gap }
            })
        },
    )
}
