//! What the official reader's tensors of a llama checkpoint come to when they are cut by rank, slowly
//! and obviously.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::SafeTensors;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::fixture::names_in;

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The sum of every rank's shard of every tensor, by rank and name, as `fst sum --json` gives it.
pub(crate) fn sums_of_slices(path: &Path, world: usize) -> BTreeMap<(usize, String), Value> {
    let mut expected: BTreeMap<(usize, String), Value> = BTreeMap::new();
    for file in names_in(path).iter().filter(|name| name.ends_with(".safetensors")) {
        let bytes = std::fs::read(path.join(file)).unwrap();
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let size = view.dtype().bitsize() / 8;
            let is = |parts: &[&str]| parts.iter().any(|part| name.contains(part));
            for rank in 0..world {
                let mut shape = view.shape().to_vec();
                let rows = |from: usize, to: usize, width: usize| {
                    let row = |row: usize| (row * width * size, (row + 1) * width * size);
                    view.data()[row(from).0..row(to - 1).1].to_vec()
                };
                let bytes = if is(&["embed_tokens", "lm_head"]) {
                    let each = shape[0].next_multiple_of(64).div_ceil(world);
                    let (from, to) = (rank * each, ((rank + 1) * each).min(shape[0]));
                    let mut bytes = rows(from, to, shape[1]);
                    bytes.resize(each * shape[1] * size, 0);
                    shape[0] = each;
                    bytes
                } else if is(&["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]) {
                    let each = shape[0].div_ceil(world);
                    let (from, to) = (rank * each, ((rank + 1) * each).min(shape[0]));
                    shape[0] = to - from;
                    rows(from, to, shape[1])
                } else if is(&["o_proj", "down_proj"]) {
                    let each = shape[1].div_ceil(world);
                    let (from, to) = (rank * each, ((rank + 1) * each).min(shape[1]));
                    let row = |row: &[u8]| row[from * size..to * size].to_vec();
                    let bytes = view.data().chunks_exact(shape[1] * size).flat_map(row).collect();
                    shape[1] = to - from;
                    bytes
                } else {
                    view.data().to_vec()
                };
                let sum = json!({
                    "rank": rank, "name": name, "dtype": view.dtype().to_string(),
                    "shape": shape, "sha256": sha256(&bytes),
                });
                expected.insert((rank, name.clone()), sum);
            }
        }
    }
    expected
}
