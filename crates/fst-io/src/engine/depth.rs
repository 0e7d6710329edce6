//! How many reads are in flight: found out from the rate at which the first blocks arrive.
//!
//! [`Climb`] decides (pure); [`Depth`] is what the workers of a read share.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

/// In flight at first, over all workers: enough for most devices.
const START: usize = 32;
/// Requests in flight at least, and at most.
const RANGE: (usize, usize) = (4, 128);
/// Bytes in flight at most: all of them are pinned, and make others of the device wait.
const MAX_BYTES: u64 = 256 << 20;
/// A rate is taken over at least this long.
const WINDOW: Duration = Duration::from_millis(40);
/// A step up is kept when the rate is this much better. Less is noise.
const GAIN_UP: f64 = 1.06;
/// A step down, likewise: too few in flight cost more than too many, so that only a device that
/// thrashes shall get there.
const GAIN_DOWN: f64 = 1.2;
/// After a change that did not help, so many windows pass before the next; doubled each time.
const MAX_PAUSE: u32 = 16;

/// Climbs the hill of rate over depth: a step is tried, kept when it helps, undone when it does
/// not. Steps that do not help become rare.
#[derive(Debug, Clone)]
struct Climb {
    range: (usize, usize),
    /// The best depth known.
    base: usize,
    /// Its rate in bytes per second, smoothed; `None` before the first window.
    rate: Option<f64>,
    /// The depth on trial.
    trial: Option<usize>,
    /// A lower depth that was better, and its rate, while the base has another turn.
    confirm: Option<(usize, f64)>,
    up: bool,
    pause: u32,
    paused: u32,
}

impl Climb {
    fn new(start: usize, range: (usize, usize)) -> Self {
        let base = start.clamp(range.0, range.1);
        Self { range, base, rate: None, trial: None, confirm: None, up: true, pause: 0, paused: 0 }
    }

    /// The depth to use now.
    fn depth(&self) -> usize {
        self.trial.unwrap_or(self.base)
    }

    /// Takes the rate of a window that ran at [`depth`](Self::depth) from start to end.
    fn observe(&mut self, rate: f64) {
        let Some(before) = self.rate else {
            self.rate = Some(rate);
            return self.step();
        };
        match (self.trial.take(), self.confirm.take()) {
            (Some(depth), _) if rate > before * self.gain() => match self.up {
                true => self.adopt(depth, rate),
                // It may be the device that changed: back, to see whether the old depth is really
                // the slower one.
                false => self.confirm = Some((depth, rate)),
            },
            (Some(_), _) => self.refuse(),
            (None, Some((depth, lower))) => {
                self.rate = Some(rate);
                match lower > rate * self.gain() {
                    true => self.adopt(depth, lower),
                    false => self.refuse(),
                }
            }
            (None, None) => {
                self.rate = Some((before + rate) / 2.0);
                self.paused += 1;
                if self.paused > self.pause {
                    self.step();
                }
            }
        }
    }

    fn adopt(&mut self, depth: usize, rate: f64) {
        (self.base, self.rate) = (depth, Some(rate));
        self.pause = 0;
        self.step();
    }

    fn refuse(&mut self) {
        self.up = !self.up;
        self.pause = (self.pause * 2).clamp(1, MAX_PAUSE);
        self.paused = 0;
    }

    fn gain(&self) -> f64 {
        if self.up { GAIN_UP } else { GAIN_DOWN }
    }

    /// Puts the next depth in the current direction on trial, or, at the end of the range, turns.
    fn step(&mut self) {
        let next = |up| match up {
            true => (self.base * 3).div_ceil(2).min(self.range.1),
            false => (self.base * 2 / 3).max(self.range.0),
        };
        if next(self.up) == self.base {
            self.up = !self.up;
        }
        self.trial = Some(next(self.up)).filter(|depth| *depth != self.base);
    }
}

/// The depth of one read. Workers look at it for each block; one of them, now and then, finds that
/// a window is over and moves it.
#[derive(Debug)]
pub(super) struct Depth {
    workers: usize,
    /// Workers that are not done yet: they share what others leave.
    active: AtomicUsize,
    /// Now, over all workers.
    now: AtomicUsize,
    max: usize,
    landed: AtomicU64,
    /// How many bytes have landed when the window is over; `u64::MAX` when the depth is fixed.
    until: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    climb: Climb,
    block: u64,
    /// What the window started with; `None` while the change before it has not yet taken effect.
    start: Option<(u64, Duration)>,
}

impl Depth {
    /// For blocks of at most `block` bytes. What was asked for stays as it is.
    pub(super) fn new(asked: Option<usize>, workers: usize, block: u64) -> Self {
        let workers = workers.max(1);
        let fit = (MAX_BYTES / block.max(1)) as usize;
        // Each worker has at least one read in flight.
        let range = (RANGE.0.max(workers), RANGE.1.min(fit).max(RANGE.0).max(workers));
        let climb = match asked {
            Some(asked) => Climb::new(asked, (1, RANGE.1.max(workers))),
            None => Climb::new(START.max(2 * workers), range),
        };
        let depth = climb.depth();
        Self {
            workers,
            active: workers.into(),
            now: depth.into(),
            max: if asked.is_some() { depth } else { range.1 },
            landed: 0.into(),
            until: if asked.is_some() { u64::MAX } else { depth as u64 * block }.into(),
            state: State { climb, block, start: None }.into(),
        }
    }

