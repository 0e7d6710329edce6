//! The trace-event format of `chrome://tracing`, which Perfetto (<https://ui.perfetto.dev>) reads.
//!
//! Reads of one worker overlap, and slices of one track must not: each worker has as many tracks as
//! it had reads in flight at once.

use std::collections::BTreeMap;
use std::time::Duration;

use fst::LoadReport;
use fst::io::stats::{Event, Stage};
use serde_json::{Value, json};

/// Tracks of different workers are this far apart, so that they sort by worker.
const TRACKS: u64 = 1000;

/// The track of the load's stages, in front of the workers'.
const STAGES: u64 = 0;

fn microseconds(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1e3
}

fn named(track: u64, name: &str) -> [Value; 2] {
    [
        json!({"ph": "M", "pid": 1, "tid": track, "name": "thread_name", "args": {"name": name}}),
        json!({"ph": "M", "pid": 1, "tid": track, "name": "thread_sort_index",
               "args": {"sort_index": track}}),
    ]
}

/// For each event, the first of its worker's tracks that is free when it starts. The events are in
/// the order of their start.
pub(crate) fn lanes(events: &[Event]) -> Vec<usize> {
    let mut busy_until: BTreeMap<u32, Vec<Duration>> = BTreeMap::new();
    let lane = |event: &Event| {
        let lanes = busy_until.entry(event.worker).or_default();
        let end = event.start + event.duration;
        match lanes.iter().position(|until| *until <= event.start) {
            Some(lane) => {
                lanes[lane] = end;
                lane
            }
            None => {
                lanes.push(end);
                lanes.len() - 1
            }
        }
    };
    events.iter().map(lane).collect()
}

/// What a block's way is called in the trace.
pub(crate) fn way(stage: Stage) -> &'static str {
    match stage {
        Stage::Direct => "read direct",
        Stage::Cached => "copy cached",
        Stage::Buffered => "read buffered",
        Stage::Mapped => "copy mapped",
        Stage::Remote => "read remote",
        other => other.as_str(),
    }
}

/// The trace as one JSON document.
pub(crate) fn json(report: &LoadReport) -> String {
    let mut out = vec![json!({
        "ph": "M", "pid": 1, "name": "process_name", "args": {"name": "fst load"},
    })];
    out.extend(named(STAGES, "stages"));
    let mut began = 0.0;
    for stage in report.stages.iter().filter(|stage| stage.part_of().is_none()) {
        out.push(json!({
            "ph": "X", "pid": 1, "tid": STAGES, "cat": "stage", "name": stage.name,
            "ts": began * 1e6, "dur": stage.seconds * 1e6, "args": {"bytes": stage.bytes},
        }));
        began += stage.seconds;
    }
    let lanes = lanes(&report.events);
    let mut tracks = BTreeMap::new();
    for (event, lane) in report.events.iter().zip(lanes) {
        let track = (u64::from(event.worker) + 1) * TRACKS + lane as u64;
        tracks.insert(track, format!("worker {} slot {lane}", event.worker));
        let file = report.files.get(event.file as usize);
        out.push(json!({
            "ph": "X", "pid": 1, "tid": track, "cat": "read", "name": way(event.stage),
            "ts": microseconds(event.start), "dur": microseconds(event.duration),
            "args": {
                "file": file.map(|path| path.display().to_string()),
                "offset": event.offset,
                "bytes": event.bytes,
            },
        }));
    }
    for (track, name) in tracks {
        out.extend(named(track, &name));
    }
    json!({
        "displayTimeUnit": "ms",
        "otherData": {
            "bytes": report.bytes, "seconds": report.seconds,
            "engine": report.engine.used.as_str(), "reason": report.engine.reason,
        },
        "traceEvents": out,
    })
    .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_that_overlap_have_tracks_of_their_own() {
        let event = |worker, start, duration| Event {
            worker,
            stage: Stage::Direct,
            file: 0,
            offset: 0,
            bytes: 1,
            start: Duration::from_millis(start),
            duration: Duration::from_millis(duration),
        };
        let events = [
            event(0, 0, 10),
            event(0, 1, 3),
            event(1, 2, 5),
            event(0, 4, 1),
            event(0, 9, 9),
            event(0, 10, 1),
        ];
        assert_eq!(lanes(&events), [0, 1, 0, 1, 1, 0]);
    }
}
