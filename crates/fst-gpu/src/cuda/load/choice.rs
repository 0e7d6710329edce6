//! Which way cached files take to a device: straight out of the page cache, whose pages the driver
//! is asked to register, or through staging memory. Measured where it pays, and said in the report.

use std::collections::HashMap;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::{LazyLock, Mutex};

use fst_io::plan::{Block, ReadPlan};
use fst_io::{CachePolicy, Engine, ReadOptions, SourceFile};

use crate::cuda::device::CudaDevice;
use crate::device_copy::{CachedCopy, DeviceCopy};

impl CachedCopy {
    /// Why nothing travels straight out of the page cache, whatever is in it, to a device and so many `others`.
    pub(super) fn refusal(
        self,
        read: &ReadOptions,
        budget: bool,
        others: usize,
    ) -> Option<&'static str> {
        match self {
            Self::Staged => Some("staging was asked for"),
            _ if others > 0 => Some("several devices have parts of a block"),
            // Blocks that wait for memory must come in order: cached ones cannot go ahead of others.
            _ if budget => Some("streams stage, as their blocks come in order"),
            _ if read.engine != Engine::Auto => Some("an engine was asked for"),
            _ if read.cache != CachePolicy::Residency => {
                Some("a way around the cache was asked for")
            }
            _ => None,
        }
    }
}

impl DeviceCopy {
    /// Whether the rates say that registered mappings are faster.
    pub(super) fn registered_is_faster(&self) -> bool {
        self.refused.is_none() && self.registered_rate > self.staged_rate
    }
}

/// From this many cached bytes on, `Auto` measures: both samples are a small part of the load then.
const WORTH_MEASURING: u64 = 4 * SAMPLE;

/// Bytes of a sample, at most; and the share of the load, at most.
const SAMPLE: u64 = 512 << 20;
const SAMPLE_SHARE: u64 = 4;

/// After so many bytes of the direct sample it ends if it is less than half as fast as staging.
pub(super) const PROBE: u64 = SAMPLE / 8;

/// What was measured for a device and a file system.
static MEASURED: LazyLock<Mutex<HashMap<(usize, u64), DeviceCopy>>> = LazyLock::new(Mutex::default);

fn key(device: &CudaDevice, files: &[SourceFile]) -> (usize, u64) {
    let file_system = files.first().and_then(|file| file.buffered()?.metadata().ok());
    (device.ordinal(), file_system.map_or(0, |metadata| metadata.dev()))
}

/// What an earlier load measured for this device and these files.
pub(super) fn known(device: &CudaDevice, files: &[SourceFile]) -> Option<DeviceCopy> {
    let known = MEASURED.lock().unwrap_or_else(|e| e.into_inner());
    known.get(&key(device, files)).cloned()
}

/// Bytes of a sample, at least, for later loads to keep to its result.
const LEAST_SAMPLE: u64 = 8 << 20;

/// Keeps what a load measured for later ones, on `sample` bytes or more each: of less, noise would
/// decide for the whole process.
pub(super) fn remember(
    device: &CudaDevice,
    files: &[SourceFile],
    measured: &DeviceCopy,
    sample: u64,
) {
    if sample < LEAST_SAMPLE {
        return;
    }
    let mut known = MEASURED.lock().unwrap_or_else(|e| e.into_inner());
    known.insert(key(device, files), measured.clone());
}

/// What a load does with its cached blocks.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Way {
    Staged,
    Registered,
    /// Stages, and tries the direct way on the last of them.
    Contest,
}

/// Chooses for a load, and says why in `copy`. How much is cached is asked only where that decides.
pub(super) fn choose(
    copy: &mut DeviceCopy,
    can_register: bool,
    known: Option<DeviceCopy>,
    cached: impl FnOnce() -> u64,
) -> Way {
    let (way, reason) = match (copy.asked, known) {
        (CachedCopy::Staged, _) => (Way::Staged, "staging was asked for"),
        (CachedCopy::Registered, _) => (Way::Registered, "registered mappings were asked for"),
        // The driver would refuse each window.
        _ if !can_register => {
            copy.refused = Some("READ_ONLY_HOST_REGISTER_SUPPORTED is 0".to_owned());
            (Way::Staged, "the device takes no registered mappings of files")
        }
        (CachedCopy::Measured, _) => (Way::Contest, "measured"),
        (CachedCopy::Auto, Some(known)) => {
            copy.registered_rate = known.registered_rate;
            copy.staged_rate = known.staged_rate;
            copy.refused.clone_from(&known.refused);
            let faster = known.registered_is_faster();
            let way = if faster { Way::Registered } else { Way::Staged };
            (way, "measured by an earlier load")
        }
        (CachedCopy::Auto, None) if cached() < WORTH_MEASURING => {
            (Way::Staged, "too little is cached to measure")
        }
        (CachedCopy::Auto, None) => (Way::Contest, "measured"),
    };
    copy.reason = reason.to_owned();
    way
}

