//! One rank's view of a plan: what it keeps, reads for itself, and exchanges in each round.

use std::collections::{BTreeSet, HashMap};

use crate::partition::Choice;
use crate::plan::Plan;
use crate::schedule::{Line, LineKind, Piece};
use crate::tensor::{Geometry, Strided};

/// A tensor that a rank keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Output<'a> {
    /// The name: the tensor's, or that of the tensor it is fused into with others.
    pub name: &'a str,
    /// Bits of an element.
    pub bits: u32,
    /// The shape kept, padding included.
    pub shape: Vec<u64>,
    /// Bytes kept, padding included.
    pub bytes: u64,
    /// Zero-filled bytes at the end.
    pub padding: u64,
    /// The tensors it is made from.
    pub tensors: Vec<u32>,
}

/// A copy between a tensor on disk and a rank's kept tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectRead {
    /// The tensor read.
    pub tensor: u32,
    /// The kept tensor: an index into [`RankPlan::outputs`].
    pub output: u32,
    /// Bytes to read and where they go.
    pub copies: Vec<Strided>,
}

/// Where a tensor's kept part lies in the rank's outputs.
#[derive(Clone, Copy, Debug)]
struct Home {
    output: u32,
    /// Bytes before it in a row of the output, and bytes of such a row.
    base: u64,
    row: u64,
}

const ABSENT: u32 = u32::MAX;

/// One rank's view of a plan.
#[derive(Clone, Debug)]
pub struct RankPlan<'a> {
    plan: &'a Plan,
    rank: u32,
    outputs: Vec<Output<'a>>,
    homes: Vec<Home>,
}

impl<'a> RankPlan<'a> {
    pub(crate) fn new(plan: &'a Plan, rank: u32) -> Self {
        let absent = Home { output: ABSENT, base: 0, row: 0 };
        let mut view =
            Self { plan, rank, outputs: Vec::new(), homes: vec![absent; plan.tensors.len()] };
        if rank >= plan.world() {
            return view;
        }
        // A fused tensor stands where its first member in the table stands.
        let mut fused_at = HashMap::new();
        let mut is_member = vec![false; plan.tensors.len()];
        for fused in &plan.fused {
            let first = fused.members.iter().min().copied().unwrap_or(0);
            fused_at.insert(first, fused);
            fused.members.iter().for_each(|&member| is_member[member as usize] = true);
        }
        for tensor in 0..plan.tensors.len() as u32 {
            match fused_at.get(&tensor) {
                Some(fused) => view.add_output(&fused.name, &fused.members),
                None if is_member[tensor as usize] => {}
                None => view.add_output(&plan.tensors[tensor as usize].name, &[tensor]),
            }
        }
        view
    }

    /// Bytes of staging memory that the exchange asks its backend for.
    #[must_use]
    pub fn staging_bytes(&self) -> u64 {
        let buffers = self.plan.buffers();
        if self.rounds().next().is_some() {
            return buffers.total();
        }
        let mut direct = self.plan.classes.iter().filter(|class| class.choice == Choice::Direct);
        if direct.any(|class| class.staged_by(self.rank) > 0) { buffers.read_bytes() } else { 0 }
    }

    fn add_output(&mut self, name: &'a str, members: &[u32]) {
        let (plan, rank) = (self.plan, self.rank);
        let present = |&&tensor: &&u32| plan.class(tensor).resolved.is_present(rank);
        let Some(&&first) = members.iter().filter(present).collect::<Vec<_>>().first() else {
            return;
        };
        let resolved = |tensor: u32| &plan.class(tensor).resolved;
        let output = self.outputs.len() as u32;
        let (mut base, mut indices, mut padding) = (0, 0, 0);
        for &tensor in members {
            let part = resolved(tensor);
            if !part.is_present(rank) {
                continue;
            }
            let kept = part.kept_extent(rank);
            self.homes[tensor as usize] = Home { output, base, row: 0 };
            base += part.bytes_along(kept);
            indices += kept + part.padding(rank);
            // Only the single-tensor vocabulary rows pad, and these are rows: the end of the tensor.
            padding += part.outer * part.bytes_along(part.padding(rank));
        }
        let mut shape = resolved(first).shape(rank);
        let mut row = base;
        if let Some(dim) = resolved(first).dim {
            shape[dim] = indices;
            row = resolved(first).bytes_along(indices);
        }
        members.iter().for_each(|&tensor| self.homes[tensor as usize].row = row);
        let bytes = resolved(first).outer * row;
        let bits = plan.tensors[first as usize].bits;
        let tensors = members.to_vec();
        self.outputs.push(Output { name, bits, shape, bytes, padding, tensors });
    }

