//! Measures how long it takes from opening a Llama-shaped checkpoint to the model that candle-transformers
//! makes of it, by candle's memory-mapping `VarBuilder` and by this crate's, in turns, each in a process of
//! its own; and what it takes of processor time and memory.
//!
//! ```text
//! cargo run --release -p fst-candle --example construct -- MODEL_FOLDER [RUNS]
//! ```

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "an example")]

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use candle_transformers::models::llama::{Config, Llama};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["measure", loader, dtype, folder] => measure(loader, dtype.parse()?, Path::new(folder)),
        [folder] => compare(Path::new(folder), 7),
        [folder, runs] => compare(Path::new(folder), runs.parse()?),
        _ => Err("give the folder of a Llama-shaped checkpoint, and how many times to run".into()),
    }
}

/// The files of a checkpoint.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder)?.collect::<std::io::Result<Vec<_>>>()?;
    let mut paths: Vec<PathBuf> = entries.into_iter().map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|e| e == "safetensors"));
    paths.sort();
    Ok(paths)
}

/// The model's dimensions, by its tensors.
fn config(folder: &Path) -> Result<Config> {
    let checkpoint = fst::Checkpoint::open(folder)?;
    let shape =
        |name: &str| checkpoint.get(name).map(fst::TensorInfo::shape).ok_or(name.to_owned());
    let embedding = shape("model.embed_tokens.weight")?;
    let layer = |layer: usize| format!("model.layers.{layer}.input_layernorm.weight");
    let layers = (0..).find(|index| checkpoint.get(&layer(*index)).is_none()).unwrap_or(0);
    let heads = embedding[1] / 128;
    Ok(Config {
        hidden_size: embedding[1],
        vocab_size: embedding[0],
        intermediate_size: shape("model.layers.0.mlp.gate_proj.weight")?[0],
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: shape("model.layers.0.self_attn.k_proj.weight")?[0] / 128,
        ..Config::config_7b_v2(false)
    })
}

/// Builds the model once, and prints seconds, processor seconds and the largest resident set in bytes.
fn measure(loader: &str, dtype: DType, folder: &Path) -> Result<()> {
    let (config, files) = (config(folder)?, files(folder)?);
    let cpu = processor_seconds();
    let began = Instant::now();
    let vb = match loader {
        // SAFETY: nobody changes the files meanwhile.
        "candle" => unsafe { VarBuilder::from_mmaped_safetensors(&files, dtype, &Device::Cpu)? },
        "fst" => fst_candle::var_builder(folder, dtype, &Device::Cpu)?,
        _ => return Err("unknown loader".into()),
    };
    let model = Llama::load(vb, &config)?;
    let took = began.elapsed().as_secs_f64();
    println!("{took} {} {}", processor_seconds() - cpu, peak()?);
    std::mem::forget(model);
    Ok(())
}

/// User and system time of this process.
fn processor_seconds() -> f64 {
    // SAFETY: the structure is plain numbers, and the call only writes to it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// The largest resident set of this process, mapped files included.
fn peak() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.ok_or("no VmHWM")?.trim().trim_end_matches(" kB");
    Ok(kib.parse::<u64>()? * 1024)
}

/// Drops what the page cache holds of the files, or reads them into it.
fn put(files: &[PathBuf], cold: bool) -> Result<()> {
    use std::os::fd::AsRawFd;
    for path in files {
        let mut file = std::fs::File::open(path)?;
        if cold {
            file.sync_all()?;
            // SAFETY: a call with a descriptor that is open.
            unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        } else {
            std::io::copy(&mut file, &mut std::io::sink())?;
        }
    }
    Ok(())
}

fn compare(folder: &Path, runs: usize) -> Result<()> {
    let files = files(folder)?;
    let bytes: u64 = files.iter().map(|path| path.metadata().map_or(0, |m| m.len())).sum();
    println!(
        "{:.0} MB in {} files; medians of {runs} runs in turns",
        bytes as f64 / 1e6,
        files.len()
    );
    println!("state dtype loader  seconds  cpu s  peak MB");
    for cold in [false, true] {
        for dtype in ["bf16", "f32"] {
            let mut all = [const { Vec::new() }; 2];
            // The first turn is not counted.
            for turn in 0..=runs {
                for (loader, found) in ["candle", "fst"].iter().zip(&mut all) {
                    put(&files, cold)?;
                    let mut child = Command::new(std::env::current_exe()?);
                    let output = child.args(["measure", loader, dtype]).arg(folder).output()?;
                    let text = String::from_utf8(output.stdout)?;
                    let numbers = text.split_whitespace().map(str::parse::<f64>);
                    let numbers = numbers.collect::<std::result::Result<Vec<_>, _>>()?;
                    let numbers: [f64; 3] = numbers.try_into().map_err(|_| {
                        format!("{loader}: {}", String::from_utf8_lossy(&output.stderr))
                    })?;
                    if turn > 0 {
                        found.push(numbers);
                    }
                }
            }
            let state = if cold { "cold" } else { "warm" };
            let medians = all.map(|found| [0, 1, 2].map(|of| median(&found, of)));
            for (loader, [seconds, cpu, peak]) in ["candle", "fst"].iter().zip(medians) {
                println!(
                    "{state:5} {dtype:5} {loader:7} {seconds:7.3} {cpu:6.3} {:8.0}",
                    peak / 1e6
                );
            }
            let [candle, ours] = medians;
            let ratio = [0, 1, 2].map(|of| candle[of] / ours[of]);
            println!(
                "{state:5} {dtype:5} candle is {:.2} times as long, {:.2} cpu, {:.2} peak",
                ratio[0], ratio[1], ratio[2]
            );
        }
    }
    Ok(())
}

fn median(of: &[[f64; 3]], which: usize) -> f64 {
    let mut values: Vec<f64> = of.iter().map(|numbers| numbers[which]).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
