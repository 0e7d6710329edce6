//! The workloads as data: which checkpoint, which contenders do what on it, and what they are held to.

use crate::contender::{self, CONTENDERS, Contender, Op};
use crate::data::{DataSet, Fill};
use crate::models::{cut, many, odd, published};
use crate::page_cache::CacheState;

/// A contender together with what it loads.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// Who.
    pub contender: &'static Contender,
    /// What.
    pub op: Op,
}

impl Entry {
    /// `name`, or `name/op` for anything but a whole load.
    #[must_use]
    pub fn label(&self) -> String {
        match self.op {
            Op::Load | Op::Ranks | Op::Open => self.contender.name.to_owned(),
            op => format!("{}/{}", self.contender.name, op.name()),
        }
    }
}

/// One workload.
#[derive(Debug, Clone, Copy)]
pub struct Workload {
    /// Name in arguments, tables and records.
    pub name: &'static str,
    /// One line on what it shows.
    pub what: &'static str,
    /// What is timed.
    pub op: Op,
    /// The page-cache states it runs in.
    pub states: &'static [CacheState],
    /// Rounds unless `--rounds` says otherwise; short runs take more.
    pub rounds: usize,
    data: fn() -> DataSet,
}

const BOTH: &[CacheState] = &[CacheState::Cold, CacheState::Warm];
const COLD: &[CacheState] = &[CacheState::Cold];
const WARM: &[CacheState] = &[CacheState::Warm];

/// Every workload of a full run, in the order they run.
pub const WORKLOADS: &[Workload] = &[
    Workload {
        name: "llama",
        what: "llama-2-7b cut to 10 layers, bf16, 3 shards, 4.6 GB",
        op: Op::Load,
        states: BOTH,
        rounds: 5,
        data: llama,
    },
    Workload {
        name: "half-dim0",
        what: "the first half of the rows of every matrix of `llama`",
        op: Op::HalfDim0,
        states: COLD,
        rounds: 5,
        data: llama,
    },
    Workload {
        name: "half-dim1",
        what: "the first half of the columns of every matrix of `llama`",
        op: Op::HalfDim1,
        states: COLD,
        rounds: 5,
        data: llama,
    },
    Workload {
        name: "single",
        what: "llama-2-70b cut to 3 layers, half as wide: bf16, one file of 1.5 GB",
        op: Op::Load,
        states: BOTH,
        rounds: 7,
        data: single,
    },
    Workload {
        name: "moe",
        what: "Qwen3-30B-A3B a quarter as wide: 18,867 tensors, bf16, 2 shards, 3.8 GB",
        op: Op::Load,
        states: BOTH,
        rounds: 5,
        data: || DataSet {
            name: "moe",
            files: cut("qwen3-30b-a3b", usize::MAX, 4, 2),
            fill: Fill::Random,
        },
    },
    Workload {
        name: "gpt2",
        what: "gpt2, f32, one file of 0.5 GB",
        op: Op::Load,
        states: BOTH,
        rounds: 9,
        data: || DataSet { name: "gpt2", files: published("gpt2"), fill: Fill::Random },
    },
    Workload {
        name: "ranks",
        what: "`single` by four ranks; each keeps a quarter of the tall matrices and the rest whole",
        op: Op::Ranks,
        states: COLD,
        rounds: 7,
        data: single,
    },
    Workload {
        name: "open-18867",
        what: "open only: the 18,867 tensors of Qwen3-30B-A3B in 16 shards (headers real, data a hole)",
        op: Op::Open,
        states: WARM,
        rounds: 15,
        data: || DataSet {
            name: "open-18867",
            files: published("qwen3-30b-a3b"),
            fill: Fill::Hole,
        },
    },
    Workload {
        name: "open-100000",
        what: "open only: 100,000 tensors in one file (header real, data a hole)",
        op: Op::Open,
        states: WARM,
        rounds: 15,
        data: || DataSet { name: "open-100000", files: many(100_000), fill: Fill::Hole },
    },
];

