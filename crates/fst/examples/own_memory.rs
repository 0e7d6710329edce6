//! Loads into memory of the program's own: a vector of `f32` for each tensor, made ahead and handed back by the
//! thread that read the last of it, where it is quantised before others arrive.
//!
//! `cargo run -p fst-loader --example own_memory -- model/`

use std::sync::Mutex;

use fst::{Checkpoint, Dtype, Loader};

/// One byte an element, and what to multiply it by.
struct Quantised {
    name: String,
    scale: f32,
    elements: Vec<i8>,
}

fn main() -> fst::Result<()> {
    let Some(path) = std::env::args_os().nth(1) else {
        eprintln!("usage: own_memory CHECKPOINT");
        std::process::exit(2);
    };
    let checkpoint = Checkpoint::open(path)?;
    let model = Mutex::new(Vec::new());
    let report = Loader::new().dtype(Dtype::F32).load_owned(
        &checkpoint,
        |tensor| Vec::<f32>::with_capacity(tensor.shape().iter().product()),
        |tensor, filled| {
            let elements = filled.into_vec();
            let most = elements.iter().fold(0f32, |most, element| most.max(element.abs()));
            let scale = if most > 0.0 { most / 127.0 } else { 1.0 };
            let elements = elements.iter().map(|element| (element / scale) as i8).collect();
            let quantised = Quantised { name: tensor.name().to_owned(), scale, elements };
            model.lock().unwrap_or_else(|e| e.into_inner()).push(quantised);
        },
    )?;
    let model = model.into_inner().unwrap_or_else(|e| e.into_inner());
    let bytes: usize = model.iter().map(|tensor| tensor.elements.len()).sum();
    println!("{} bytes read, {bytes} kept", report.bytes_read);
    if let Some(Quantised { name, scale, .. }) = model.first() {
        println!("{name} x {scale}");
    }
    Ok(())
}
