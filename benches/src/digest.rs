//! One digest over everything a load yields, so that contenders can be held to the same bytes.
//!
//! sha256 over the tensors in order of name: name, `0x00`, number of dimensions and each dimension as
//! little-endian `u64`, number of bytes likewise, the bytes. `peers/load.py` computes the same.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};

/// Collects tensors in any order and hashes them in order of name.
#[derive(Debug, Default)]
pub struct TensorDigest {
    tensors: BTreeMap<String, [u8; 32]>,
}

impl TensorDigest {
    /// Adds one tensor; `data` is empty for runs that only open a checkpoint.
    pub fn add(&mut self, name: &str, shape: &[usize], data: &[u8]) {
        let mut hash = Sha256::new();
        hash.update(name.as_bytes());
        hash.update([0]);
        hash.update((shape.len() as u64).to_le_bytes());
        for &dim in shape {
            hash.update((dim as u64).to_le_bytes());
        }
        hash.update((data.len() as u64).to_le_bytes());
        hash.update(data);
        self.tensors.insert(name.to_owned(), hash.finalize().into());
    }

    /// The digest of all tensors added, in hexadecimal.
    #[must_use]
    pub fn finish(&self) -> String {
        let mut hash = Sha256::new();
        for tensor in self.tensors.values() {
            hash.update(tensor);
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(tensors: &[(&str, &[usize], &[u8])]) -> String {
        let mut digest = TensorDigest::default();
        for (name, shape, data) in tensors {
            digest.add(name, shape, data);
        }
        digest.finish()
    }

    #[test]
    fn order_is_free_and_content_is_not() {
        let a: (&str, &[usize], &[u8]) = ("a", &[2], &[1, 2]);
        let b: (&str, &[usize], &[u8]) = ("b", &[1, 2], &[3, 4]);
        assert_eq!(of(&[a, b]), of(&[b, a]));
        assert_ne!(of(&[a, b]), of(&[a]));
        assert_ne!(of(&[a]), of(&[("a", &[2], &[1, 3])]));
        assert_ne!(of(&[a]), of(&[("a", &[1, 2], &[1, 2])]));
        assert_ne!(of(&[a]), of(&[("b", &[2], &[1, 2])]));
    }
}
