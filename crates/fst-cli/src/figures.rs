//! What a load did, as `load --json` tells it: the same figures for one loader, for each rank of
//! several, and for all ranks together.

use std::fmt;

use fst::{CachedCopy, DeviceCopy, Tensors};
use serde::de::{MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The figures of a load. They travel between processes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Figures {
    pub(crate) tensors: usize,
    /// Bytes of the tensors as they are loaded.
    pub(crate) bytes: u64,
    /// From opening the first file to the last tensor usable.
    pub(crate) seconds: f64,
    /// `bytes` made usable per second; of a mapping, no rate of any storage.
    pub(crate) gb_per_s: f64,
    pub(crate) engine: String,
    pub(crate) device: String,
    pub(crate) stages: Stages,
    pub(crate) engine_asked: String,
    pub(crate) engine_reason: String,
    /// Bytes wanted from the files, and read from them with the gaps that were read over.
    pub(crate) bytes_asked: u64,
    pub(crate) bytes_read: u64,
    /// Those of `bytes` that are a mapping's and were not read.
    pub(crate) mapped_bytes: u64,
    /// Bytes of the files in the page cache before; null where the system does not tell.
    pub(crate) resident_bytes: Option<u64>,
    /// Bytes of the files that were used.
    pub(crate) file_bytes: u64,
    pub(crate) workers: usize,
    pub(crate) depth: usize,
    pub(crate) block_bytes: u64,
    /// How bytes got to a device; null on the host, and where ranks traded them.
    pub(crate) device_copy: Option<CopyFigures>,
    /// How fast fresh host memory came; null where nobody looked.
    pub(crate) first_touch: Option<TouchFigures>,
    /// What requests came to; null where all files are local.
    pub(crate) remote: Option<RemoteFigures>,
}

/// What requests for what is not local came to, from opening the checkpoint on; of ranks of one process, those
/// of all of them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RemoteFigures {
    pub(crate) endpoints: Vec<String>,
    pub(crate) requests: u64,
    pub(crate) retries: u64,
    /// Answers that asked for patience.
    pub(crate) throttled: u64,
    pub(crate) received_bytes: u64,
    /// Those of them that had come before.
    pub(crate) repeated_bytes: u64,
    /// Until a request was answered: half of them, and 99 of 100.
    pub(crate) first_byte_p50_seconds: f64,
    pub(crate) first_byte_p99_seconds: f64,
}

/// Rates of one thread's first touch of fresh memory.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct TouchFigures {
    pub(crate) huge_gb_per_s: f64,
    /// Null where small pages were not tried.
    pub(crate) small_gb_per_s: Option<f64>,
    pub(crate) takes_small: bool,
    /// Whether few huge pages were free.
    pub(crate) scarce: bool,
}

/// Which way bytes took to a device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct CopyFigures {
    pub(crate) asked: String,
    pub(crate) reason: String,
    pub(crate) registered_bytes: u64,
    pub(crate) staged_bytes: u64,
    /// Rates that were measured, if they were.
    pub(crate) registered_gb_per_s: Option<f64>,
    pub(crate) staged_gb_per_s: Option<f64>,
    /// Why the driver refused to register mappings, if it did.
    pub(crate) refused: Option<String>,
}

/// What one part of a load took.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct StageFigures {
    pub(crate) seconds: f64,
    pub(crate) bytes: u64,
}

/// The stages by name, in the order in which they happened: an object.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stages(Vec<(String, StageFigures)>);

impl Figures {
    pub(crate) fn of(tensors: &Tensors) -> Self {
        let report = tensors.report();
        let stages = report.stages.iter().map(|stage| {
            let figures = StageFigures { seconds: stage.seconds, bytes: stage.bytes };
            (stage.name.to_owned(), figures)
        });
        let mapped = tensors.iter().filter(|tensor| tensor.is_mapped());
        Self {
            tensors: report.tensors,
            bytes: report.bytes,
            seconds: report.seconds,
            gb_per_s: report.gb_per_s(),
            engine: report.engine.used.as_str().to_owned(),
            device: report.device.to_string(),
            stages: Stages(stages.collect()),
            engine_asked: report.engine.asked.as_str().to_owned(),
            engine_reason: report.engine.reason.clone(),
            bytes_asked: report.bytes_asked,
            bytes_read: report.bytes_read,
            mapped_bytes: mapped.map(|tensor| tensor.byte_len() as u64).sum(),
            resident_bytes: report.resident_bytes,
            file_bytes: report.file_bytes,
            workers: report.workers,
            depth: report.depth,
            block_bytes: report.block_bytes,
            device_copy: report.device_copy.as_ref().map(CopyFigures::of),
            first_touch: report.first_touch.map(|touch| TouchFigures {
                huge_gb_per_s: touch.huge / 1e9,
                small_gb_per_s: touch.small.map(|rate| rate / 1e9),
                takes_small: touch.takes_small,
                scarce: touch.scarce,
            }),
            remote: report.remote.as_ref().map(|remote| RemoteFigures {
                endpoints: remote.endpoints.clone(),
                requests: remote.requests,
                retries: remote.retries,
                throttled: remote.throttled,
                received_bytes: remote.received_bytes,
                repeated_bytes: remote.repeated_bytes,
                first_byte_p50_seconds: remote.first_byte_p50.as_secs_f64(),
                first_byte_p99_seconds: remote.first_byte_p99.as_secs_f64(),
            }),
        }
    }

