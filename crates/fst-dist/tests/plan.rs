//! Plans compared with the slow, obvious account of every byte.

#![allow(clippy::unwrap_used)]

mod cases;

use std::collections::HashMap;

use cases::{Case, Contents, case};
use fst_dist::{
    Choice, DirectRead, LineKind, Piece, Plan, PlanError, Planner, RankLoad, Remainder, Shard,
    Split, TensorDesc, Topology,
};
use proptest::prelude::*;

/// What happened to a rank's memory and how many bytes moved.
struct Replay {
    outputs: Contents,
    load: RankLoad,
    largest_unit: u64,
}

/// Carries out a plan for one rank, byte by byte.
fn replay(plan: &Plan, rank: u32) -> Replay {
    let view = plan.rank(rank);
    let mut outputs: Contents = Vec::new();
    for output in view.outputs() {
        assert_eq!(
            output.bytes * 8,
            output.shape.iter().product::<u64>() * u64::from(output.bits),
            "{output:?}"
        );
        outputs.push((output.name.into(), vec![None; output.bytes as usize]));
    }
    let mut load = RankLoad::default();
    let mut largest_unit = 0;
    let put = |outputs: &mut Contents, piece: &Piece| -> u64 {
        let Some((output, geometry)) = view.geometry(piece.tensor) else {
            return 0;
        };
        let mut moved = 0;
        geometry.copies(&piece.range, |copy| {
            for n in 0..copy.count {
                for byte in 0..copy.len {
                    let src = copy.src + n * copy.src_stride + byte;
                    assert!(piece.range.contains(&src), "{src} outside of {piece:?}");
                    let dst = copy.dst + n * copy.dst_stride + byte;
                    let slot = &mut outputs[output as usize].1[dst as usize];
                    assert_eq!(*slot, None, "byte {dst} of output {output} arrives twice");
                    *slot = Some((piece.tensor, src));
                    moved += 1;
                }
            }
        });
        assert_eq!(moved, geometry.kept_in(&piece.range));
        moved
    };
    for DirectRead { tensor, output, copies } in view.direct_reads() {
        for copy in &copies {
            let dropped = copy.src_stride - copy.len;
            let gap = copy.count > 1 && dropped <= plan.coalesce_gap();
            load.read_direct += if gap { copy.src_span() } else { copy.bytes() };
        }
        assert_eq!(view.geometry(tensor).unwrap().0, output);
        let end = plan.tensors()[tensor as usize].byte_len();
        load.kept += put(&mut outputs, &Piece { tensor, range: 0..end });
    }
    for round in view.rounds() {
        for reader in 0..plan.world() {
            let unit: Vec<Piece> = round.unit(reader).collect();
            largest_unit = largest_unit.max(round.unit_bytes(reader));
            assert_eq!(
                unit.iter().map(|p| p.range.end - p.range.start).sum::<u64>(),
                round.unit_bytes(reader)
            );
            for piece in &unit {
                let kept = put(&mut outputs, piece);
                load.kept += kept;
                let len = piece.range.end - piece.range.start;
                if reader != rank {
                    load.received += kept;
                    // Nobody receives what it drops.
                    assert!(round.kind() == LineKind::Scatter || kept == len);
                    continue;
                }
                load.read_once += len;
                for other in 0..plan.world() {
                    if other != rank
                        && let Some((_, geometry)) = plan.rank(other).geometry(piece.tensor)
                    {
                        load.sent += geometry.kept_in(&piece.range);
                    }
                }
            }
        }
    }
    Replay { outputs, load, largest_unit }
}

