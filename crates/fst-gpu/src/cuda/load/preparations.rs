//! When a load made what it needs, beside its copies and in front of them.

use std::sync::{Mutex, OnceLock};
use std::time::Instant;

use crate::device_copy::{DeviceCopy, Preparation};

/// The times of a load's preparations, from any thread.
#[derive(Debug)]
pub(super) struct Preparations {
    began: Instant,
    /// Name, start and end.
    spans: Mutex<Vec<(&'static str, Instant, Instant)>>,
    first_block: OnceLock<Instant>,
}

impl Preparations {
    pub(super) fn begin() -> Self {
        Self { began: Instant::now(), spans: Mutex::default(), first_block: OnceLock::new() }
    }

    /// Does something and takes the time.
    pub(super) fn time<T>(&self, name: &'static str, work: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let result = work();
        self.add(name, began, Instant::now());
        result
    }

    pub(super) fn add(&self, name: &'static str, began: Instant, ended: Instant) {
        self.spans.lock().unwrap_or_else(|e| e.into_inner()).push((name, began, ended));
    }

    /// A block is there to be copied.
    pub(super) fn block(&self) {
        self.first_block.get_or_init(Instant::now);
    }

    /// Says in the report what there was.
    pub(super) fn report(&self, copy: &mut DeviceCopy) {
        let since = |at: Instant| at.saturating_duration_since(self.began);
        let first = self.first_block.get().copied();
        copy.first_block = first.map(|at| since(at).as_secs_f64());
        let mut spans = self.spans.lock().unwrap_or_else(|e| e.into_inner()).clone();
        spans.sort_by_key(|(_, began, _)| *began);
        for (name, began, ended) in spans {
            let took = |until: Instant| until.saturating_duration_since(began).as_secs_f64();
            let ahead = took(first.map_or(ended, |first| first.min(ended)));
            match copy.preparations.iter_mut().find(|known| known.name == name) {
                Some(known) => {
                    known.seconds += took(ended);
                    known.ahead += ahead;
                }
                None => copy.preparations.push(Preparation {
                    name,
                    began: since(began).as_secs_f64(),
                    seconds: took(ended),
                    ahead,
                }),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn what_lies_behind_the_first_block_is_not_ahead_of_it() {
        let preparations = Preparations::begin();
        let at = |ms| preparations.began + Duration::from_millis(ms);
        preparations.add("read.pin", at(30), at(70));
        preparations.add("read.pin", at(10), at(20));
        preparations.add("read.kernels", at(60), at(90));
        preparations.first_block.set(at(50)).unwrap();
        let mut copy = DeviceCopy::default();
        preparations.report(&mut copy);
        let found = copy
            .preparations
            .iter()
            .map(|p| (p.name, [p.began, p.seconds, p.ahead].map(|s| (s * 1000.0).round())));
        assert_eq!(
            found.collect::<Vec<_>>(),
            [("read.pin", [10.0, 50.0, 30.0]), ("read.kernels", [60.0, 30.0, 0.0])]
        );
        assert_eq!(copy.first_block, Some(0.05));
    }
}
