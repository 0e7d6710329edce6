//! Rust types for the elements of tensors, so that bytes can be viewed as typed slices.
//!
//! Integers, `f32` and `f64` are Rust's own, [`half::f16`] and [`half::bf16`] are the `half`
//! crate's. The other one-byte types are newtypes over their bits: they say what the bytes are and
//! leave arithmetic to the crates made for it. Packed types (F4, F6) have no element type, for
//! their elements do not start on bytes.

use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};

use crate::Dtype;

mod sealed {
    /// Keeps [`super::Element`] to this crate's list: a wrong dtype would mistype bytes.
    pub trait Sealed {}
}

/// A Rust type whose memory is one element of [`Element::DTYPE`]. Implemented here only.
pub trait Element: Pod + sealed::Sealed {
    /// The dtype that this type stands for.
    const DTYPE: Dtype;
}

macro_rules! elements {
    ($($ty:ty => $dtype:ident),* $(,)?) => {
        $(
            impl sealed::Sealed for $ty {}
            impl Element for $ty {
                const DTYPE: Dtype = Dtype::$dtype;
            }
        )*

        /// Every element type's dtype, size and alignment, for the test below.
        #[cfg(test)]
        const LAYOUTS: &[(Dtype, usize, usize)] =
            &[$((Dtype::$dtype, size_of::<$ty>(), align_of::<$ty>())),*];
    };
}

elements! {
    Bool8 => Bool,
    u8 => U8,
    i8 => I8,
    F8E5M2 => F8E5M2,
    F8E4M3 => F8E4M3,
    F8E8M0 => F8E8M0,
    F8E4M3Fnuz => F8E4M3Fnuz,
    F8E5M2Fnuz => F8E5M2Fnuz,
    i16 => I16,
    u16 => U16,
    f16 => F16,
    bf16 => BF16,
    i32 => I32,
    u32 => U32,
    f32 => F32,
    C64 => C64,
    f64 => F64,
    i64 => I64,
    u64 => U64,
}

macro_rules! bits {
    ($($(#[$doc:meta])* $name:ident;)*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
            #[repr(transparent)]
            pub struct $name(pub u8);

            impl $name {
                /// The element of these bits.
                #[must_use]
                pub const fn from_bits(bits: u8) -> Self {
                    Self(bits)
                }

                /// The bits as stored.
                #[must_use]
                pub const fn to_bits(self) -> u8 {
                    self.0
                }
            }
        )*
    };
}

bits! {
    /// Bits of an 8-bit float with 5 exponent and 2 mantissa bits. `==` compares bits.
    F8E5M2;
    /// Bits of an 8-bit float with 4 exponent and 3 mantissa bits, finite only. `==` compares bits.
    F8E4M3;
    /// Bits of a power-of-two scale: the value is 2^(bits - 127), 255 is NaN. `==` compares bits.
    F8E8M0;
    /// Bits of an E4M3 float without infinities and negative zero. `==` compares bits.
    F8E4M3Fnuz;
    /// Bits of an E5M2 float without infinities and negative zero. `==` compares bits.
    F8E5M2Fnuz;
}

/// A boolean as it is stored: one byte that a file may set to anything.
///
/// Rust's `bool` allows only 0 and 1, so viewing untrusted bytes as `bool` would be undefined
/// behaviour; [`Bool8::get`] reads every other value as true, as NumPy and PyTorch do.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(transparent)]
pub struct Bool8(pub u8);

impl Bool8 {
    /// The boolean: false for 0 only.
    #[must_use]
    pub const fn get(self) -> bool {
        self.0 != 0
    }
}

impl From<bool> for Bool8 {
    fn from(value: bool) -> Self {
        Self(u8::from(value))
    }
}

impl PartialEq for Bool8 {
    fn eq(&self, other: &Self) -> bool {
        self.get() == other.get()
    }
}

impl Eq for Bool8 {}

/// A complex number of two `f32`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct C64 {
    /// Real part.
    pub re: f32,
    /// Imaginary part.
    pub im: f32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn element_types_have_the_layout_of_their_dtype() {
        for &(dtype, size, align) in LAYOUTS {
            assert_eq!(size * 8, dtype.bits() as usize, "{dtype}");
            assert_eq!(align, dtype.alignment(), "{dtype}");
        }
        let packed = [Dtype::F4, Dtype::F6E2M3, Dtype::F6E3M2];
        for dtype in Dtype::ALL.iter().filter(|d| !packed.contains(d)) {
            assert!(LAYOUTS.iter().any(|(d, ..)| d == dtype), "{dtype} has no element type");
        }
    }

    #[test]
    fn any_byte_is_a_boolean() {
        let bytes = [0u8, 1, 2, 255];
        let bools: &[Bool8] = bytemuck::cast_slice(&bytes);
        assert_eq!(bools.iter().map(|b| b.get()).collect::<Vec<_>>(), [false, true, true, true]);
        assert_eq!(bools[2], Bool8::from(true));
    }
}
