//! Element types of the safetensors format: their names, widths and alignments.

use std::fmt;
use std::str::FromStr;

use crate::SizeError;

/// Declares the enum together with the table that everything about a dtype is read from.
macro_rules! dtypes {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $bits:literal, $align:literal;)*) => {
        /// The type of a tensor's elements: every dtype of safetensors 0.8.
        ///
        /// The order is that of the official crate, which sorts tensors by it when it writes.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum Dtype {
            $($(#[$doc])* $variant,)*
        }

        impl Dtype {
            /// Every dtype, in order.
            pub const ALL: &'static [Dtype] = &[$(Dtype::$variant),*];

            /// Width of one element in bits; 4 and 6 for the packed types.
            #[must_use]
            pub const fn bits(self) -> u32 {
                match self {
                    $(Dtype::$variant => $bits,)*
                }
            }

            /// The name that safetensors headers use.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Dtype::$variant => $name,)*
                }
            }

            /// Alignment in bytes of the Rust type of an element (see [`crate::element`]); 1 for
            /// packed types, which have none.
            #[must_use]
            pub const fn alignment(self) -> usize {
                match self {
                    $(Dtype::$variant => $align,)*
                }
            }

            /// The dtype of exactly this safetensors name.
            pub(crate) fn from_name(name: &str) -> Option<Dtype> {
                match name {
                    $($name => Some(Dtype::$variant),)*
                    _ => None,
                }
            }
        }
    };
}

dtypes! {
    /// Boolean, one byte: 0 or 1.
    Bool = "BOOL", 8, 1;
    /// Packed 4-bit float E2M1 (OCP Microscaling Formats 1.0), two to a byte.
    F4 = "F4", 4, 1;
    /// Packed 6-bit float E2M3 (OCP Microscaling Formats 1.0), four to three bytes.
    F6E2M3 = "F6_E2M3", 6, 1;
    /// Packed 6-bit float E3M2 (OCP Microscaling Formats 1.0), four to three bytes.
    F6E3M2 = "F6_E3M2", 6, 1;
    /// Unsigned 8-bit integer.
    U8 = "U8", 8, 1;
    /// Signed 8-bit integer.
    I8 = "I8", 8, 1;
    /// 8-bit float E5M2 (arXiv 2209.05433).
    F8E5M2 = "F8_E5M2", 8, 1;
    /// 8-bit float E4M3, finite only (arXiv 2209.05433).
    F8E4M3 = "F8_E4M3", 8, 1;
    /// 8-bit power-of-two scale E8M0 (OCP Microscaling Formats 1.0).
    F8E8M0 = "F8_E8M0", 8, 1;
    /// 8-bit float E4M3 without infinities and negative zero (arXiv 2206.02915).
    F8E4M3Fnuz = "F8_E4M3FNUZ", 8, 1;
    /// 8-bit float E5M2 without infinities and negative zero (arXiv 2206.02915).
    F8E5M2Fnuz = "F8_E5M2FNUZ", 8, 1;
    /// Signed 16-bit integer.
    I16 = "I16", 16, 2;
    /// Unsigned 16-bit integer.
    U16 = "U16", 16, 2;
    /// IEEE 754 half precision.
    F16 = "F16", 16, 2;
    /// Brain float: the upper half of an `f32`.
    BF16 = "BF16", 16, 2;
    /// Signed 32-bit integer.
    I32 = "I32", 32, 4;
    /// Unsigned 32-bit integer.
    U32 = "U32", 32, 4;
    /// IEEE 754 single precision.
    F32 = "F32", 32, 4;
    /// Complex number of two `f32`, real part first.
    C64 = "C64", 64, 4;
    /// IEEE 754 double precision.
    F64 = "F64", 64, 8;
    /// Signed 64-bit integer.
    I64 = "I64", 64, 8;
    /// Unsigned 64-bit integer.
    U64 = "U64", 64, 8;
}

