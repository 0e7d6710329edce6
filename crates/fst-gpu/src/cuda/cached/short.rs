//! Which copies may be made straight out of a file's mapping, and which pass through pinned memory.
//! Pure.
//!
//! A driver may make short copies itself instead of leaving them to the copy engine (from pageable
//! memory it does so up to 64 KiB). Reading the mapping of a file that was cut off meanwhile, it would
//! meet a signal; the copy engine reads pages that were pinned. So short runs are read from the file
//! into pinned memory first, where what is missing is an error.

use crate::cuda::pipeline::{CopyOp, joined, source_range};

/// Longest run that a driver may copy itself, in bytes; longer ones go straight out of a mapping.
const MOST_BY_DRIVER: u64 = 64 << 10;

/// Short runs that lie at most this many bytes apart are read at once.
const GAP: u64 = 64 << 10;

/// Clusters start at multiples of this, so that their operations keep the alignment of their sources.
const ALIGN: u64 = 256;

/// Operations whose sources are read together. Their offsets count from `start`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Cluster {
    /// First byte, from where the operations' offsets counted before.
    pub(super) start: u64,
    /// Bytes.
    pub(super) len: u64,
    pub(super) ops: Vec<CopyOp>,
}

/// Parts operations into those that may read a mapping and clusters of at most `most` bytes of the
/// others. `Err` is one that is longer than that.
pub(super) fn part(ops: &[CopyOp], most: u64) -> Result<(Vec<CopyOp>, Vec<Cluster>), CopyOp> {
    let (mut direct, mut short) = (Vec::new(), Vec::new());
    let runs = joined(ops).into_iter();
    let runs = runs.map(|(source, destination, len)| CopyOp::Linear { source, destination, len });
    let others = ops.iter().copied().filter(|op| !matches!(op, CopyOp::Linear { .. }));
    for op in runs.chain(others) {
        let (start, end) = source_range(&op).ok_or(op)?;
        let run = match op {
            // Each row is a copy of its own, whoever makes it.
            CopyOp::Strided { width, .. } => width,
            _ => end - start,
        };
        match run {
            0 => {}
            1..=MOST_BY_DRIVER => short.push((start, end, op)),
            _ => direct.push(op),
        }
    }
    short.sort_by_key(|(start, ..)| *start);
    let mut clusters: Vec<Cluster> = Vec::new();
    for (start, end, op) in short {
        let near = clusters.last_mut().filter(|cluster| {
            start <= cluster.start + cluster.len + GAP && end - cluster.start <= most
        });
        let cluster = match near {
            Some(cluster) => cluster,
            None => {
                let at = start / ALIGN * ALIGN;
                if end - at > most {
                    return Err(op);
                }
                clusters.push(Cluster { start: at, len: 0, ops: Vec::new() });
                let Some(last) = clusters.last_mut() else { return Err(op) };
                last
            }
        };
        cluster.len = cluster.len.max(end - cluster.start);
        cluster.ops.push(op.earlier(cluster.start));
    }
    Ok((direct, clusters))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::kernel::{Kernel, StridedJob};

    fn linear(source: u64, destination: u64, len: u64) -> CopyOp {
        CopyOp::Linear { source, destination, len }
    }

    #[test]
    fn long_runs_are_direct_and_short_ones_are_read_together() {
        let ops = [
            linear(100, 1000, 40_000),
            linear(40_100, 41_000, 40_000),
            linear(80_100, 500_000, 700),
            linear(80_800, 600_000, 0),
            linear(90_000, 700_000, 500),
            linear(400_000, 800_000, 65_535),
        ];
        let (direct, clusters) = part(&ops, 4 << 20).unwrap();
        assert_eq!(direct, [linear(100, 1000, 80_000)]);
        let start = 80_100 / 256 * 256;
        let second = 400_000 / 256 * 256;
        assert_eq!(
            clusters,
            [
                Cluster {
                    start,
                    len: 90_500 - start,
                    ops: vec![
                        linear(80_100 - start, 500_000, 700),
                        linear(90_000 - start, 700_000, 500)
                    ]
                },
                Cluster {
                    start: second,
                    len: 465_535 - second,
                    ops: vec![linear(400_000 - second, 800_000, 65_535)]
                }
            ]
        );
        // No more in a cluster than a block holds.
        let (_, clusters) = part(&ops, 66_000).unwrap();
        assert_eq!(clusters.len(), 2);
        let (_, clusters) = part(&ops[2..5], 10_000).unwrap();
        assert_eq!(clusters.len(), 2);
        assert_eq!(part(&ops, 60_000), Err(ops[5]));
    }

    #[test]
    fn rows_and_transforms_count_by_what_is_read_at_once() {
        let rows = |width, source_pitch| CopyOp::Strided {
            source: 0,
            source_pitch,
            destination: 0,
            destination_pitch: width,
            width,
            rows: 8,
        };
        let job = |cols| CopyOp::Transform {
            kernel: Kernel::Gather,
            job: StridedJob { src: 0, dst: 0, rows: 2, cols, src_pitch: cols },
        };
        let is_direct = |op| part(&[op], 4 << 20).unwrap().1.is_empty();
        assert!(is_direct(rows((64 << 10) + 1, 65 << 10)));
        assert!(!is_direct(rows(64 << 10, 65 << 10)));
        assert!(is_direct(job((32 << 10) + 1)));
        assert!(!is_direct(job(32 << 10)));
    }
}
