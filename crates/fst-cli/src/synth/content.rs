//! The bytes of synthesized tensors: pseudo-random, finite, and a pure function of seed, name and
//! offset, so that files can be written in any order and by any number of threads.

use fst::Dtype;

/// The content of one tensor.
#[derive(Clone, Copy, Debug)]
pub struct Content {
    /// Start of this tensor's sequence of words.
    key: u64,
    /// Applied to each word of eight bytes: first `and`, then `or`.
    and: u64,
    or: u64,
}

/// Bytes that [`Content::fill`] makes at a time; offsets are multiples of it.
const WORD: usize = size_of::<u64>();

impl Content {
    /// The content of the tensor `name` of type `dtype` in a checkpoint made with `seed`.
    pub fn new(seed: u64, name: &str, dtype: Dtype) -> Self {
        // FNV-1a over the name tells tensors apart; `mix` spreads the difference over all bits.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let (and, or) = finite(dtype);
        Self { key: mix(hash ^ mix(seed)), and, or }
    }

    /// Writes the tensor's bytes from `offset` on into `buffer`.
    ///
    /// `offset` counts in bytes from the tensor's first one and is rounded down to a multiple of
    /// eight.
    pub fn fill(&self, offset: u64, buffer: &mut [u8]) {
        let first = self.key.wrapping_add(offset / WORD as u64);
        let mut words = buffer.chunks_exact_mut(WORD);
        let mut index = first;
        for word in &mut words {
            word.copy_from_slice(&self.word(index).to_le_bytes());
            index = index.wrapping_add(1);
        }
        let rest = words.into_remainder();
        rest.copy_from_slice(&self.word(index).to_le_bytes()[..rest.len()]);
    }

    #[inline]
    fn word(&self, index: u64) -> u64 {
        mix(index) & self.and | self.or
    }
}

/// The output function of SplitMix64 over a Weyl sequence: passes for random, two multiplications.
#[inline]
fn mix(index: u64) -> u64 {
    let z = index.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Masks (and, or) that make each element of a word of random bits a finite value.
///
/// Exponents lose their top bit, which excludes infinities and NaNs and keeps magnitudes below 2;
/// where a dtype has the room, the bits after it are set so that values are not vanishingly small.
fn finite(dtype: Dtype) -> (u64, u64) {
    let bytes = |mask: u8| u64::from_le_bytes([mask; 8]);
    let halves = |mask: u16| u64::from(mask) * 0x0001_0001_0001_0001;
    let singles = |mask: u32| u64::from(mask) * 0x0000_0001_0000_0001;
    match dtype {
        Dtype::Bool => (bytes(0x01), 0),
        Dtype::F8E5M2 | Dtype::F8E4M3 | Dtype::F8E8M0 => {
            let top = if dtype == Dtype::F8E8M0 { 0x80 } else { 0x40 };
            (!bytes(top), 0)
        }
        // The one NaN of these types is 0x80, the pattern of a negative zero.
        Dtype::F8E5M2Fnuz | Dtype::F8E4M3Fnuz => (!bytes(0x40), bytes(0x20)),
        Dtype::F16 => (!halves(0x4000), halves(0x2000)),
        Dtype::BF16 => (!halves(0x4000), halves(0x3800)),
        Dtype::F32 | Dtype::C64 => (!singles(0x4000_0000), singles(0x3800_0000)),
        Dtype::F64 => (!0x4000_0000_0000_0000, 0x3f00_0000_0000_0000),
        // Integers, and packed floats, which have neither infinities nor NaNs.
        _ => (!0, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(seed: u64, name: &str, dtype: Dtype, len: usize) -> Vec<u8> {
        let mut buffer = vec![0; len];
        Content::new(seed, name, dtype).fill(0, &mut buffer);
        buffer
    }

    #[test]
    fn content_depends_on_seed_and_name_alone() {
        let some = bytes(1, "a.weight", Dtype::U8, 100);
        assert_eq!(bytes(1, "a.weight", Dtype::U8, 100), some);
        assert_ne!(bytes(2, "a.weight", Dtype::U8, 100), some);
        assert_ne!(bytes(1, "b.weight", Dtype::U8, 100), some);
        let mut tail = vec![0; 36];
        Content::new(1, "a.weight", Dtype::U8).fill(64, &mut tail);
        assert_eq!(tail, some[64..]);
    }

    #[test]
    fn bytes_are_spread_evenly() {
        let mut counts = [0u32; 256];
        for byte in bytes(0, "x", Dtype::U8, 1 << 20) {
            counts[usize::from(byte)] += 1;
        }
        // 4096 expected; six standard deviations.
        assert!(counts.iter().all(|&count| count.abs_diff(4096) < 6 * 64), "{counts:?}");
    }

    #[test]
    fn floats_are_finite_and_below_two() {
        let len = 1 << 16;
        for chunk in bytes(3, "x", Dtype::F32, len).as_chunks::<4>().0 {
            let value = f32::from_le_bytes(*chunk).abs();
            assert!((1e-7..2.0).contains(&value), "{value}");
        }
        for chunk in bytes(3, "x", Dtype::F64, len).as_chunks::<8>().0 {
            let value = f64::from_le_bytes(*chunk).abs();
            assert!((1e-7..2.0).contains(&value), "{value}");
        }
        for chunk in bytes(3, "x", Dtype::BF16, len).as_chunks::<2>().0 {
            let value = f32::from_bits(u32::from(u16::from_le_bytes(*chunk)) << 16).abs();
            assert!((1e-7..2.0).contains(&value), "{value}");
        }
        // Exponent all ones is what infinities and NaNs have.
        for chunk in bytes(3, "x", Dtype::F16, len).as_chunks::<2>().0 {
            assert_ne!(u16::from_le_bytes(*chunk) & 0x7c00, 0x7c00);
        }
        for byte in bytes(3, "x", Dtype::F8E4M3, len) {
            assert_ne!(byte & 0x7f, 0x7f);
        }
        for byte in bytes(3, "x", Dtype::F8E5M2, len) {
            assert_ne!(byte & 0x7c, 0x7c);
        }
        for dtype in [Dtype::F8E4M3Fnuz, Dtype::F8E5M2Fnuz] {
            assert!(bytes(3, "x", dtype, len).iter().all(|&byte| byte != 0x80));
        }
        assert!(bytes(3, "x", Dtype::F8E8M0, len).iter().all(|&byte| byte != 0xff));
        assert!(bytes(3, "x", Dtype::Bool, len).iter().all(|&byte| byte < 2));
    }
}
