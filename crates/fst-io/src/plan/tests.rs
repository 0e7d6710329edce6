use super::*;

const ALIGN: u64 = 16;

fn limits(block: u64, gap: u64, segment: u64) -> Limits {
    Limits { align: ALIGN, block, gap, segment }
}

/// What every plan owes, told byte by byte.
fn check_plan(plan: &ReadPlan) {
    let limits = plan.limits();
    for (i, extent) in plan.extents().iter().enumerate() {
        let mut held = vec![0; extent.len as usize];
        for block in plan.blocks() {
            let listed = block.extents.contains(&(i as u32));
            let lo = extent.offset.max(block.offset);
            let hi = extent.end().min(block.need_end());
            let here = block.file == extent.file && lo < hi;
            // A block of another segment may overlap by less than an alignment; it is not listed.
            if listed {
                assert!(here || extent.len == 0, "listed without bytes: {extent:?} {block:?}");
                for byte in lo..hi.max(lo) {
                    held[(byte - extent.offset) as usize] += 1;
                }
            }
        }
        assert!(held.iter().all(|n| *n == 1), "every byte lands once: {extent:?} {held:?}");
    }
    for (i, block) in plan.blocks().iter().enumerate() {
        assert_eq!(block.index as usize, i);
        assert_eq!((block.offset % ALIGN, block.len % ALIGN), (0, 0));
        assert!(block.need > 0 && block.need <= block.len && block.len <= limits.block);
        let segment = &plan.segments()[block.segment as usize];
        assert!(segment.start <= block.offset && block.offset + block.len <= segment.end);
        assert!(segment.blocks.contains(&(i as u32)));
    }
}

#[test]
fn one_extent_is_cut_at_multiples_of_the_block() {
    let plan = ReadPlan::new(vec![Extent::new(0, 10..150)], limits(64, 0, u64::MAX)).unwrap();
    let cuts: Vec<_> = plan.blocks().iter().map(|b| (b.offset, b.len, b.need)).collect();
    assert_eq!(cuts, [(0, 64, 64), (64, 64, 64), (128, 32, 22)]);
    assert_eq!((plan.bytes_asked(), plan.bytes_read()), (140, 150));
    check_plan(&plan);
}

#[test]
fn gaps_up_to_the_limit_are_read_over() {
    let extents = vec![Extent::new(0, 0..20), Extent::new(0, 52..60), Extent::new(0, 93..100)];
    let plan = ReadPlan::new(extents, limits(4096, 32, u64::MAX)).unwrap();
    assert_eq!(plan.segments().len(), 2, "52 - 20 is within 32 and 93 - 60 is not");
    check_plan(&plan);
}

#[test]
fn blocks_that_lie_within_a_gap_are_not_read() {
    let extents = vec![Extent::new(0, 0..16), Extent::new(0, 400..416)];
    let plan = ReadPlan::new(extents, limits(32, 1000, u64::MAX)).unwrap();
    assert_eq!(plan.segments().len(), 1);
    assert_eq!(plan.blocks().len(), 2);
    check_plan(&plan);
}

#[test]
fn segments_are_cut_between_extents() {
    let extents: Vec<_> = (0..10).map(|i| Extent::new(0, i * 24..(i + 1) * 24)).collect();
    let plan = ReadPlan::new(extents, limits(64, 0, 100)).unwrap();
    assert!(plan.segments().iter().all(|s| s.len() <= 100 + ALIGN));
    assert_eq!(plan.segments().len(), 3);
    check_plan(&plan);
}

#[test]
fn empty_extents_and_empty_plans_read_nothing() {
    let plan = ReadPlan::new(vec![Extent::new(0, 5..5), Extent::new(1, 0..0)], limits(64, 0, 99));
    assert!(plan.unwrap().blocks().is_empty());
    assert!(ReadPlan::new(Vec::new(), Limits::default()).unwrap().segments().is_empty());
}

#[test]
fn bad_requests_are_errors() {
    let over = vec![Extent { file: 0, offset: u64::MAX - 3, len: 9 }];
    assert!(matches!(
        ReadPlan::new(over, Limits::default()),
        Err(PlanError::TooLong { index: 0, .. })
    ));
    let overlap = vec![Extent::new(0, 0..10), Extent::new(0, 9..20)];
    assert!(matches!(
        ReadPlan::new(overlap, Limits::default()),
        Err(PlanError::Unsorted { index: 1, .. })
    ));
    let plan = ReadPlan::new(vec![Extent::new(0, 0..1 << 60)], Limits::default());
    assert!(matches!(plan, Err(PlanError::TooMany)), "at once, not when memory has run out");
    let odd = Limits { align: 3, ..Limits::default() };
    assert!(matches!(ReadPlan::new(vec![], odd), Err(PlanError::Alignment { align: 3 })));
}

proptest::proptest! {
    #[test]
    fn plans_are_exact(
        steps in proptest::collection::vec((0u64..90, 0u64..300, proptest::bool::weighted(0.1)), 0..30),
        block in 16u64..200, gap in 0u64..60, segment in 1u64..500, per_group in 1usize..5,
    ) {
        let (mut file, mut at) = (0, 0);
        let mut extents = Vec::new();
        for (skip, len, next_file) in steps {
            if next_file { file += 1; at = 0; }
            extents.push(Extent::new(file, at + skip..at + skip + len));
            at += skip + len;
        }
        check_plan(&ReadPlan::new(extents.clone(), limits(block, gap, segment)).unwrap());
        let group = |extent| extent / per_group;
        let grouped = ReadPlan::grouped(extents, group, limits(block, gap, segment)).unwrap();
        check_plan(&grouped);
        for block in grouped.blocks() {
            // Empty extents in between belong to no block.
            let filled = |e: &u32| grouped.extents()[*e as usize].len > 0;
            let mut groups = block.extents.clone().filter(filled).map(|e| group(e as usize));
            let first = groups.next();
            proptest::prop_assert!(groups.all(|other| Some(other) == first), "{block:?}");
        }
    }
}