/// Whether the page cache holds all of a block.
pub(super) fn is_cached(block: &Block, files: &[SourceFile]) -> bool {
    files.get(block.file as usize).is_some_and(|file| {
        file.resident_bytes_of(block.offset, block.need).is_ok_and(|bytes| bytes >= block.need)
    })
}

/// About how many bytes of a plan's blocks are cached, by samples at equal distances; 0 where it cannot be
/// enough to measure.
pub(super) fn cached_estimate(plan: &ReadPlan, cached: impl Fn(&Block) -> bool) -> u64 {
    const SAMPLES: usize = 16;
    let (all, step) = (plan.bytes_read(), plan.blocks().len().div_ceil(SAMPLES).max(1));
    if all < WORTH_MEASURING {
        return 0;
    }
    let samples = || plan.blocks().iter().skip(step / 2).step_by(step);
    let found = samples().filter(|block| cached(block)).count() as u64;
    (u128::from(all) * u128::from(found) / samples().count().max(1) as u128) as u64
}

/// Numbers of the last blocks: a sample to be staged, and one behind it for the direct way, of the same
/// length.
pub(super) fn samples(plan: &ReadPlan) -> [Range<u32>; 2] {
    let bytes = plan.bytes_read().min(SAMPLE * SAMPLE_SHARE) / SAMPLE_SHARE;
    let blocks: Vec<u32> = plan.blocks().iter().map(|block| block.index).collect();
    let all = blocks.len() as u32;
    let direct = all - part(plan, blocks.iter().rev(), bytes) as u32;
    let before = &blocks[..direct as usize];
    [direct - part(plan, before.iter().rev(), bytes) as u32..direct, direct..all]
}

/// How many of these blocks, from the first on, have about `bytes` bytes together.
pub(super) fn part<'b>(
    plan: &ReadPlan,
    blocks: impl Iterator<Item = &'b u32>,
    bytes: u64,
) -> usize {
    let mut sum = 0;
    let needs =
        blocks.map(|index| plan.blocks().get(*index as usize).map_or(0, |block| block.need));
    needs
        .take_while(|need| {
            sum < bytes && {
                sum += need;
                true
            }
        })
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use fst_io::Extent;
    use fst_io::plan::Limits;
    use std::cell::Cell;

    fn asked(asked: CachedCopy) -> DeviceCopy {
        DeviceCopy { asked, ..DeviceCopy::default() }
    }

    #[test]
    fn what_is_cached_is_asked_only_where_it_decides() {
        let unasked = || -> u64 { unreachable!("the way is decided") };
        for way in [CachedCopy::Auto, CachedCopy::Measured, CachedCopy::Staged] {
            let mut copy = asked(way);
            assert_eq!(choose(&mut copy, false, None, unasked), Way::Staged);
            assert_eq!(copy.refused.is_some(), way != CachedCopy::Staged);
        }
        assert_eq!(
            choose(&mut asked(CachedCopy::Registered), false, None, unasked),
            Way::Registered
        );
        assert_eq!(choose(&mut asked(CachedCopy::Measured), true, None, unasked), Way::Contest);
        for (direct, way) in [(2.0, Way::Registered), (0.5, Way::Staged)] {
            let (registered_rate, staged_rate) = (Some(direct), Some(1.0));
            let known = DeviceCopy { registered_rate, staged_rate, ..DeviceCopy::default() };
            let mut copy = asked(CachedCopy::Auto);
            assert_eq!(choose(&mut copy, true, Some(known), unasked), way);
            assert_eq!(copy.registered_rate, Some(direct));
        }
        for (cached, way) in [(WORTH_MEASURING - 1, Way::Staged), (WORTH_MEASURING, Way::Contest)] {
            assert_eq!(choose(&mut asked(CachedCopy::Auto), true, None, || cached), way);
        }
    }

    #[test]
    fn samples_are_few_and_late() {
        let limits = Limits { block: 2 << 20, ..Limits::default() };
        let plan = |bytes| ReadPlan::new(vec![Extent::new(0, 0..bytes)], limits).unwrap();
        let large = plan(16 << 30);
        let looks = Cell::new(0);
        let every_second = |block: &Block| {
            looks.set(looks.get() + 1);
            (block.index / 1000).is_multiple_of(2)
        };
        let estimate = cached_estimate(&large, every_second);
        assert!((7 << 30..10 << 30).contains(&estimate), "{estimate}");
        assert!(looks.get() <= 16);
        assert_eq!(cached_estimate(&plan(1 << 30), |_| unreachable!("too short")), 0);
        assert_eq!(samples(&large), [8192 - 512..8192 - 256, 8192 - 256..8192]);
        assert_eq!(samples(&plan(10 << 20)), [1..3, 3..5]);
        assert_eq!(samples(&plan(2 << 20)), [0..0, 0..1]);
    }
}
