//! Makes a small Llama of random weights, saves it in shards, and generates tokens with it, once with weights
//! that candle maps and once with weights that fst reads; fails unless both are the same.
//!
//! ```text
//! cargo run -p fst-candle --example llama
//! ```

#![allow(clippy::unwrap_used, reason = "an example")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_transformers::generation::LogitsProcessor;
use candle_transformers::models::llama::{Cache, Config, Llama};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let config = Config {
        hidden_size: 256,
        intermediate_size: 688,
        vocab_size: 2000,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        ..Config::config_7b_v2(false)
    };
    let folder = std::env::temp_dir().join(format!("fst-candle-llama-{}", std::process::id()));
    let same = both(&config, &folder);
    let _ = std::fs::remove_dir_all(&folder);
    same
}

fn both(config: &Config, folder: &Path) -> Result<()> {
    // candle makes the weights as the model asks for them.
    let variables = VarMap::new();
    Llama::load(VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu), config)?;
    let variables = variables.data().lock().map_err(|_| "a thread panicked")?.clone();
    let half = |(name, var): (String, candle_core::Var)| {
        Ok::<_, candle_core::Error>((name, var.as_tensor().to_dtype(DType::BF16)?))
    };
    let tensors: HashMap<String, Tensor> =
        variables.into_iter().map(half).collect::<candle_core::Result<_>>()?;
    fst_candle::Save::new().shard_bytes(1 << 20).write(&tensors, folder)?;

    let mut files: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        files.push(entry?.path());
    }
    files.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    println!("{} tensors in {} files", tensors.len(), files.len());
    for dtype in [DType::F32, DType::BF16] {
        // SAFETY: nobody changes the files meanwhile.
        let mapped = unsafe { VarBuilder::from_mmaped_safetensors(&files, dtype, &Device::Cpu)? };
        let candles = generate(&Llama::load(mapped, config)?, config, dtype)?;
        let read = fst_candle::var_builder(folder, dtype, &Device::Cpu)?;
        let ours = generate(&Llama::load(read, config)?, config, dtype)?;
        println!("{}: {ours:?}", dtype.as_str());
        if ours != candles {
            return Err(format!("candle's weights give {candles:?}").into());
        }
    }
    println!("the same tokens");
    Ok(())
}

/// The tokens that follow a beginning.
fn generate(model: &Llama, config: &Config, dtype: DType) -> Result<Vec<u32>> {
    let mut cache = Cache::new(true, dtype, config, &Device::Cpu)?;
    let mut sampler = LogitsProcessor::new(7, Some(0.8), Some(0.95));
    let mut tokens = vec![1u32, 15, 300, 1999];
    let mut done = 0;
    while tokens.len() < 24 {
        let input = Tensor::new(&tokens[done..], &Device::Cpu)?.unsqueeze(0)?;
        let logits = model.forward(&input, done, &mut cache)?.squeeze(0)?;
        done = tokens.len();
        tokens.push(sampler.sample(&logits)?);
    }
    Ok(tokens)
}
