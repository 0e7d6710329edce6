//! The plan: the same on every rank, made from the tensor table, the specifications and the topology.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use crate::error::{PlanError, ShardError};
use crate::load::RankLoad;
use crate::partition::{self, Choice, Class, Costs};
use crate::rank::RankPlan;
use crate::resolved::Resolved;
use crate::schedule::{Buffers, Line, LineKind};
use crate::shard::Shard;
use crate::tensor::{Cut, Geometry, TensorDesc};
use crate::topology::Topology;

/// Staging bytes per rank, unless said otherwise.
pub const DEFAULT_BUDGET: u64 = 256 << 20;

/// What to plan with, besides tensors and specifications.
#[derive(Clone, Debug)]
pub struct Planner {
    topology: Topology,
    budget: u64,
    gap: Option<u64>,
    fingerprint: Vec<u8>,
}

impl Planner {
    /// Plans for the ranks of `topology`, each with [`DEFAULT_BUDGET`] bytes of staging.
    #[must_use]
    pub fn new(topology: Topology) -> Self {
        Self { topology, budget: DEFAULT_BUDGET, gap: None, fingerprint: Vec::new() }
    }

    /// Staging bytes per rank.
    #[must_use]
    pub fn budget(mut self, bytes: u64) -> Self {
        self.budget = bytes;
        self
    }

    /// The coalescing gap: a rank that reads its own part may read (and drop) up to so many bytes
    /// between two pieces instead of asking twice. Unless given, the gap that costs as much as a
    /// further request.
    #[must_use]
    pub fn coalesce_gap(mut self, bytes: u64) -> Self {
        self.gap = Some(bytes);
        self
    }

    /// Anything that all ranks must agree on besides the tensor table, such as sizes and times of the
    /// files; it goes into the digest.
    #[must_use]
    pub fn fingerprint(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.fingerprint = bytes.into();
        self
    }

    /// Makes the plan for `tensors`, each sharded as `shard` says.
    ///
    /// # Errors
    /// A specification that does not fit its tensor, fused tensors that do not go together, a budget
    /// too small for one block, or an unsound topology.
    pub fn plan(
        &self,
        tensors: impl Into<Arc<[TensorDesc]>>,
        mut shard: impl FnMut(&TensorDesc) -> Shard,
    ) -> Result<Plan, PlanError> {
        let tensors: Arc<[TensorDesc]> = tensors.into();
        self.topology.check()?;
        if tensors.len() >= u32::MAX as usize - 1 {
            return Err(PlanError::TooManyTensors { tensors: tensors.len() });
        }
        let world = self.topology.world();
        let gap = self.gap.unwrap_or_else(|| self.topology.coalesce_gap());
        let mut table = ClassTable::default();
        let mut class_of = Vec::with_capacity(tensors.len());
        let mut fusing: Vec<(Arc<str>, u32, u32)> = Vec::new();
        let mut bytes = 0u64;
        for (index, tensor) in (0u32..).zip(tensors.iter()) {
            let spec = shard(tensor);
            class_of.push(table.class(tensor, &spec, world, gap)?);
            // Every other size of the plan is a part of this: what all ranks together can keep. Two
            // sizes below 63 bits have a sum.
            bytes += table.classes[class_of[index as usize] as usize].resolved.all_bytes();
            if bytes > i64::MAX as u64 {
                let (tensor, source) = (tensor.name.clone(), ShardError::Overflow);
                return Err(PlanError::Shard { tensor, source });
            }
            if let Some(fuse) = spec.fuse {
                fusing.push((fuse.name, fuse.position, index));
            }
        }
        let mut classes = table.classes;
        let fused = fuse(&fusing, &tensors, &class_of, &classes)?;
        let shares = partition::decide(&mut classes, &self.topology);
        let copies = |class: &Class| match class.choice {
            Choice::Scatter => class.resolved.copies(),
            _ => 0,
        };
        let copies = classes.iter().map(copies).max().unwrap_or(0);
        let buffers = Buffers::fit(self.budget, world, copies)
            .map_err(|smallest| PlanError::Budget { budget: self.budget, smallest })?;

        let mut order: Vec<u32> = (0..tensors.len() as u32).collect();
        order.sort_by_key(|&index| {
            let tensor = &tensors[index as usize];
            (tensor.shard, tensor.file_range.start, index)
        });
        let choice = |index: u32| classes[class_of[index as usize] as usize].choice;
        let ways = [(Choice::Broadcast, LineKind::Broadcast), (Choice::Scatter, LineKind::Scatter)];
        let lines = ways.map(|(way, kind)| {
            let of_way = order.iter().copied().filter(|&index| choice(index) == way).collect();
            Line::new(kind, of_way, &tensors, &shares)
        });
        let lines: Vec<Line> = lines.into_iter().filter(|line| line.total() > 0).collect();
        let segment = lines.iter().map(Line::longest_segment).max().unwrap_or(0);
        let direct = classes.iter().filter(|class| class.choice == Choice::Direct);
        let buffers = buffers.bounded(segment, direct.map(Class::staged).max().unwrap_or(0));

        let topology = self.topology.clone();
        let mut plan = Plan {
            tensors,
            classes,
            class_of,
            fused,
            lines,
            topology,
            buffers,
            gap,
            loads: Vec::new(),
            digest: Digest([0; 32]),
        };
        plan.loads = plan.count_loads();
        plan.digest = plan.make_digest(&self.fingerprint, self.budget);
        Ok(plan)
    }
}