    /// The rank.
    #[must_use]
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// The plan.
    #[must_use]
    pub fn plan(&self) -> &'a Plan {
        self.plan
    }

    /// The tensors that it keeps, in the order of the table.
    #[must_use]
    pub fn outputs(&self) -> &[Output<'a>] {
        &self.outputs
    }

    /// The output that a tensor is part of and how it lies there; `None` where the rank has none of it.
    #[must_use]
    pub fn geometry(&self, tensor: u32) -> Option<(u32, Geometry)> {
        let home = self.homes.get(tensor as usize).filter(|home| home.output != ABSENT)?;
        let mut geometry = self.plan.geometry(tensor, self.rank);
        geometry.cuts.iter_mut().for_each(|cut| cut.dst += home.base);
        geometry.dst_row = home.row;
        Some((home.output, geometry))
    }

    /// What it reads for itself, in the order of the table.
    pub fn direct_reads(&self) -> impl Iterator<Item = DirectRead> + '_ {
        let direct = |&tensor: &u32| self.plan.choice(tensor) == Choice::Direct;
        (0..self.plan.tensors.len() as u32).filter(direct).filter_map(|tensor| {
            let (output, geometry) = self.geometry(tensor)?;
            let mut copies = Vec::new();
            geometry.copies(&(0..self.plan.class(tensor).bytes), |copy| copies.push(copy));
            (!copies.is_empty()).then_some(DirectRead { tensor, output, copies })
        })
    }

    /// The files, as indices into the checkpoint's list, that it reads from.
    #[must_use]
    pub fn shards(&self) -> BTreeSet<u32> {
        let shard = |tensor: u32| self.plan.tensors[tensor as usize].shard;
        let lines = self.plan.lines().iter();
        let read = lines.flat_map(|line| line.pieces(line.segment(self.rank)));
        let direct = self.direct_reads().map(|read| shard(read.tensor));
        direct.chain(read.map(|piece| shard(piece.tensor))).collect()
    }

    /// The rounds of exchange that it takes part in, in order.
    pub fn rounds(&self) -> impl Iterator<Item = Round<'a>> + '_ {
        let (plan, rank) = (self.plan, self.rank);
        let lines = plan.lines().iter().filter(move |_| rank < plan.world());
        lines.flat_map(move |line| {
            let rounds = line.rounds(plan.buffers.block);
            (0..rounds).map(move |round| Round { plan, line, rank, round })
        })
    }
}

/// One round: each rank has read one unit, now they exchange these.
#[derive(Clone, Copy, Debug)]
pub struct Round<'a> {
    plan: &'a Plan,
    line: &'a Line,
    rank: u32,
    round: u64,
}

impl<'a> Round<'a> {
    /// How the units reach the others.
    #[must_use]
    pub fn kind(&self) -> LineKind {
        self.line.kind
    }

    /// This rank.
    #[must_use]
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// What a rank reads in this round, in the order in which it lies in the block.
    pub fn unit(&self, rank: u32) -> impl Iterator<Item = Piece> + 'a {
        self.line.pieces(self.plan.unit(self.line, rank, self.round))
    }

    /// Bytes of a rank's unit.
    #[must_use]
    pub fn unit_bytes(&self, rank: u32) -> u64 {
        let range = self.plan.unit(self.line, rank, self.round);
        range.end - range.start
    }
}
