//! `LocalGroup`: the battery, and what happens when ranks fail.

#![allow(clippy::unwrap_used, clippy::panic)]

mod conformance;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use fst_dist::group::{Control, HostCopier, Op};
use fst_dist::{Dst, Group, GroupError, LocalGroup, Src};

/// Runs `f` on a thread for each rank; a panic counts as no result.
fn on_ranks<T: Send>(
    groups: Vec<LocalGroup>,
    f: impl Fn(LocalGroup) -> T + Sync,
) -> Vec<Option<T>> {
    std::thread::scope(|scope| {
        let run = |group| {
            let f = &f;
            scope.spawn(move || catch_unwind(AssertUnwindSafe(|| f(group))).ok())
        };
        let threads: Vec<_> = groups.into_iter().map(run).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// What every rank but one does: an all-to-all, over and over.
fn keep_busy(group: &LocalGroup) -> Result<(), GroupError> {
    let (rank, world) = (group.rank(), group.world_size());
    let data = vec![rank as u8; 100_000];
    loop {
        let mut into = vec![vec![0; 100_000]; world as usize];
        let mut batch = Vec::new();
        for (other, into) in (0u32..).zip(&mut into).filter(|(other, _)| *other != rank) {
            batch.push(Op::Send { to: other, data: Src::from(&data[..]) });
            batch.push(Op::Recv { from: other, into: Dst::from(&mut into[..]) });
        }
        group.exchange(batch)?;
    }
}

#[test]
fn the_battery() {
    for world in [1, 2, 3, 4, 8] {
        let results = on_ranks(LocalGroup::host(world), |group| conformance::run(&group));
        assert_eq!(results, vec![Some(Ok(())); world as usize]);
    }
}

#[test]
fn an_abort_ends_every_wait_with_rank_and_cause() {
    for failing in 0..4 {
        let start = Instant::now();
        let results = on_ranks(LocalGroup::host(4), |group| {
            if group.rank() == failing {
                std::thread::sleep(Duration::from_millis(20));
                group.abort("out of paper");
            }
            keep_busy(&group).unwrap_err().to_string()
        });
        let expected = format!("rank {failing} failed: out of paper");
        assert_eq!(results, vec![Some(expected); 4]);
        assert!(start.elapsed() < Duration::from_secs(60));
    }
}

#[test]
fn a_panic_and_a_departure_are_noticed() {
    for panics in [true, false] {
        let results = on_ranks(LocalGroup::host(3), |group| {
            if group.rank() == 1 {
                assert!(!panics, "as the test wants");
                return String::new();
            }
            keep_busy(&group).unwrap_err().to_string()
        });
        let cause = if panics { "its thread panicked" } else { "it left the group" };
        let expected = format!("rank 1 is lost: {cause}");
        assert_eq!(results[0].as_ref(), Some(&expected));
        assert_eq!(results[2].as_ref(), Some(&expected));
    }
}

#[test]
fn a_silent_rank_meets_the_deadline() {
    let deadline = Duration::from_secs(1);
    let (ready, done) = (std::sync::Barrier::new(3), std::sync::Barrier::new(3));
    let results = on_ranks(LocalGroup::with(3, HostCopier, deadline), |group| {
        // A thread that starts late is silent, too.
        ready.wait();
        let result = match group.rank() {
            2 => Ok(()),
            _ => group.barrier(),
        };
        done.wait();
        result.err()
    });
    for result in &results[..2] {
        let Some(Some(GroupError::Deadline { waiting_for, .. })) = result else {
            panic!("{result:?}")
        };
        assert_eq!(*waiting_for, Some(2));
    }
}

#[test]
fn a_deadline_counts_silence() {
    let scratch = conformance::HostScratch::default();
    let groups = || LocalGroup::with(3, HostCopier, Duration::from_millis(800));
    let results = on_ranks(groups(), |group| conformance::outwait(&group, &scratch));
    assert_eq!(results, vec![Some(Ok(())); 3]);
    let results = on_ranks(groups(), |group| conformance::outwait_none(&group, &scratch));
    assert_eq!(results, vec![Some(Ok(())); 3]);
}

#[test]
fn sizes_that_differ_are_refused_on_both_sides() {
    let results = on_ranks(LocalGroup::host(2), |group| {
        let result = match group.rank() {
            0 => group.send(1, Src::from(&[1u8, 2, 3][..])),
            _ => group.recv(0, Dst::from(&mut [0u8; 4][..])),
        };
        (result.unwrap_err().to_string(), group.barrier().unwrap_err().to_string())
    });
    let expected = "rank 0 sent 3 bytes to rank 1, which expects 4".to_owned();
    assert_eq!(results, vec![Some((expected.clone(), expected)); 2]);
}

#[test]
fn peers_outside_the_world_are_refused() {
    let groups = LocalGroup::host(2);
    for peer in [0, 2] {
        let error = groups[0].send(peer, Src::from(&[][..])).unwrap_err();
        assert!(matches!(error, GroupError::Peer { .. }), "{error}");
    }
}

/// Loads refused on some ranks are refused on all, each as often as where that was most often.
#[test]
fn refused_loads_are_made_up_for() {
    let busy = |group: &dyn Group| match group.occupy() {
        Err(GroupError::Busy { rank, .. }) => rank,
        other => panic!("{other:?}"),
    };
    // How often each rank refuses, and for each what it owes to the first that refused most.
    for (refused, owed, most) in [([0, 2, 1], [2, 0, 1], 1), ([0, 0, 0], [0; 3], 0)] {
        let ended = on_ranks(LocalGroup::host(3), |group| {
            let (rank, group): (usize, &dyn Group) = (group.rank() as usize, &group);
            for _ in 0..2 {
                let occupied = group.occupy().unwrap();
                (0..refused[rank]).for_each(|_| assert_eq!(busy(group), rank as u32));
                occupied.end().unwrap();
                (0..owed[rank]).for_each(|_| assert_eq!(busy(group), most));
            }
            drop(group.occupy().unwrap());
        });
        assert_eq!(ended, [Some(()); 3]);
    }
}