#[derive(Default)]
struct ClassTable {
    classes: Vec<Class>,
    index: HashMap<(u32, Vec<u64>, Shard), u32>,
}

impl ClassTable {
    fn class(
        &mut self,
        tensor: &TensorDesc,
        spec: &Shard,
        world: u32,
        gap: u64,
    ) -> Result<u32, PlanError> {
        let expected = tensor.shape_bytes();
        let range = tensor.file_range.clone();
        if range.start > range.end || expected != Some(tensor.byte_len()) {
            let (tensor, shard) = (tensor.name.clone(), tensor.shard);
            return Err(PlanError::ByteLength { tensor, shard, range, expected });
        }
        let shard = Shard { kind: spec.kind.clone(), fuse: None };
        let key = (tensor.bits, tensor.shape.clone(), shard);
        let index = match self.index.get(&key) {
            Some(&index) => index,
            None => {
                let resolved = Resolved::new(spec, tensor.bits, &tensor.shape, world)
                    .map_err(|source| PlanError::Shard { tensor: tensor.name.clone(), source })?;
                self.classes.push(Class::new(resolved, gap));
                let index = self.classes.len() as u32 - 1;
                self.index.insert(key, index);
                index
            }
        };
        self.classes[index as usize].tensors += 1;
        Ok(index)
    }
}

/// A tensor that several others are concatenated into.
#[derive(Clone, Debug)]
pub(crate) struct Fused {
    pub(crate) name: Arc<str>,
    /// Tensors in the order of their positions.
    pub(crate) members: Vec<u32>,
}

/// A fused tensor's name with the positions claimed and the tensors that claim them.
type Claims = (Arc<str>, Vec<(u32, u32)>);

fn fuse(
    fusing: &[(Arc<str>, u32, u32)],
    tensors: &[TensorDesc],
    class_of: &[u32],
    classes: &[Class],
) -> Result<Vec<Fused>, PlanError> {
    let mut index: HashMap<&str, usize> = HashMap::new();
    let mut groups: Vec<Claims> = Vec::new();
    for (name, position, tensor) in fusing {
        let at = *index.entry(name).or_insert_with(|| {
            groups.push((name.clone(), Vec::new()));
            groups.len() - 1
        });
        groups[at].1.push((*position, *tensor));
    }
    let group = |(name, mut members): Claims| {
        members.sort_unstable();
        let output = || name.to_string();
        for position in 0..members.len() as u32 {
            let found = members.iter().filter(|(at, _)| *at == position).count() as u32;
            if found != 1 {
                return Err(PlanError::FusePosition { output: output(), position, found });
            }
        }
        let members: Vec<u32> = members.into_iter().map(|(_, tensor)| tensor).collect();
        let first = &tensors[members[0] as usize];
        let dim = |tensor: u32| classes[class_of[tensor as usize] as usize].resolved.dim;
        for &member in &members[1..] {
            let tensor = &tensors[member as usize];
            let cut = dim(member);
            let same_shape = tensor.shape.len() == first.shape.len()
                && (0..first.shape.len())
                    .all(|at| Some(at) == cut || tensor.shape[at] == first.shape[at]);
            let what = if tensor.bits != first.bits {
                "the dtype's width"
            } else if cut != dim(members[0]) {
                "the dimension"
            } else if !same_shape {
                "the shape"
            } else {
                continue;
            };
            return Err(PlanError::Fuse { tensor: tensor.name.clone(), output: output(), what });
        }
        Ok(Fused { name, members })
    };
    groups.into_iter().map(group).collect()
}

/// A stable 256-bit hash of a plan with all that it was made from.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

/// A class of tensors that are equal but for name and place, and what was decided for it.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct ClassPlan<'a> {
    /// Shape of its tensors.
    pub shape: &'a [u64],
    /// How many tensors it has.
    pub tensors: u64,
    /// Bytes of one tensor.
    pub bytes: u64,
    /// The way its bytes take.
    pub choice: Choice,
    /// Predicted seconds for one tensor, by choice.
    pub costs: Costs,
}

/// Who reads what, who sends what to whom, in which order and buffers.
///
/// A plan holds a few numbers per tensor and per rank; what a rank does follows from these, on
/// demand: see [`rank`](Self::rank).
#[derive(Clone, Debug)]
pub struct Plan {
    pub(crate) tensors: Arc<[TensorDesc]>,
    pub(crate) classes: Vec<Class>,
    pub(crate) class_of: Vec<u32>,
    pub(crate) fused: Vec<Fused>,
    pub(crate) lines: Vec<Line>,
    pub(crate) topology: Topology,
    pub(crate) buffers: Buffers,
    pub(crate) gap: u64,
    pub(crate) loads: Vec<RankLoad>,
    pub(crate) digest: Digest,
}

