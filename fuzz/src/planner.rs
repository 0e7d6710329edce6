//! Entry for `fst-dist`: the planner, over tables of tensors, specifications and topologies.

use std::ops::Range;

use fst_dist::{Planner, Remainder, Shard, Split, TensorDesc, Topology};

/// Numbers out of a fuzzer's bytes; zeros when there are no more.
struct Numbers<'b>(&'b [u8]);

impl Numbers<'_> {
    fn byte(&mut self) -> u8 {
        let (first, rest) =
            self.0.split_first().map_or((0, self.0), |(first, rest)| (*first, rest));
        self.0 = rest;
        first
    }

    fn below(&mut self, end: u8) -> u8 {
        self.byte() % end
    }

    /// Small as a rule, sometimes about a power of two.
    fn size(&mut self) -> u64 {
        match self.byte() {
            small @ 0..192 => u64::from(small % 48),
            large => {
                (1u64 << (self.byte() % 64)).wrapping_add(u64::from(large % 3)).wrapping_sub(1)
            }
        }
    }

    fn ranges(&mut self) -> Vec<Range<u64>> {
        (0..self.below(3)).map(|_| self.size()..self.size()).collect()
    }

    fn tensor(&mut self, index: u8) -> TensorDesc {
        let bits = [4, 6, 8, 16, 32, 64][usize::from(self.below(6))];
        let shape = (0..self.below(4)).map(|_| self.size()).collect();
        let start = self.size();
        let mut tensor = TensorDesc {
            name: format!("t{index}"),
            bits,
            shape,
            shard: self.below(3).into(),
            file_range: start..start,
        };
        // Mostly the bytes that the shape asks for, as of a checkpoint that was opened.
        let bytes = if self.below(8) == 0 { Some(self.size()) } else { tensor.shape_bytes() };
        tensor.file_range.end = start.saturating_add(bytes.unwrap_or(0));
        tensor
    }

    fn shard(&mut self, world: u32) -> Shard {
        let dim = usize::from(self.below(3));
        let rule =
            [Remainder::CeilDiv, Remainder::Chunk, Remainder::Balanced][usize::from(self.below(3))];
        let along = Split::along(dim).remainder(rule);
        match self.below(9) {
            0 => Shard::replicate(),
            1 => Shard::skip(),
            2 => Shard::keep_on_ranks(
                (0..self.below(4)).map(|_| u32::from(self.below(9))).collect::<Vec<_>>(),
            ),
            3 => Shard::vocab_rows(self.size()),
            4 => Shard::ranges(dim, (0..world).map(|_| self.ranges()).collect::<Vec<_>>()),
            5 => along.heads(self.size()).into(),
            6 => along.unit(self.size()).sections(self.size()).into(),
            7 => along
                .section_sizes((0..self.below(4)).map(|_| self.size()).collect::<Vec<_>>())
                .into(),
            _ => along.fused_into(format!("f{}", self.below(2)), self.below(4).into()).into(),
        }
    }
}

/// Plans what `bytes` describe, and goes through the plan of each rank.
///
/// Panics where a size overflows (with overflow checks on), or a rank reads outside of a tensor or
/// writes outside of what it keeps.
pub fn planner(bytes: &[u8]) {
    let mut numbers = Numbers(bytes);
    let world = 1 + u32::from(numbers.below(9));
    let topology = match numbers.below(3) {
        0 => Topology::one_node(world),
        1 => Topology::shared_storage(world, 1 + u32::from(numbers.below(3))),
        _ => Topology::local_storage(world, 1 + u32::from(numbers.below(3))),
    };
    let world = topology.world();
    let mut planner = Planner::new(topology);
    if numbers.below(2) == 0 {
        planner = planner.budget(numbers.size());
    }
    if numbers.below(2) == 0 {
        planner = planner.coalesce_gap(numbers.size());
    }
    let tensors: Vec<TensorDesc> =
        (0..1 + numbers.below(5)).map(|index| numbers.tensor(index)).collect();
    let Ok(plan) = planner.plan(tensors, |_| numbers.shard(world)) else { return };
    let mut kept = 0u64;
    for rank in 0..world {
        let view = plan.rank(rank);
        let outputs = view.outputs();
        for output in outputs {
            let elements: u128 = output.shape.iter().map(|&extent| u128::from(extent)).product();
            assert_eq!(elements * u128::from(output.bits), u128::from(output.bytes) * 8);
            assert!(output.padding <= output.bytes);
            kept = kept.checked_add(output.bytes).expect("what all ranks keep overflows");
        }
        for read in view.direct_reads() {
            let tensor = plan.tensors()[read.tensor as usize].byte_len();
            let output = outputs[read.output as usize].bytes;
            for copy in read.copies {
                let last = copy.count - 1;
                assert!(copy.src + last * copy.src_stride + copy.len <= tensor);
                assert!(copy.dst + last * copy.dst_stride + copy.len <= output);
            }
        }
        // A plan of exabytes has many rounds.
        for round in view.rounds().take(50) {
            for rank in 0..plan.world() {
                let pieces = round.unit(rank).take(50);
                let bytes: u64 = pieces
                    .map(|piece| {
                        let tensor = &plan.tensors()[piece.tensor as usize];
                        assert!(piece.range.end <= tensor.byte_len());
                        piece.range.end - piece.range.start
                    })
                    .sum();
                assert!(bytes <= round.unit_bytes(rank));
            }
        }
        assert!(view.staging_bytes() <= plan.staging_bytes());
    }
}
