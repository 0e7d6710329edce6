//! Sums the 64-bit words of files, modulo 2^64, at the rate of the storage: blocks are read around the page cache,
//! many at a time, into memory that is used again.
//!
//! `cargo run -p fst-io --example sum -- FILE...`

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use fst_io::plan::{Block, Limits, ReadPlan};
use fst_io::scratch::Scratch;
use fst_io::{Control, Error, Extent, ReadOptions, SourceFile};

fn main() -> Result<(), Error> {
    for path in std::env::args_os().skip(1) {
        let files = [SourceFile::open(path.as_ref(), None)?];
        let limits = Limits { align: files[0].align(), ..Limits::default() };
        let plan = ReadPlan::new(vec![Extent::new(0, 0..files[0].len())], limits)?;
        let sum = AtomicU64::new(0);
        // Called by reader threads, with the bytes of one block each. Blocks start at multiples of a page.
        let take = |_: &Block, bytes: &[u8]| {
            let word = |bytes: &[u8]| {
                let mut word = [0; 8];
                word[..bytes.len()].copy_from_slice(bytes);
                u64::from_le_bytes(word)
            };
            let part = bytes.chunks(8).map(word).fold(0, u64::wrapping_add);
            sum.fetch_add(part, Relaxed);
            Ok(())
        };
        let sink = Scratch::new(&plan, 8, &|_, _| Ok(true), &take)?;
        let stats = fst_io::read(&files, &plan, &sink, &ReadOptions::default(), &Control::new())?;
        let rate = stats.bytes_read as f64 / 1e9 / stats.seconds;
        println!("{:016x}  {}  {rate:.1} GB/s", sum.into_inner(), files[0].path().display());
    }
    Ok(())
}
