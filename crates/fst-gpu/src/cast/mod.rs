//! Casts between floating-point dtypes on the host, over raw little-endian bytes.
//!
//! Every pair gives the values that PyTorch's `tensor.to(dtype)` gives on the CPU, which are the
//! values the kernels under `kernels/` give on a device:
//!
//! - a narrowing cast rounds to nearest, ties to even, once, from F32; F64 goes through F32 first
//!   (PyTorch does, so a value can round twice);
//! - nothing saturates: F16, BF16 and F8_E5M2 overflow to infinity, F8_E4M3 (the `fn` variant,
//!   which has no infinity) overflows to NaN;
//! - subnormals are kept on both sides;
//! - F8_E8M0 holds scales, powers of two from 2^-127 to 2^127; it can be decoded, not produced.
//!
//! NaN stays NaN, with the bits that PyTorch gives it, except that F64 and F32 to BF16 always give
//! 0x7FC0, where PyTorch's depend on whether an element fell into its vectorised loop or the rest.
//!
//! Which arithmetic makes an element is in `bits.rs`; this file owns pairs, lengths and dispatch.

mod bits;

use std::fmt;

use bits::{Bf16, E4M3, E5M2, E8M0, F16, F32, F64, FromF32, ToF32};

/// The element types that can be cast. Names follow the safetensors format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CastType {
    /// IEEE 754 binary64.
    F64,
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    BF16,
    /// 1 sign, 4 exponent (bias 7), 3 mantissa bits, no infinities, one NaN pattern per sign:
    /// `torch.float8_e4m3fn`.
    F8E4M3,
    /// 1 sign, 5 exponent (bias 15), 2 mantissa bits, IEEE-like: `torch.float8_e5m2`.
    F8E5M2,
    /// 8 exponent bits (bias 127) and nothing else, 0xFF is NaN: `torch.float8_e8m0fnu`. A source
    /// only.
    F8E8M0,
}

impl CastType {
    /// Every type, in declaration order.
    pub const ALL: [Self; 7] =
        [Self::F64, Self::F32, Self::F16, Self::BF16, Self::F8E4M3, Self::F8E5M2, Self::F8E8M0];

    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::F8E4M3 | Self::F8E5M2 | Self::F8E8M0 => 1,
        }
    }

    /// The name in lower case, as kernel names spell it (`f8e4m3`).
    pub const fn name(self) -> &'static str {
        match self {
            Self::F64 => "f64",
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::F8E4M3 => "f8e4m3",
            Self::F8E5M2 => "f8e5m2",
            Self::F8E8M0 => "f8e8m0",
        }
    }
}

impl fmt::Display for CastType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F64 => "F64",
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::F8E4M3 => "F8_E4M3",
            Self::F8E5M2 => "F8_E5M2",
            Self::F8E8M0 => "F8_E8M0",
        })
    }
}

/// Why a cast was refused. Nothing was written then.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CastError {
    /// No such cast: only F8_E8M0 as a destination (other than from itself).
    #[error("no cast from {from} to {to}")]
    Unsupported {
        /// Source type.
        from: CastType,
        /// Destination type.
        to: CastType,
    },
    /// The source ends inside an element.
    #[error("{len} bytes are not whole {from} elements of {} bytes", from.size())]
    RaggedSource {
        /// Source type.
        from: CastType,
        /// Source length in bytes.
        len: usize,
    },
    /// The destination does not hold exactly as many elements as the source.
    #[error("destination of {found} bytes, expected {expected} for {elements} {to} elements")]
    DestinationLength {
        /// Destination type.
        to: CastType,
        /// Elements in the source.
        elements: usize,
        /// Bytes needed.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
}

/// Whether [`cast`] and the kernels can turn `from` into `to`. A type into itself is a copy.
pub const fn supported(from: CastType, to: CastType) -> bool {
    !matches!(to, CastType::F8E8M0) || matches!(from, CastType::F8E8M0)
}

