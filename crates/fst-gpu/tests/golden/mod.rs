//! The golden table of casts: its inputs, rebuilt by the rules of `tools/kernels/golden.py`, and
//! what PyTorch made of them.

#![allow(unreachable_pub)] // Shared by path with another package.
#![allow(clippy::unwrap_used)] // The table is part of the source: a bad line fails the test.

use fst_gpu::cast::CastType;
use sha2::{Digest, Sha256};

const HASHES: &str = include_str!("../../golden/hashes.txt");
const TABLES: &str = include_str!("../../golden/tables.txt");

const F32_LOW: [u32; 12] =
    [0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001, 0xFFFF];
const F64_LOW: [u64; 6] = [0, 1, 0x0FFF_FFFF, 0x1000_0000, 0x1000_0001, 0x1FFF_FFFF];
const RANDOM: u64 = 1 << 16;

/// One line of `hashes.txt`.
pub struct Pair {
    pub from: CastType,
    pub to: CastType,
    /// Elements in [`inputs`].
    pub count: usize,
    /// SHA-256 of the outputs after [`one_nan`].
    pub sha256: String,
    /// SHA-256 of the raw outputs, where PyTorch's NaN bits are not a matter of chance.
    pub nan_bits: Option<String>,
}

/// Every pair PyTorch casts.
pub fn pairs() -> Vec<Pair> {
    lines(HASHES)
        .map(|f| Pair {
            from: named(f[0]),
            to: named(f[1]),
            count: f[2].parse().unwrap(),
            sha256: f[3].to_owned(),
            nan_bits: (f[4] != "-").then(|| f[4].to_owned()),
        })
        .collect()
}

/// One line of `tables.txt`: the bits of an input and of what PyTorch casts it to.
pub struct Entry {
    pub from: CastType,
    pub to: CastType,
    pub input: u64,
    pub output: u64,
}

/// Single values, to see what went wrong when a hash differs.
pub fn entries() -> impl Iterator<Item = Entry> {
    lines(TABLES).map(|f| Entry {
        from: named(f[0]),
        to: named(f[1]),
        input: u64::from_str_radix(f[2], 16).unwrap(),
        output: u64::from_str_radix(f[3], 16).unwrap(),
    })
}

fn lines(text: &'static str) -> impl Iterator<Item = Vec<&'static str>> {
    text.lines().filter(|l| !l.starts_with('#')).map(|l| l.split(' ').collect())
}

fn named(name: &str) -> CastType {
    *CastType::ALL.iter().find(|t| t.name() == name).unwrap()
}

/// All inputs of a type, as little-endian bytes.
pub fn inputs(from: CastType) -> Vec<u8> {
    let highs = 0..1u32 << 16;
    match from {
        CastType::F64 => {
            let near = highs
                .map(|h| h << 16)
                .filter(|n| n & 0x7F80_0000 != 0x7F80_0000)
                .flat_map(|n| [n, n | 1])
                .map(|n| f64::from(f32::from_bits(n)).to_bits())
                .flat_map(|wide| F64_LOW.map(|low| wide | low));
            let far = (0..1u64 << 16).flat_map(|h| [0, 1, (1 << 48) - 1].map(|low| h << 48 | low));
            near.chain(far).chain(splitmix(64)).flat_map(u64::to_le_bytes).collect()
        }
        CastType::F32 => highs
            .flat_map(|h| F32_LOW.map(|low| h << 16 | low))
            .chain(splitmix(32).map(|r| r as u32))
            .flat_map(u32::to_le_bytes)
            .collect(),
        CastType::F16 | CastType::BF16 => (0..=u16::MAX).flat_map(u16::to_le_bytes).collect(),
        _ => (0..=u8::MAX).collect(),
    }
}

fn splitmix(seed: u64) -> impl Iterator<Item = u64> {
    (1..=RANDOM).map(move |i| {
        let z = seed.wrapping_add(0x9E37_79B9_7F4A_7C15u64.wrapping_mul(i));
        let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    })
}

/// Replaces every NaN of `bytes` by the one that the table has.
pub fn one_nan(bytes: &mut [u8], to: CastType) {
    let (magnitude, infinity, nan) = match to {
        CastType::F64 => (u64::MAX >> 1, 0x7FF << 52, 0x7FF8 << 48),
        CastType::F32 => (0x7FFF_FFFF, 0x7F80_0000, 0x7FC0_0000),
        CastType::F16 => (0x7FFF, 0x7C00, 0x7E00),
        CastType::BF16 => (0x7FFF, 0x7F80, 0x7FC0),
        CastType::F8E4M3 => (0x7F, 0x7E, 0x7F),
        CastType::F8E5M2 => (0x7F, 0x7C, 0x7F),
        CastType::F8E8M0 => (0xFF, 0xFE, 0xFF),
    };
    for element in bytes.chunks_exact_mut(to.size()) {
        if read(element) & magnitude > infinity {
            let size = element.len();
            element.copy_from_slice(&u64::to_le_bytes(nan)[..size]);
        }
    }
}

/// The bits of one element.
pub fn read(element: &[u8]) -> u64 {
    element.iter().rev().fold(0, |bits, byte| bits << 8 | u64::from(*byte))
}

/// SHA-256 in lower-case hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