impl Dtype {
    /// Whether its elements are floating-point numbers.
    #[must_use]
    pub const fn is_float(self) -> bool {
        use Dtype::{
            BF16, F4, F6E2M3, F6E3M2, F8E4M3, F8E4M3Fnuz, F8E5M2, F8E5M2Fnuz, F8E8M0, F16, F32, F64,
        };
        matches!(self, F4 | F6E2M3 | F6E3M2 | F8E4M3 | F8E4M3Fnuz | F8E5M2 | F8E5M2Fnuz | F8E8M0)
            || matches!(self, F16 | BF16 | F32 | F64)
    }

    /// Bytes of a tensor of this shape.
    ///
    /// The product is taken from the left, as the official parser takes it: `[0, huge, huge]` is
    /// an empty tensor, `[huge, huge, 0]` an overflow.
    pub(crate) fn byte_len(self, shape: &[usize]) -> Result<u64, SizeError> {
        let elements = shape.iter().try_fold(1u64, |n, &dim| n.checked_mul(dim as u64));
        let bits = elements.and_then(|n| n.checked_mul(u64::from(self.bits())));
        match bits {
            Some(bits) if bits % 8 == 0 => Ok(bits / 8),
            Some(bits) => Err(SizeError::PartialByte { dtype: self, shape: shape.to_vec(), bits }),
            None => Err(SizeError::Overflow { dtype: self, shape: shape.to_vec() }),
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Dtype {
    type Err = UnknownDtype;

    /// Reads the exact safetensors name, such as `BF16` or `F8_E4M3`.
    fn from_str(name: &str) -> Result<Self, UnknownDtype> {
        Dtype::from_name(name).ok_or_else(|| UnknownDtype { name: name.to_owned() })
    }
}

/// A name that is no safetensors dtype.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown dtype {name:?}")]
#[non_exhaustive]
pub struct UnknownDtype {
    /// The name as given.
    pub name: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_widths_and_order_are_the_official_ones() {
        // `Dtype` of the official crate has no list of its variants; its deserializer names them
        // all in the message of an unknown one.
        let message = serde_json::from_str::<safetensors::Dtype>("\"?\"").unwrap_err().to_string();
        let official: Vec<&str> =
            message.split('`').skip(1).step_by(2).filter(|name| *name != "?").collect();
        let ours: Vec<&str> = Dtype::ALL.iter().map(|d| d.as_str()).collect();
        assert_eq!(ours, official);
        for dtype in Dtype::ALL {
            let theirs: safetensors::Dtype = serde_json::from_str(&format!("\"{dtype}\"")).unwrap();
            assert_eq!(theirs.bitsize() as u32, dtype.bits(), "{dtype}");
            assert_eq!(dtype.as_str().parse::<Dtype>().as_ref(), Ok(dtype));
        }
    }

    #[test]
    fn other_spellings_are_refused() {
        for name in ["", "bf16", "BF16 ", "bfloat16", "F8E4M3"] {
            assert_eq!(name.parse::<Dtype>(), Err(UnknownDtype { name: name.into() }));
        }
    }

    #[test]
    fn byte_len_checks_overflow_from_the_left() {
        let huge = usize::MAX;
        let overflow = |dtype, shape: &[usize]| {
            assert_eq!(
                Dtype::byte_len(dtype, shape),
                Err(SizeError::Overflow { dtype, shape: shape.to_vec() })
            );
        };
        assert_eq!(Dtype::F32.byte_len(&[]), Ok(4));
        assert_eq!(Dtype::F32.byte_len(&[0, huge, huge]), Ok(0));
        overflow(Dtype::F32, &[huge, huge, 0]);
        let partial = SizeError::PartialByte { dtype: Dtype::F4, shape: vec![3], bits: 12 };
        assert_eq!(Dtype::F4.byte_len(&[3]), Err(partial));
        assert_eq!(Dtype::F6E2M3.byte_len(&[4]), Ok(3));
        overflow(Dtype::U8, &[1 << 61]);
    }
}
