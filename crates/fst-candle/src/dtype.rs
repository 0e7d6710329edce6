//! Which types of elements fst and candle have in common, and how one becomes another.

use candle_core::DType;
use fst::Dtype;

/// candle's name for a type of element; `None` where it has none.
pub(crate) fn to_candle(dtype: Dtype) -> Option<DType> {
    Some(match dtype {
        Dtype::U8 => DType::U8,
        Dtype::U32 => DType::U32,
        Dtype::I16 => DType::I16,
        Dtype::I32 => DType::I32,
        Dtype::I64 => DType::I64,
        Dtype::BF16 => DType::BF16,
        Dtype::F16 => DType::F16,
        Dtype::F32 => DType::F32,
        Dtype::F64 => DType::F64,
        Dtype::F8E4M3 => DType::F8E4M3,
        Dtype::F8E8M0 => DType::F8E8M0,
        Dtype::F6E2M3 => DType::F6E2M3,
        Dtype::F6E3M2 => DType::F6E3M2,
        Dtype::F4 => DType::F4,
        _ => return None,
    })
}

/// The type that elements have in candle when they are loaded as they are; `None` where candle has no place for
/// them.
pub fn native_dtype(dtype: Dtype) -> Option<DType> {
    Way::native(dtype).map(|way| way.read)
}

/// The format's name for a type of element of candle's; `None` for one that a later candle has.
pub(crate) fn of_candle(dtype: DType) -> Option<Dtype> {
    Some(match dtype {
        DType::U8 => Dtype::U8,
        DType::U32 => Dtype::U32,
        DType::I16 => Dtype::I16,
        DType::I32 => Dtype::I32,
        DType::I64 => Dtype::I64,
        DType::BF16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        DType::F32 => Dtype::F32,
        DType::F64 => Dtype::F64,
        DType::F8E4M3 => Dtype::F8E4M3,
        DType::F8E8M0 => Dtype::F8E8M0,
        DType::F6E2M3 => Dtype::F6E2M3,
        DType::F6E3M2 => Dtype::F6E3M2,
        DType::F4 => Dtype::F4,
        _ => return None,
    })
}

/// Whether a conversion while reading gives what candle's `to_dtype` would, NaNs' bits apart: tested for
/// every pair (`tests/conversions.rs`).
fn converts_alike(from: Dtype, to: DType) -> bool {
    use Dtype::{BF16, F8E4M3, F16, F32, F64};
    match to {
        DType::F64 => matches!(from, BF16 | F16 | F32),
        DType::F32 => matches!(from, F8E4M3 | BF16 | F16 | F64),
        DType::BF16 | DType::F16 => matches!(from, F8E4M3 | BF16 | F16 | F32),
        _ => false,
    }
}

/// What fst converts and candle does not.
fn converts_only_here(from: Dtype, to: DType) -> bool {
    match from {
        Dtype::F8E5M2 | Dtype::F8E8M0 => {
            matches!(to, DType::F32 | DType::F64 | DType::BF16 | DType::F16)
        }
        // candle 0.11.1 never returns from this one: its `to_f64` calls itself.
        Dtype::F8E4M3 => to == DType::F64,
        _ => false,
    }
}

/// How a tensor becomes one of candle's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Way {
    /// The type that it is converted to while it is read, if it is.
    pub(crate) cast: Option<Dtype>,
    /// The type of what was read; what is asked for in another is converted by candle.
    pub(crate) read: DType,
    /// 16-bit integers without a sign are made 32-bit ones, as candle's loader does.
    pub(crate) widen: bool,
    /// candle cannot do the conversion.
    only_here: bool,
}

impl Way {
    /// How elements of type `from` become such of type `to`, or of candle's own for what the file has;
    /// `None` where candle has no place for them.
    pub(crate) fn new(from: Dtype, to: Option<DType>) -> Option<Self> {
        let Some(to) = to else { return Self::native(from) };
        let only_here = converts_only_here(from, to);
        if to_candle(from) != Some(to) && (converts_alike(from, to) || only_here) {
            return Some(Self { cast: of_candle(to), read: to, widen: false, only_here });
        }
        Self::native(from)
    }

    /// As it is in the file.
    fn native(from: Dtype) -> Option<Self> {
        let widen = from == Dtype::U16;
        let read = if widen { DType::U32 } else { to_candle(from)? };
        Some(Self { cast: None, read, widen, only_here: false })
    }

    /// Whether what was read this way is what `other` would read, or what candle makes the same of.
    pub(crate) fn serves(self, other: Self) -> bool {
        self == other || (self.cast.is_none() && !other.only_here)
    }
}