    /// The figures of several ranks: sums of what they did, and of all else those of the slowest.
    /// `None` where there are no ranks.
    pub(crate) fn of_all<'f>(ranks: impl Iterator<Item = &'f Self> + Clone) -> Option<Self> {
        let slowest = ranks.clone().max_by(|a, b| a.seconds.total_cmp(&b.seconds))?;
        let sum = |of: fn(&Self) -> u64| ranks.clone().map(of).sum::<u64>();
        let bytes = sum(|rank| rank.bytes);
        let mut devices: Vec<&str> = Vec::new();
        for rank in ranks.clone() {
            if !devices.contains(&rank.device.as_str()) {
                devices.push(&rank.device);
            }
        }
        Some(Self {
            tensors: ranks.clone().map(|rank| rank.tensors).sum(),
            bytes,
            gb_per_s: if slowest.seconds > 0.0 {
                bytes as f64 / slowest.seconds / 1e9
            } else {
                0.0
            },
            device: devices.join(","),
            bytes_asked: sum(|rank| rank.bytes_asked),
            bytes_read: sum(|rank| rank.bytes_read),
            mapped_bytes: sum(|rank| rank.mapped_bytes),
            ..slowest.clone()
        })
    }
}

impl CopyFigures {
    fn of(copy: &DeviceCopy) -> Self {
        Self {
            asked: cached_copy_name(copy.asked).to_owned(),
            reason: copy.reason.clone(),
            registered_bytes: copy.registered_bytes,
            staged_bytes: copy.staged_bytes,
            registered_gb_per_s: copy.registered_rate.map(|rate| rate / 1e9),
            staged_gb_per_s: copy.staged_rate.map(|rate| rate / 1e9),
            refused: copy.refused.clone(),
        }
    }
}

/// The ways that `--cached-copy` knows.
const CACHED_COPIES: [(&str, CachedCopy); 4] = [
    ("auto", CachedCopy::Auto),
    ("measured", CachedCopy::Measured),
    ("registered", CachedCopy::Registered),
    ("staged", CachedCopy::Staged),
];

fn cached_copy_name(way: CachedCopy) -> &'static str {
    CACHED_COPIES.iter().find(|(_, known)| *known == way).map_or("other", |(name, _)| name)
}

/// A way by its name.
pub(crate) fn parse_cached_copy(name: &str) -> Result<CachedCopy, String> {
    let names = || CACHED_COPIES.map(|(name, _)| name).join(", ");
    let found = CACHED_COPIES.iter().find(|(known, _)| *known == name);
    found.map(|(_, way)| *way).ok_or_else(|| format!("expected one of {}", names()))
}

impl Serialize for Stages {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, figures) in &self.0 {
            map.serialize_entry(name, figures)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Stages {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;

        impl<'de> Visitor<'de> for InOrder {
            type Value = Stages;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("stages by name")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Stages, M::Error> {
                let mut stages = Vec::new();
                while let Some(stage) = map.next_entry()? {
                    stages.push(stage);
                }
                Ok(Stages(stages))
            }
        }

        deserializer.deserialize_map(InOrder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_travel_in_order() {
        let stage = |name: &str, bytes| (name.to_owned(), StageFigures { seconds: 0.5, bytes });
        let stages = Stages(vec![stage("read", 3), stage("open", 0), stage("convert", 7)]);
        let json = serde_json::to_string(&stages).unwrap();
        assert!(json.starts_with(r#"{"read":{"seconds":0.5,"bytes":3},"open":"#), "{json}");
        assert_eq!(serde_json::from_str::<Stages>(&json).unwrap(), stages);
    }

    #[test]
    fn ways_have_names() {
        for (name, way) in CACHED_COPIES {
            assert_eq!((parse_cached_copy(name), cached_copy_name(way)), (Ok(way), name));
        }
        assert!(parse_cached_copy("direct").unwrap_err().contains("registered, staged"));
    }
}