impl Plan {
    /// How many ranks there are.
    #[must_use]
    pub fn world(&self) -> u32 {
        self.topology.world()
    }

    /// The tensors, as given.
    #[must_use]
    pub fn tensors(&self) -> &[TensorDesc] {
        &self.tensors
    }

    /// The hash that ranks compare before anything is sent.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The staging buffers of each rank.
    #[must_use]
    pub fn buffers(&self) -> Buffers {
        self.buffers
    }

    /// Bytes of staging memory that a rank needs at most: less than the budget where
    /// there is little to load, and none where all ranks read their parts straight to their places.
    /// See also [`RankPlan::staging_bytes`].
    #[must_use]
    pub fn staging_bytes(&self) -> u64 {
        let direct = self.classes.iter().filter(|class| class.choice == Choice::Direct);
        match direct.map(Class::staged).max() {
            _ if !self.lines.is_empty() => self.buffers.total(),
            Some(staged) if staged > 0 => self.buffers.read_bytes(),
            _ => 0,
        }
    }

    /// The coalescing gap: the most bytes between two pieces that a direct read drops.
    #[must_use]
    pub fn coalesce_gap(&self) -> u64 {
        self.gap
    }

    /// What each rank moves.
    #[must_use]
    pub fn loads(&self) -> &[RankLoad] {
        &self.loads
    }

    /// The topology it was made for.
    #[must_use]
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// What was decided for a tensor.
    #[must_use]
    pub fn choice(&self, tensor: u32) -> Choice {
        self.class(tensor).choice
    }

    /// The classes of tensors, in order of first appearance.
    pub fn classes(&self) -> impl Iterator<Item = ClassPlan<'_>> {
        self.classes.iter().map(|class| ClassPlan {
            shape: class.resolved.full_shape(),
            tensors: class.tensors,
            bytes: class.bytes,
            choice: class.choice,
            costs: class.costs,
        })
    }

    pub(crate) fn class(&self, tensor: u32) -> &Class {
        &self.classes[self.class_of[tensor as usize] as usize]
    }

    /// What one rank does.
    ///
    /// # Panics
    /// Never: a rank beyond the world keeps and does nothing.
    #[must_use]
    pub fn rank(&self, rank: u32) -> RankPlan<'_> {
        RankPlan::new(self, rank)
    }

    /// The cuts of `tensor` for `rank` in a kept tensor of its own.
    pub(crate) fn geometry(&self, tensor: u32, rank: u32) -> Geometry {
        let resolved = &self.class(tensor).resolved;
        let mut cuts = Vec::new();
        let mut dst = 0;
        resolved.ranges(rank, |range| {
            let len = resolved.bytes_along(range.end - range.start);
            cuts.push(Cut { src: resolved.bytes_along(range.start), len, dst });
            dst += len;
        });
        let dst_row = dst + resolved.bytes_along(resolved.padding(rank));
        Geometry { rows: resolved.outer, src_row: resolved.row_bytes(), dst_row, cuts }
    }

    pub(crate) fn lines(&self) -> &[Line] {
        &self.lines
    }

    /// Positions of one unit of one line.
    pub(crate) fn unit(&self, line: &Line, rank: u32, round: u64) -> Range<u64> {
        line.unit(rank, round, self.buffers.block, &self.tensors)
    }

    fn make_digest(&self, fingerprint: &[u8], budget: u64) -> Digest {
        let mut hash = Hash(Sha256::new());
        hash.bytes(b"fst plan 1");
        hash.bytes(fingerprint);
        hash.numbers([u64::from(self.world()), budget, self.gap]);
        for place in self.topology.places() {
            let storage = place.storage.map_or(0, |storage| u64::from(storage) + 1);
            hash.numbers([u64::from(place.node), storage]);
        }
        hash.numbers([self.buffers.block, u64::from(self.buffers.receive_blocks)]);
        let mut text = Vec::new();
        for class in &self.classes {
            text.clear();
            class.resolved.encode(&mut text);
            hash.bytes(&text);
            hash.numbers([class.tensors, class.choice as u64]);
        }
        for (tensor, class) in self.tensors.iter().zip(&self.class_of) {
            let range = &tensor.file_range;
            hash.bytes(tensor.name.as_bytes());
            hash.numbers([u64::from(*class), u64::from(tensor.shard), range.start, range.end]);
        }
        for fused in &self.fused {
            hash.bytes(fused.name.as_bytes());
            hash.numbers([fused.members.len() as u64]);
            fused.members.iter().for_each(|&member| hash.numbers([u64::from(member)]));
        }
        for line in &self.lines {
            hash.numbers([line.kind as u64]);
            line.borders.iter().for_each(|&border| hash.numbers([border]));
        }
        Digest(hash.0.finalize().into())
    }
}

/// Numbers and length-prefixed bytes, little-endian, into SHA-256.
struct Hash(Sha256);

impl Hash {
    fn bytes(&mut self, bytes: &[u8]) {
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }

    fn numbers<const N: usize>(&mut self, numbers: [u64; N]) {
        self.0.update(numbers.map(u64::to_le_bytes).as_flattened());
    }
}