    /// Over all workers, now.
    pub(super) fn total(&self) -> usize {
        self.now.load(Relaxed)
    }

    /// What one worker may have in flight now.
    pub(super) fn share(&self) -> usize {
        self.total().div_ceil(self.active.load(Relaxed).max(1))
    }

    pub(super) fn workers(&self) -> usize {
        self.workers
    }

    /// A worker has nothing left to do.
    pub(super) fn leave(&self) {
        self.active.fetch_sub(1, Relaxed);
    }

    /// What one worker may ever have in flight.
    pub(super) fn max_share(&self) -> usize {
        self.max.div_ceil(self.workers)
    }

    /// Counts bytes that were read from the device, `now` after the read's start.
    pub(super) fn arrived(&self, bytes: u64, now: Duration) {
        let landed = self.landed.fetch_add(bytes, Relaxed) + bytes;
        if landed < self.until.load(Relaxed) {
            return;
        }
        // One worker closes the window; the others go on.
        let Ok(mut state) = self.state.try_lock() else { return };
        if landed < self.until.load(Relaxed) {
            return;
        }
        let window = |depth: usize, block: u64| depth as u64 * block;
        match state.start {
            // What was in flight at the change has landed: the window begins.
            None => state.start = Some((landed, now)),
            Some((_, since)) if now.saturating_sub(since) < WINDOW => {}
            Some((from, since)) => {
                let seconds = now.saturating_sub(since).as_secs_f64();
                state.climb.observe((landed - from) as f64 / seconds);
                let depth = state.climb.depth();
                let changed = self.now.swap(depth, Relaxed) != depth;
                state.start = (!changed).then_some((landed, now));
            }
        }
        self.until.store(landed + window(self.total(), state.block), Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The mean depth after many windows on a device whose rate at a depth is `rate`.
    fn settle(start: usize, rate: impl Fn(usize, u32) -> f64) -> f64 {
        let mut climb = Climb::new(start, RANGE);
        let mut sum = 0;
        for window in 0..200 {
            let depth = climb.depth();
            assert!((RANGE.0..=RANGE.1).contains(&depth));
            climb.observe(rate(depth, window));
            sum += if window >= 100 { depth } else { 0 };
        }
        sum as f64 / 100.0
    }

    #[test]
    fn deep_devices_are_filled_and_shallow_ones_left_alone() {
        // Rate grows with depth up to a knee.
        let knee = |at: usize| move |depth: usize, _| depth.min(at) as f64;
        let deep = settle(16, knee(100));
        assert!(deep > 80.0, "{deep}");
        let flat = settle(16, knee(8));
        assert!((14.0..20.0).contains(&flat), "no gain, no change: {flat}");
        assert!(settle(4, knee(16)) > 13.0);
        // A device that thrashes.
        let thrash = settle(64, |depth, _| 1.0 / depth as f64);
        assert!(thrash < 6.0, "{thrash}");
    }

    #[test]
    fn noise_and_a_change_of_the_device_are_borne() {
        // Two in a hundred either way: below the gain asked for.
        let noise = |window: u32| 1.0 + (f64::from(window * 7919 % 101) / 50.0 - 1.0) * 0.02;
        let noisy = settle(16, |_, window| noise(window));
        assert!((14.0..20.0).contains(&noisy), "{noisy}");
        let noisy = settle(16, |depth, window| depth.min(64) as f64 * noise(window));
        assert!(noisy > 50.0, "{noisy}");
        // Slow for a while, then fast again, whatever the depth.
        let moody = settle(16, |_, window| if window / 3 % 2 == 0 { 1.0 } else { 1.5 });
        assert!(moody > 12.0, "{moody}");
        let later = settle(16, |depth, window| match window {
            0..40 => 1.0,
            _ => depth.min(64) as f64,
        });
        assert!(later > 50.0, "{later}");
    }

    #[test]
    fn a_depth_that_was_asked_for_stays() {
        let depth = Depth::new(Some(7), 2, 4 << 20);
        for i in 1..100 {
            depth.arrived(64 << 20, Duration::from_millis(100 * i));
        }
        assert_eq!((depth.total(), depth.share(), depth.max_share()), (7, 4, 4));
        depth.leave();
        assert_eq!(depth.share(), 7, "the last worker has it all");
        depth.leave();
    }

    #[test]
    fn windows_are_closed_by_bytes_and_time() {
        let block = 4 << 20;
        let depth = Depth::new(None, 2, block);
        assert_eq!((depth.total(), depth.share(), depth.max_share()), (32, 16, 32));
        let fly = 32 * block;
        depth.arrived(fly - 1, Duration::from_millis(500));
        depth.arrived(1, Duration::from_millis(600));
        // Too short a time for a rate.
        depth.arrived(fly, Duration::from_millis(601));
        assert_eq!(depth.total(), 32);
        depth.arrived(fly, Duration::from_millis(700));
        assert_eq!(depth.total(), 48, "the first trial");
        assert_eq!(Depth::new(None, 64, 64 << 20).share(), 1, "at least one each");
    }
}
