//! What a load to a device waits for, on the simulated driver's clock: the time to the first copy, the time
//! until all is there, and the share of the link that this is.
//!
//! `cargo bench -p fst-benches --bench device-sim -- [--scale N] [--spans]`
//!
//! Driver calls and copies cost what the table in `tests/cuda-sim/src/clock.rs` says, reading and planning
//! what they cost here. A simulated second takes N real ones (8 unless told otherwise), so that two cores
//! stand for sixteen where a load reads in parallel; what it does on one core looks N times as fast as it
//! is, and `--scale 1` shows that. Files are sparse, on a tmpfs, and copies move nothing: no memory is
//! needed. The figures find what stands in the way; they are no claim about hardware.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Result;
use cuda_sim::{Report, Sim};
use fst::{Checkpoint, Device, Dtype, Loader};
use serde_json::{Map, json};

/// A checkpoint of equal BF16 tensors, and how it is loaded.
struct Case {
    name: &'static str,
    tensors: usize,
    /// Bytes of a tensor.
    len: u64,
    dtype: Option<Dtype>,
    /// The driver has a call for many copies.
    batch: bool,
}

const CASES: [Case; 4] = [
    Case { name: "8.6 GB, 256 tensors", tensors: 256, len: 32 << 20, dtype: None, batch: true },
    Case {
        name: "18,867 tensors of 64 KiB",
        tensors: 18_867,
        len: 64 << 10,
        dtype: None,
        batch: true,
    },
    Case {
        name: "the same, no call for many copies",
        tensors: 18_867,
        len: 64 << 10,
        dtype: None,
        batch: false,
    },
    Case {
        name: "2.1 GB to F32",
        tensors: 64,
        len: 32 << 20,
        dtype: Some(Dtype::F32),
        batch: true,
    },
];

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let after = |name: &str| args.iter().skip_while(|arg| *arg != name).nth(1);
    let scale: f64 = after("--scale").map_or(Ok(8.0), |text| text.parse())?;
    let spans = args.iter().any(|arg| arg == "--spans");
    println!("a simulated second takes {scale} real ones; ms of simulated time");
    println!(
        "{:34} {:6} {:>10} {:>10} {:>10} {:>6}",
        "", "load", "first copy", "all there", "link alone", "share"
    );
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir())?;
    for case in &CASES {
        let path = write(case, folder.path())?;
        run(case, &path, scale, spans)?;
        std::fs::remove_file(path)?;
    }
    Ok(())
}

/// Writes the header; the tensors are a hole.
fn write(case: &Case, folder: &Path) -> Result<PathBuf> {
    let mut header = Map::new();
    for index in 0..case.tensors as u64 {
        let offsets = [index * case.len, (index + 1) * case.len];
        let info = json!({"dtype": "BF16", "shape": [case.len / 2], "data_offsets": offsets});
        header.insert(format!("model.layers.{index}.weight"), info);
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let path = folder.join("model.safetensors");
    let mut file = File::create(&path)?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    file.set_len(8 + header.len() as u64 + case.tensors as u64 * case.len)?;
    Ok(path)
}

/// The first load of a process and the second, with pinned memory kept in between.
fn run(case: &Case, path: &Path, scale: f64, spans: bool) -> Result<()> {
    let sim = Sim::load()?.exclusive(1, 80 << 30);
    sim.add_kernels(fst_cuda_sim_kernels::LIBRARY.as_ref());
    sim.set("discard", 1);
    sim.set("batch_copies", case.batch.into());
    if !case.batch {
        // A device that the call for many copies would not do for.
        sim.set("host_pointers", 0);
    }
    let device = Device::cuda(0)?;
    let mut loader = Loader::new().device(device).keep_pinned(true);
    if let Some(dtype) = case.dtype {
        loader = loader.dtype(dtype);
    }
    for load in ["first", "second"] {
        sim.run_clock(scale);
        let checkpoint = Checkpoint::open(path)?;
        let began = sim.report().clock_ns;
        let tensors = loader.load(&checkpoint)?;
        let report = sim.report();
        let bytes = tensors.report().bytes_read;
        drop(tensors);
        print(case, load, began, &report, bytes);
        if spans {
            print_spans(began, &report);
        }
        sim.run_clock(0.0);
    }
    drop(loader);
    fst::gpu::release_kept();
    Ok(())
}

fn ms(ns: u64) -> f64 {
    ns as f64 / 1e6
}

fn print(case: &Case, load: &str, began: u64, report: &Report, bytes: u64) {
    let took = report.clock_ns - began;
    let link = report.link_busy_ns;
    println!(
        "{:34} {load:6} {:10.2} {:10.2} {:10.2} {:6.3}  {:.1} GB/s",
        case.name,
        ms(report.first_copy_ns.saturating_sub(began)),
        ms(took),
        ms(link),
        link as f64 / took as f64,
        bytes as f64 / took as f64,
    );
}

/// The long calls of a load, those of the same thread and name in a row together.
fn print_spans(began: u64, report: &Report) {
    let mut spans: Vec<(&str, &str, u64, u64, u64, usize)> = Vec::new();
    for span in &report.spans {
        let took = span.ended - span.began;
        let same =
            |s: &&mut (&str, &str, u64, u64, u64, usize)| s.0 == span.call && s.1 == span.thread;
        match spans.iter_mut().find(same) {
            Some(s) => (s.3, s.4, s.5) = (span.ended, s.4 + took, s.5 + 1),
            None => spans.push((&span.call, &span.thread, span.began, span.ended, took, 1)),
        }
    }
    println!(
        "    {:24} {:16} {:>6} {:>8} {:>8} {:>8}",
        "call", "thread", "times", "ms", "from", "to"
    );
    for (call, thread, first, last, took, times) in spans {
        let since = |at: u64| ms(at) - ms(began);
        println!(
            "    {call:24} {thread:16} {times:6} {:8.2} {:8.2} {:8.2}",
            ms(took),
            since(first),
            since(last)
        );
    }
}