fn check(case: &Case) {
    let plan = case.plan().unwrap();
    let world = case.topology.world();
    assert_eq!(case.plan().unwrap().digest(), plan.digest());
    assert!(plan.buffers().total() <= case.budget, "{:?}", plan.buffers());
    for rank in 0..world {
        let replay = replay(&plan, rank);
        let expected = case.expected(rank);
        assert_eq!(replay.outputs.len(), expected.len(), "rank {rank}");
        for (found, expected) in replay.outputs.iter().zip(&expected) {
            assert_eq!(found.0, expected.0, "rank {rank}");
            let at = found.1.iter().zip(&expected.1).position(|(a, b)| a != b);
            assert_eq!((at, found.1.len()), (None, expected.1.len()), "rank {rank} {}", found.0);
        }
        let load = plan.loads()[rank as usize];
        let mut told = replay.load;
        told.requests = load.requests;
        assert_eq!(load, told, "rank {rank}");
        assert!(replay.largest_unit <= plan.buffers().block);
        let view = plan.rank(rank);
        let exchanges = view.rounds().next().is_some();
        // Rows that are read with the gaps between them pass through a block, if they fit one.
        let staged = view
            .direct_reads()
            .flat_map(|read| read.copies)
            .any(|copy| copy.count > 1 && copy.src_stride - copy.len <= plan.coalesce_gap());
        let staging = view.staging_bytes();
        assert!(staging <= plan.staging_bytes() && plan.staging_bytes() <= case.budget);
        match exchanges {
            true => assert_eq!(staging, plan.buffers().total()),
            false if staged => assert_eq!(staging, plan.buffers().block * 2),
            false => assert!(staging == 0 || staging == plan.buffers().block * 2),
        }
        let place = case.topology.places()[rank as usize];
        assert!(place.storage.is_some() || load.read() == 0, "rank {rank} cannot read");
    }
    // What the world reads once is read exactly once.
    let once = |choice: Choice| matches!(choice, Choice::Scatter | Choice::Broadcast);
    let mut seen: HashMap<u32, u64> = HashMap::new();
    for rank in 0..world {
        for round in plan.rank(rank).rounds() {
            for piece in round.unit(round.rank()) {
                *seen.entry(piece.tensor).or_default() += piece.range.end - piece.range.start;
            }
        }
    }
    for (index, tensor) in (0u32..).zip(&case.tensors) {
        if once(plan.choice(index)) {
            assert_eq!(seen.get(&index).copied().unwrap_or(0), tensor.byte_len(), "{tensor:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Every kept byte arrives exactly once, at its place; nobody receives what it drops; loads are
    /// as told; units fit the blocks and buffers the budget; planning twice gives one digest.
    #[test]
    fn plans_deliver_every_kept_byte_once(case in case()) {
        check(&case);
    }
}

/// Tensors of several files and ways.
fn some_tensors() -> Vec<TensorDesc> {
    let tensor = |index: u64| {
        let (name, shape) = (format!("t{index}"), vec![64 + index, 32]);
        let file_range = index * 10_000..index * 10_000 + (64 + index) * 64;
        TensorDesc { name, bits: 16, shape, shard: (index / 10) as u32, file_range }
    };
    (0..30).map(tensor).collect()
}

#[test]
fn the_digest_tells_all_that_ranks_must_agree_on() {
    let shard = |t: &TensorDesc| match t.shape[0] % 3 {
        0 => Shard::split(0),
        1 => Shard::split(1),
        _ => Shard::replicate(),
    };
    let planner = Planner::new(Topology::one_node(4));
    let plan = |tensors: Vec<TensorDesc>| planner.plan(tensors, shard).unwrap().digest();
    let digest = plan(some_tensors());
    assert_eq!(plan(some_tensors()), digest);
    let changed = |change: fn(&mut Vec<TensorDesc>)| {
        let mut tensors = some_tensors();
        change(&mut tensors);
        plan(tensors)
    };
    let mut others = vec![
        changed(|t| t[7].name.push('x')),
        changed(|t| t[7].shard += 1),
        changed(|t| t[7].file_range = t[7].file_range.start + 1..t[7].file_range.end + 1),
        changed(|t| t[7].shape.reverse()),
        changed(|t| t.swap(7, 8)),
        changed(|t| drop(t.pop())),
        planner.clone().budget(8 << 20).plan(some_tensors(), shard).unwrap().digest(),
        planner.clone().coalesce_gap(3).plan(some_tensors(), shard).unwrap().digest(),
        planner.clone().fingerprint("other").plan(some_tensors(), shard).unwrap().digest(),
        Planner::new(Topology::one_node(5)).plan(some_tensors(), shard).unwrap().digest(),
        Planner::new(Topology::shared_storage(2, 2)).plan(some_tensors(), shard).unwrap().digest(),
        planner.plan(some_tensors(), |_| Shard::split(0)).unwrap().digest(),
        planner.plan(some_tensors(), |_| Split::along(0).heads(1).into()).unwrap().digest(),
    ];
    others.push(digest);
    let count = others.len();
    others.sort_by_key(|digest| *digest.as_bytes());
    others.dedup();
    assert_eq!(others.len(), count);
}

#[test]
fn staging_is_no_more_than_the_plan_needs() {
    let planner = Planner::new(Topology::one_node(4));
    let whole: u64 = some_tensors().iter().map(TensorDesc::byte_len).sum();
    let staging = |shard: fn(&TensorDesc) -> Shard, scale: u64| {
        let scaled = some_tensors().into_iter().map(|tensor| TensorDesc {
            shape: vec![tensor.shape[0] * scale, 32],
            file_range: tensor.file_range.start * scale..tensor.file_range.end * scale,
            ..tensor
        });
        let plan = planner.plan(scaled.collect::<Vec<_>>(), shard).unwrap();
        (plan.staging_bytes(), plan.buffers())
    };
    // Read once, and at most half the bytes in a block of any of the buffers.
    let (bytes, buffers) = staging(|_| Shard::replicate(), 100);
    assert!(bytes > whole && bytes < whole * 200, "{bytes}");
    assert!(buffers.block >= whole * 100 / 4 && buffers.block < whole * 100 / 2, "{buffers:?}");
    // Blocks have a least size.
    for shard in [|_: &TensorDesc| Shard::replicate(), |_: &TensorDesc| Shard::split(1)] {
        let (bytes, _) = staging(shard, 1);
        assert!(bytes <= 1 << 20, "{bytes}");
    }
    // Parts that lie in one piece go straight to their places.
    assert_eq!(staging(|_| Shard::split(0), 10_000).0, 0);
    // Much to load takes the budget.
    let (bytes, _) = staging(|_| Shard::replicate(), 10_000);
    assert!(bytes > 150 << 20 && bytes <= 256 << 20, "{bytes}");
}

#[test]
fn what_cannot_be_planned_is_refused_by_name() {
    let planner = Planner::new(Topology::one_node(4));
    let refused = |planner: &Planner, shard: fn(&TensorDesc) -> Shard| {
        planner.plan(some_tensors(), shard).unwrap_err().to_string()
    };
    assert_eq!(refused(&planner, |_| Shard::split(2)), "tensor t0: dimension 2 of a tensor with 2");
    assert_eq!(refused(&planner, |_| Shard::keep_on(4)), "tensor t0: rank 4 in a world of 4");
    let exact = |_: &TensorDesc| Split::along(0).remainder(Remainder::Exact).into();
    assert_eq!(refused(&planner, exact), "tensor t1: dimension 0: 65 does not divide by 4 ranks");
    // Also of a tensor without a row, where any number of sections adds up.
    let sections = |_: &TensorDesc| Split::along(0).sections(1 << 40).into();
    let empty =
        TensorDesc { name: "e".into(), bits: 8, shape: vec![0], shard: 0, file_range: 8..8 };
    let error = planner.plan([empty], sections).unwrap_err().to_string();
    assert_eq!(error, "tensor e: dimension 0: 1099511627776 sections, and 65536 are the most");
    let twice = |_: &TensorDesc| Split::along(0).fused_into("all", 0).into();
    assert_eq!(refused(&planner, twice), "fused tensor all: position 0 is 30 times filled");
    let small = planner.clone().budget(1000);
    let error = refused(&small, |_| Shard::split(1));
    let smallest: u64 = error.rsplit(' ').next().unwrap().parse().unwrap();
    assert!(error.starts_with("a staging budget of 1000 bytes per rank; the smallest"), "{error}");
    let fits = planner.clone().budget(smallest);
    let plan = fits.plan(some_tensors(), |_| Shard::split(1)).unwrap();
    assert!(plan.buffers().total() <= smallest);
    let mut tensors = some_tensors();
    tensors[3].file_range.end -= 1;
    let error = planner.plan(tensors, |_| Shard::replicate()).unwrap_err();
    assert!(matches!(error, PlanError::ByteLength { ref tensor, .. } if tensor == "t3"), "{error}");
}

#[test]
fn padding_does_not_make_a_shape_overflow_that_is_empty() {
    let shape = vec![1, 1 << 34, 0];
    let table = [TensorDesc { name: "t".into(), bits: 4, shape, shard: 0, file_range: 0..0 }];
    let plan = |multiple| {
        Planner::new(Topology::one_node(1)).plan(table.clone(), |_| Shard::vocab_rows(multiple))
    };
    assert!(plan(1 << 10).is_ok());
    let error = plan(1 << 42).unwrap_err();
    assert!(matches!(error, PlanError::Shard { .. }), "{error:?}");
}

#[test]
fn the_last_part_of_a_dimension_ends_within_a_number() {
    let shape = vec![0, u64::MAX, 0];
    let table = [TensorDesc { name: "t".into(), bits: 4, shape, shard: 0, file_range: 0..0 }];
    let planner = Planner::new(Topology::one_node(4096));
    let plan = planner.plan(table, |_| Split::along(1).heads(1).into()).unwrap();
    let last = plan.rank(4095).outputs()[0].shape.clone();
    assert_eq!(last, [0, (1 << 52) - 1, 0]);
}

/// Dimensions and numbers around those that overflow.
fn extreme() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..10u64,
        (0..64u32, 0..3u64).prop_map(|(bit, less)| (1u64 << bit).saturating_sub(less)),
        Just(u64::MAX),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever a header claims and a caller asks for: a plan whose sizes are all sound, or an error.
    #[test]
    fn sizes_that_overflow_are_refused(
        tensors in proptest::collection::vec(
            (proptest::collection::vec(extreme(), 0..4), prop_oneof![Just(4u32), Just(8), Just(16), Just(64)],
             0..5u8, extreme(), 0..3usize),
            1..5,
        ),
        world in prop_oneof![1..9u32, Just(4096)],
    ) {
        let mut table = Vec::new();
        let mut specs = Vec::new();
        for (i, (shape, bits, kind, number, dim)) in tensors.into_iter().enumerate() {
            let elements = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
            let bytes = elements.and_then(|n| n.checked_mul(u64::from(bits))).map(|n| n / 8);
            let name = if kind == 0 { "embed_tokens.weight".to_owned() } else { format!("t{i}") };
            let file_range = 0..bytes.unwrap_or(u64::MAX);
            table.push(TensorDesc { name, bits, shape, shard: i as u32, file_range });
            specs.push(match kind {
                0 => None,
                1 => Some(Shard::vocab_rows(number)),
                2 => Some(Split::along(dim).unit(number.max(1)).into()),
                3 => Some(Shard::split(dim)),
                _ => Some(Shard::replicate()),
            });
        }
        let rules = fst_dist::Preset::llama().rules(&table, world);
        let shard = |t: &TensorDesc| specs[t.shard as usize].clone().unwrap_or_else(|| rules.shard(t));
        let Ok(plan) = Planner::new(Topology::one_node(world)).plan(table, shard) else { return Ok(()) };
        let mut kept = 0u64;
        for rank in [0, world / 2, world - 1] {
            let view = plan.rank(rank);
            for output in view.outputs() {
                let elements = output.shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d)).unwrap();
                let bits = elements.checked_mul(u64::from(output.bits)).unwrap();
                prop_assert_eq!(output.bytes, bits / 8, "{:?}", output);
                prop_assert!(output.padding <= output.bytes, "{:?}", output);
                kept = kept.checked_add(output.bytes).unwrap();
            }
        }
        prop_assert!(kept <= i64::MAX as u64);
    }
}