/// The same kinds of work on a few megabytes, for `--quick` and the tests.
pub const QUICK: &[Workload] = &[
    Workload {
        name: "quick-llama",
        what: "llama-shaped, bf16, 3 shards, a few megabytes",
        op: Op::Load,
        states: BOTH,
        rounds: 1,
        data: quick_llama,
    },
    Workload {
        name: "quick-half-dim0",
        what: "the first half of the rows of every matrix of `quick-llama`",
        op: Op::HalfDim0,
        states: COLD,
        rounds: 1,
        data: quick_llama,
    },
    Workload {
        name: "quick-half-dim1",
        what: "the first half of the columns of every matrix of `quick-llama`",
        op: Op::HalfDim1,
        states: COLD,
        rounds: 1,
        data: quick_llama,
    },
    Workload {
        name: "quick-ranks",
        what: "`quick-llama` by four ranks",
        op: Op::Ranks,
        states: COLD,
        rounds: 1,
        data: quick_llama,
    },
    Workload {
        name: "quick-odd",
        what: "odd, empty, scalar and unaligned tensors in one file",
        op: Op::Load,
        states: BOTH,
        rounds: 1,
        data: || DataSet { name: "quick-odd", files: odd(), fill: Fill::Random },
    },
    Workload {
        name: "quick-open",
        what: "open only: 2,000 tensors in one file",
        op: Op::Open,
        states: WARM,
        rounds: 1,
        data: || DataSet { name: "quick-open", files: many(2000), fill: Fill::Hole },
    },
];

fn llama() -> DataSet {
    DataSet { name: "llama", files: cut("llama-2-7b", 10, 1, 3), fill: Fill::Random }
}

fn single() -> DataSet {
    DataSet { name: "single", files: cut("llama-2-70b", 3, 2, 1), fill: Fill::Random }
}

fn quick_llama() -> DataSet {
    DataSet { name: "quick-llama", files: cut("llama-2-7b", 4, 16, 3), fill: Fill::Random }
}

impl Workload {
    /// The checkpoint.
    #[must_use]
    pub fn data(&self) -> DataSet {
        (self.data)()
    }

    /// Who takes part in this state. Slicing workloads also run whole loads of those who slice, as the
    /// figure that slices are compared with.
    #[must_use]
    pub fn entries(&self, state: CacheState) -> Vec<Entry> {
        let takes_part =
            |c: &&'static Contender| c.ops.contains(&self.op) && c.states.contains(&state);
        let mut entries = Vec::new();
        for contender in CONTENDERS.iter().filter(takes_part) {
            entries.push(Entry { contender, op: self.op });
            if self.op.halved_dim().is_some() && contender::is_ours(contender) {
                entries.push(Entry { contender, op: Op::Load });
            }
        }
        entries
    }

    /// Bytes of tensor data that a run of `op` must give.
    #[must_use]
    pub fn bytes(&self, op: Op) -> u64 {
        let data = self.data();
        data.tensors().map(|t| op.bytes_of(&t.shape, t.bytes())).sum()
    }

    /// Bytes of memory that a run touches.
    #[must_use]
    pub fn memory(&self, entry: &Entry) -> u64 {
        match entry.contender.name {
            "fst-everyone" => contender::RANKS * self.bytes(Op::Load),
            _ => self.bytes(entry.op),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_what_the_descriptions_say() {
        let size = |name: &str| {
            let found = WORKLOADS.iter().find(|w| w.name == name).unwrap();
            (found.bytes(Op::Load) as f64 / 1e8).round() / 10.0
        };
        assert_eq!(size("llama"), 4.6);
        assert_eq!(size("single"), 1.5);
        assert_eq!(size("moe"), 3.8);
        assert_eq!(size("gpt2"), 0.5);
    }

    #[test]
    fn every_workload_has_a_baseline_to_compare_with() {
        for workload in WORKLOADS.iter().chain(QUICK) {
            for &state in workload.states {
                assert!(!workload.entries(state).is_empty(), "{}", workload.name);
            }
        }
    }
}
