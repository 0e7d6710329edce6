//! One element from and to the bits of an F32, without branches and without depending on how the
//! processor treats NaN.
//!
//! F32 is the hub: every other type but F64 is a subset of it, so decoding is exact and a cast is a
//! decode followed by one rounding. `kernels/cast_bits.cuh` is the same arithmetic in CUDA C; the
//! two are held to the same golden table and to each other bit by bit.

/// Decodes an element of `N` little-endian bytes into F32 bits.
pub(super) trait ToF32<const N: usize> {
    fn to_f32(bytes: [u8; N]) -> u32;
}

/// Encodes F32 bits as an element of `N` little-endian bytes.
pub(super) trait FromF32<const N: usize> {
    fn from_f32(bits: u32) -> [u8; N];
}

pub(super) struct F64;
pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Bf16;
pub(super) struct E4M3;
pub(super) struct E5M2;
pub(super) struct E8M0;

const SIGN: u32 = 0x8000_0000;
const INFINITY: u32 = 0x7F80_0000;
const QUIET: u32 = 0x0040_0000;

/// Magnitude `a` (F32 bits without sign, finite) rounded to a type of `MANT` mantissa bits and
/// exponent bias `BIAS`. Overflow runs on into larger bit patterns: the caller selects.
#[inline(always)]
fn narrow<const MANT: u32, const BIAS: u32>(a: u32) -> u32 {
    let shift = 23 - MANT;
    let odd = (a >> shift) & 1;
    let normal =
        a.wrapping_sub((127 - BIAS) << 23).wrapping_add((1 << (shift - 1)) - 1 + odd) >> shift;
    // Added to a power of two whose last place is the smallest subnormal, the value is rounded to
    // a multiple of that subnormal by the addition itself.
    let magic = magic::<MANT, BIAS>();
    let subnormal = (f32::from_bits(a) + f32::from_bits(magic)).to_bits().wrapping_sub(magic);
    if a < (128 - BIAS) << 23 { subnormal } else { normal }
}

/// Magnitude `x` of a type of `MANT` mantissa bits and bias `BIAS`, as F32 bits. Infinity and NaN
/// come out as large finite numbers: the caller selects.
#[inline(always)]
fn widen<const MANT: u32, const BIAS: u32>(x: u32) -> u32 {
    let normal = (x << (23 - MANT)).wrapping_add((127 - BIAS) << 23);
    let magic = magic::<MANT, BIAS>();
    // `x` may exceed the mantissa when it is not subnormal; the result is unused then.
    let subnormal = (f32::from_bits(magic | x) - f32::from_bits(magic)).to_bits();
    if x < 1 << MANT { subnormal } else { normal }
}

/// The F32 whose last place is the smallest subnormal of the type.
const fn magic<const MANT: u32, const BIAS: u32>() -> u32 {
    (127 - BIAS + 23 - MANT + 1) << 23
}

impl ToF32<8> for F64 {
    #[inline(always)]
    fn to_f32(bytes: [u8; 8]) -> u32 {
        let w = u64::from_le_bytes(bytes);
        let sign = (w >> 32) as u32 & SIGN;
        let nan = sign | INFINITY | QUIET | ((w >> 29) as u32 & 0x003F_FFFF);
        let value = (f64::from_bits(w) as f32).to_bits();
        if w << 1 > 0x7FF << 53 { nan } else { value }
    }
}

impl FromF32<8> for F64 {
    #[inline(always)]
    fn from_f32(bits: u32) -> [u8; 8] {
        let wide = u64::from(bits);
        let nan = ((wide & 0x8000_0000) << 32) | (0xFFF << 51) | ((wide & 0x003F_FFFF) << 29);
        let value = f64::from(f32::from_bits(bits)).to_bits();
        (if bits & !SIGN > INFINITY { nan } else { value }).to_le_bytes()
    }
}