/// Casts every element of `src` into `dst`. Neither needs any alignment.
///
/// One thread, limited by memory bandwidth for the common pairs; callers with more cores split the
/// ranges.
///
/// # Errors
/// The pair is not [`supported`], `src` does not hold whole elements, or `dst` is not exactly as
/// many elements long as `src`; `dst` is untouched then.
pub fn cast(src: &[u8], from: CastType, dst: &mut [u8], to: CastType) -> Result<(), CastError> {
    if !supported(from, to) {
        return Err(CastError::Unsupported { from, to });
    }
    if !src.len().is_multiple_of(from.size()) {
        return Err(CastError::RaggedSource { from, len: src.len() });
    }
    let elements = src.len() / from.size();
    // A product that overflows cannot be the length of any slice.
    if elements.checked_mul(to.size()) != Some(dst.len()) {
        let expected = elements.saturating_mul(to.size());
        return Err(CastError::DestinationLength { to, elements, expected, found: dst.len() });
    }
    if from == to {
        dst.copy_from_slice(src);
        return Ok(());
    }
    match from {
        CastType::F64 => cast_from_f64(src, dst, to),
        CastType::F32 => cast_from::<F32, 4>(src, dst, to),
        CastType::F16 => cast_from::<F16, 2>(src, dst, to),
        CastType::BF16 => cast_from::<Bf16, 2>(src, dst, to),
        CastType::F8E4M3 => cast_from::<E4M3, 1>(src, dst, to),
        CastType::F8E5M2 => cast_from::<E5M2, 1>(src, dst, to),
        CastType::F8E8M0 => cast_from::<E8M0, 1>(src, dst, to),
    }
    Ok(())
}

/// By way of F32 in a small buffer: 2.5 to 4 times the speed of one loop, which is not vectorised.
fn cast_from_f64(src: &[u8], dst: &mut [u8], to: CastType) {
    if to == CastType::F32 {
        return convert::<F64, F32, 8, 4>(src, dst);
    }
    const ELEMENTS: usize = 512;
    let mut single = [0; ELEMENTS * 4];
    for (src, dst) in src.chunks(ELEMENTS * 8).zip(dst.chunks_mut(ELEMENTS * to.size())) {
        let single = &mut single[..src.len() / 2];
        convert::<F64, F32, 8, 4>(src, single);
        cast_from::<F32, 4>(single, dst, to);
    }
}

fn cast_from<S: ToF32<N>, const N: usize>(src: &[u8], dst: &mut [u8], to: CastType) {
    match to {
        CastType::F64 => convert::<S, F64, N, 8>(src, dst),
        CastType::F32 => convert::<S, F32, N, 4>(src, dst),
        CastType::F16 => convert::<S, F16, N, 2>(src, dst),
        CastType::BF16 => convert::<S, Bf16, N, 2>(src, dst),
        CastType::F8E4M3 => convert::<S, E4M3, N, 1>(src, dst),
        CastType::F8E5M2 => convert::<S, E5M2, N, 1>(src, dst),
        // Refused by `supported`.
        CastType::F8E8M0 => {}
    }
}

fn convert<S: ToF32<N>, D: FromF32<M>, const N: usize, const M: usize>(src: &[u8], dst: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2, the only requirement of `convert_avx2`.
        unsafe { convert_avx2::<S, D, N, M>(src, dst) };
        return;
    }
    convert_each::<S, D, N, M>(src, dst);
}

/// `convert_each`, compiled for wider vectors than every x86-64 has.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn convert_avx2<S: ToF32<N>, D: FromF32<M>, const N: usize, const M: usize>(
    src: &[u8],
    dst: &mut [u8],
) {
    convert_each::<S, D, N, M>(src, dst);
}

/// The one loop. Element functions have no branches, so that the compiler vectorises it.
#[inline(always)]
fn convert_each<S: ToF32<N>, D: FromF32<M>, const N: usize, const M: usize>(
    src: &[u8],
    dst: &mut [u8],
) {
    let (src, _) = src.as_chunks::<N>();
    let (dst, _) = dst.as_chunks_mut::<M>();
    for (s, d) in src.iter().zip(dst) {
        *d = D::from_f32(S::to_f32(*s));
    }
}
