//! Embeds sentences with MiniLM, once with weights that candle maps and once with weights that fst reads, and
//! fails unless both embeddings are the same to the last bit.
//!
//! ```text
//! tools/minilm     # fetches the model and runs this
//! ```

#![allow(clippy::unwrap_used, reason = "an example")]

use std::path::Path;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert::{BertModel, Config, DTYPE};
use tokenizers::{PaddingParams, Tokenizer};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const SENTENCES: [&str; 4] = [
    "The cat sits outside",
    "A man is playing guitar",
    "The new movie is awesome",
    "A cat plays in the garden",
];

fn main() -> Result<()> {
    let folder = std::env::args().nth(1).ok_or("give the folder of the model")?;
    let folder = Path::new(&folder);
    let config: Config = serde_json::from_slice(&std::fs::read(folder.join("config.json"))?)?;
    let mut tokenizer = Tokenizer::from_file(folder.join("tokenizer.json"))?;
    tokenizer.with_padding(Some(PaddingParams::default())).with_truncation(None)?;
    let weights = folder.join("model.safetensors");

    let began = Instant::now();
    // SAFETY: nobody changes the file meanwhile.
    let vb = unsafe { VarBuilder::from_mmaped_safetensors(&[&weights], DTYPE, &Device::Cpu)? };
    let model = BertModel::load(vb, &config)?;
    println!("candle: model after {:.1?}", began.elapsed());
    let candles = embed(&model, &tokenizer)?;

    let began = Instant::now();
    let vb = fst_candle::var_builder(&weights, DTYPE, &Device::Cpu)?;
    let model = BertModel::load(vb, &config)?;
    println!("fst:    model after {:.1?}", began.elapsed());
    let ours = embed(&model, &tokenizer)?;

    for (index, sentence) in SENTENCES.iter().enumerate().skip(1) {
        let likeness: f32 = ours[0].iter().zip(&ours[index]).map(|(a, b)| a * b).sum();
        println!("{likeness:.3} {:?} {sentence:?}", SENTENCES[0]);
    }
    let bits = |of: &[Vec<f32>]| of.concat().iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    if bits(&ours) != bits(&candles) || ours.concat().iter().any(|value| !value.is_finite()) {
        return Err("the embeddings differ".into());
    }
    println!("{} numbers, the same to the last bit", bits(&ours).len());
    Ok(())
}

/// One vector of length 1 for each sentence: the mean over its tokens.
fn embed(model: &BertModel, tokenizer: &Tokenizer) -> Result<Vec<Vec<f32>>> {
    let tokens = tokenizer.encode_batch(SENTENCES.to_vec(), true)?;
    let rows = |of: &dyn Fn(&tokenizers::Encoding) -> Vec<u32>| {
        let rows = tokens.iter().map(|tokens| Tensor::new(of(tokens), &Device::Cpu));
        Tensor::stack(&rows.collect::<candle_core::Result<Vec<_>>>()?, 0)
    };
    let ids = rows(&|tokens| tokens.get_ids().to_vec())?;
    let mask = rows(&|tokens| tokens.get_attention_mask().to_vec())?;
    let states = model.forward(&ids, &ids.zeros_like()?, Some(&mask))?;
    let mask = mask.to_dtype(DType::F32)?.unsqueeze(2)?;
    let sum = states.broadcast_mul(&mask)?.sum(1)?;
    let mean = sum.broadcast_div(&mask.sum(1)?)?;
    let length = mean.sqr()?.sum_keepdim(1)?.sqrt()?;
    Ok(mean.broadcast_div(&length)?.to_vec2()?)
}