impl ToF32<4> for F32 {
    #[inline(always)]
    fn to_f32(bytes: [u8; 4]) -> u32 {
        u32::from_le_bytes(bytes)
    }
}

impl FromF32<4> for F32 {
    #[inline(always)]
    fn from_f32(bits: u32) -> [u8; 4] {
        bits.to_le_bytes()
    }
}

impl ToF32<2> for F16 {
    #[inline(always)]
    fn to_f32(bytes: [u8; 2]) -> u32 {
        let h = u32::from(u16::from_le_bytes(bytes));
        let x = h & 0x7FFF;
        let quiet = if x > 0x7C00 { QUIET } else { 0 };
        let special = INFINITY | ((x & 0x3FF) << 13) | quiet;
        let value = widen::<10, 15>(x);
        ((h & 0x8000) << 16) | if x >= 0x7C00 { special } else { value }
    }
}

impl FromF32<2> for F16 {
    #[inline(always)]
    fn from_f32(bits: u32) -> [u8; 2] {
        let a = bits & !SIGN;
        let value = narrow::<10, 15>(a);
        // From 2^16 on; what rounds up to it has become 0x7C00 by itself.
        let value = if a >= 143 << 23 { 0x7C00 } else { value };
        let value = if a > INFINITY { 0x7E00 | ((a >> 13) & 0x1FF) } else { value };
        (((bits >> 16) & 0x8000 | value) as u16).to_le_bytes()
    }
}

impl ToF32<2> for Bf16 {
    #[inline(always)]
    fn to_f32(bytes: [u8; 2]) -> u32 {
        u32::from(u16::from_le_bytes(bytes)) << 16
    }
}

impl FromF32<2> for Bf16 {
    #[inline(always)]
    fn from_f32(bits: u32) -> [u8; 2] {
        let value = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16;
        ((if bits & !SIGN > INFINITY { 0x7FC0 } else { value }) as u16).to_le_bytes()
    }
}

impl ToF32<1> for E4M3 {
    #[inline(always)]
    fn to_f32(bytes: [u8; 1]) -> u32 {
        let w = u32::from(bytes[0]);
        let x = w & 0x7F;
        let value = widen::<3, 7>(x);
        ((w & 0x80) << 24) | if x == 0x7F { 0x7FF0_0000 } else { value }
    }
}

impl FromF32<1> for E4M3 {
    #[inline(always)]
    fn from_f32(bits: u32) -> [u8; 1] {
        let a = bits & !SIGN;
        let value = narrow::<3, 7>(a);
        // 480 is where the next value would be; above 464 rounding has reached 0x7F by itself.
        let value = if a >= 0x43F0_0000 { 0x7F } else { value };
        [((bits >> 24) & 0x80 | value) as u8]
    }
}

impl ToF32<1> for E5M2 {
    #[inline(always)]
    fn to_f32(bytes: [u8; 1]) -> u32 {
        let w = u32::from(bytes[0]);
        let x = w & 0x7F;
        let quiet = if x > 0x7C { QUIET } else { 0 };
        let special = INFINITY | ((x & 3) << 21) | quiet;
        let value = widen::<2, 15>(x);
        ((w & 0x80) << 24) | if x >= 0x7C { special } else { value }
    }
}

impl FromF32<1> for E5M2 {
    #[inline(always)]
    fn from_f32(bits: u32) -> [u8; 1] {
        let a = bits & !SIGN;
        let value = narrow::<2, 15>(a);
        let value = if a >= 143 << 23 { 0x7C } else { value };
        let value = if a > INFINITY { 0x7F } else { value };
        [((bits >> 24) & 0x80 | value) as u8]
    }
}

impl ToF32<1> for E8M0 {
    #[inline(always)]
    fn to_f32(bytes: [u8; 1]) -> u32 {
        let x = u32::from(bytes[0]);
        // 2^-127 is subnormal in F32.
        let value = if x == 0 { 0x0040_0000 } else { x << 23 };
        if x == 0xFF { INFINITY | 1 } else { value }
    }
}
