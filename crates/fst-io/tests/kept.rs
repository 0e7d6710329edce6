#![allow(clippy::unwrap_used, clippy::panic)]

//! Host memory that the process keeps: one test at a time, as all look at the whole process.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fst_io::{Budget, HostBuffer, Piece, SharedBuffer, kept_bytes, release_kept};

const MIB: usize = 1 << 20;

fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    let alone = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
    release_kept();
    assert_eq!(kept_bytes(), 0);
    alone
}

/// A buffer full of one byte.
fn filled(buffer: HostBuffer, byte: u8) -> SharedBuffer {
    // SAFETY: nobody else has the buffer yet.
    unsafe { buffer.slice_mut(0..buffer.len()) }.unwrap().fill(byte);
    // SAFETY: the only writer is done.
    unsafe { SharedBuffer::new(Arc::new(buffer)) }
}

fn minor_faults() -> i64 {
    // SAFETY: an all-zero `rusage` is one, and the call fills it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        assert_eq!(libc::getrusage(libc::RUSAGE_SELF, &mut usage), 0);
        usage
    };
    usage.ru_minflt
}

#[test]
fn what_a_buffer_leaves_serves_the_next_within_the_bound() {
    let _alone = alone();
    let (len, bound) = (48 * MIB, 64 * MIB as u64);
    let first = filled(HostBuffer::kept(len, bound).unwrap(), 7);
    let address = first.as_ptr();
    assert_eq!(kept_bytes(), 0, "it is in use");
    drop(first);
    assert_eq!(kept_bytes(), len as u64);
    // A little longer, the same memory; only the rest is touched first.
    let before = minor_faults();
    let second = HostBuffer::kept(len + MIB, bound).unwrap();
    assert_eq!((second.as_ptr().as_ptr().cast_const(), kept_bytes()), (address, 0));
    assert!(second.is_backed(0, len) && !second.is_backed(0, len + 1));
    // SAFETY: nobody writes to the buffer, whose first bytes were filled above.
    assert!(unsafe { second.slice(0..len) }.unwrap().iter().all(|byte| *byte == 7));
    let second = filled(second, 8);
    let faults = minor_faults() - before;
    assert!(faults < 600, "{faults} faults for a mebibyte");
    drop(second);
    assert_eq!(release_kept(), (len + MIB) as u64);
    assert_eq!((kept_bytes(), release_kept()), (0, 0));
    // No more than the bound, and what is fresh is zero.
    let fresh = HostBuffer::kept(len, 16 * MIB as u64).unwrap();
    // SAFETY: nobody writes to the buffer.
    assert!(unsafe { fresh.slice(0..len) }.unwrap().iter().all(|byte| *byte == 0));
    drop(filled(fresh, 1));
    assert_eq!(kept_bytes(), 16 * MIB as u64);
    drop(filled(HostBuffer::kept(len, bound).unwrap(), 2));
    assert_eq!(kept_bytes(), len as u64, "the same mapping");
    // Without a bound nothing is kept, nor taken.
    drop(filled(HostBuffer::new(len).unwrap(), 1));
    drop(filled(HostBuffer::kept(len, 0).unwrap(), 1));
    assert_eq!(kept_bytes(), len as u64);
    // Who finds nothing that suits lets as much of it go.
    drop(filled(HostBuffer::kept(100 * MIB, 1 << 30).unwrap(), 1));
    assert_eq!(kept_bytes(), 100 * MIB as u64);
    release_kept();
}

#[test]
fn what_was_not_filled_is_not_kept() {
    let _alone = alone();
    drop(HostBuffer::kept(16 * MIB, 1 << 30).unwrap());
    assert_eq!(kept_bytes(), 0);
    drop(filled(HostBuffer::kept(16 * MIB, 1 << 30).unwrap(), 1));
    assert_eq!(kept_bytes(), 16 * MIB as u64);
    drop(HostBuffer::kept(16 * MIB, 1 << 30).unwrap());
    assert_eq!(kept_bytes(), 0, "nobody knows what it touched");
}

#[test]
fn pieces_leave_their_pages_one_by_one() {
    let _alone = alone();
    let (len, bound) = (32 * MIB, 20 * MIB as u64);
    let shared = filled(HostBuffer::kept(len, bound).unwrap(), 7);
    let piece = |at: usize| {
        // SAFETY: the pieces are apart, and nothing is read but through them.
        unsafe { shared.clone().piece(at * len / 4..(at + 1) * len / 4) }
    };
    let mut pieces: Vec<Piece> = (0..4).map(piece).collect();
    drop(shared);
    for left in [3, 2, 1] {
        pieces.pop();
        assert_eq!(
            kept_bytes(),
            ((4 - left) * len as u64 / 4).min(bound) / 8 / MIB as u64 * 8 * MIB as u64
        );
        assert!(pieces.iter().all(|piece| piece.iter().all(|byte| *byte == 7)));
    }
    pieces.pop();
    assert!((16 * MIB as u64..=bound).contains(&kept_bytes()), "{}", kept_bytes());
    // What went back meanwhile is zero, the rest holds what it held.
    let again = HostBuffer::kept(len, bound).unwrap();
    assert!(!again.is_backed(0, 1));
    // SAFETY: nobody writes to the buffer.
    let old = unsafe { again.slice(0..len) }.unwrap().iter().filter(|byte| **byte == 7).count();
    assert!((16 * MIB..=bound as usize).contains(&old), "{old}");
    drop(filled(again, 1));
    assert_eq!(kept_bytes(), bound);
    release_kept();
}

#[test]
fn a_budget_takes_kept_memory_and_leaves_its_own() {
    let _alone = alone();
    let bound = 1 << 30;
    drop(filled(HostBuffer::kept(16 * MIB, bound).unwrap(), 7));
    let budget = Budget::keeping(40 * MIB as u64, bound);
    let take = |len: usize| HostBuffer::leased(len, budget.take(len as u64).unwrap()).unwrap();
    let first = take(16 * MIB);
    assert!(first.is_backed(0, 16 * MIB));
    assert_eq!(kept_bytes(), 0, "the budget's now");
    let first = filled(first, 1);
    let second = filled(take(8 * MIB), 2);
    drop(first);
    assert_eq!((kept_bytes(), budget.used()), (0, 8 * MIB as u64), "for the budget's next");
    budget.close();
    assert_eq!(kept_bytes(), 16 * MIB as u64);
    drop(second);
    assert_eq!((kept_bytes(), budget.used()), (24 * MIB as u64, 0));
    release_kept();
}

#[test]
fn threads_never_share_memory_nor_exceed_the_bound() {
    let _alone = alone();
    let bound = 12 * MIB as u64;
    std::thread::scope(|scope| {
        for thread in 0..6u64 {
            scope.spawn(move || {
                let mut seed = thread + 1;
                for round in 0..120u64 {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let len = (seed >> 33) as usize % (3 * MIB) + 1;
                    let byte = (thread * 40 + round % 40) as u8;
                    let shared = filled(HostBuffer::kept(len, bound).unwrap(), byte);
                    // SAFETY: the pieces are apart, and nothing is read but through them.
                    let (one, other) =
                        unsafe { (shared.clone().piece(0..len / 3), shared.piece(len / 3..len)) };
                    drop(one);
                    std::thread::yield_now();
                    assert!(other.iter().all(|found| *found == byte));
                    assert!(kept_bytes() <= bound);
                    if round % 50 == 0 {
                        release_kept();
                    }
                }
            });
        }
    });
    assert!(kept_bytes() > 0);
    release_kept();
}
