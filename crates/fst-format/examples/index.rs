//! Writes an index of checkpoints by their headers alone: name, type, shape, file and range of each tensor, as
//! lines of tab-separated text. No tensor is read.
//!
//! `cargo run -p fst-format --example index -- model/ other.safetensors`

use std::io::Write;

use fst_format::Checkpoint;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    for path in std::env::args_os().skip(1) {
        let checkpoint = Checkpoint::open(path)?;
        for tensor in checkpoint.tensors() {
            let file = checkpoint.shards()[tensor.shard()].path().display();
            let range = tensor.file_range();
            writeln!(
                out,
                "{}\t{}\t{:?}\t{file}\t{}\t{}",
                tensor.name(),
                tensor.dtype(),
                tensor.shape(),
                range.start,
                range.end
            )?;
        }
    }
    Ok(out.flush()?)
}
