//! Names of element types: the format's, and those that PyTorch, NumPy and ml_dtypes have for them.

use fst::Dtype;

/// The name in PyTorch and, but for packed types, in NumPy or ml_dtypes; `None` where neither has one.
pub(crate) fn framework_name(dtype: Dtype) -> Option<&'static str> {
    Some(match dtype {
        Dtype::Bool => "bool",
        Dtype::U8 => "uint8",
        Dtype::I8 => "int8",
        Dtype::U16 => "uint16",
        Dtype::I16 => "int16",
        Dtype::U32 => "uint32",
        Dtype::I32 => "int32",
        Dtype::U64 => "uint64",
        Dtype::I64 => "int64",
        Dtype::F16 => "float16",
        Dtype::BF16 => "bfloat16",
        Dtype::F32 => "float32",
        Dtype::F64 => "float64",
        Dtype::C64 => "complex64",
        Dtype::F8E4M3 => "float8_e4m3fn",
        Dtype::F8E5M2 => "float8_e5m2",
        Dtype::F8E4M3Fnuz => "float8_e4m3fnuz",
        Dtype::F8E5M2Fnuz => "float8_e5m2fnuz",
        Dtype::F8E8M0 => "float8_e8m0fnu",
        Dtype::F4 => "float4_e2m1fn_x2",
        _ => return None,
    })
}

/// The type that a name stands for: the format's own (`BF16`), or a framework's (`bfloat16`).
pub(crate) fn parse(name: &str) -> Option<Dtype> {
    name.parse().ok().or_else(|| {
        let of_framework = |dtype: &&Dtype| framework_name(**dtype) == Some(name);
        Dtype::ALL.iter().find(of_framework).copied()
    })
}

/// How NumPy's array interface calls elements of this type, or the bytes of those that it does not know.
pub(crate) fn typestr(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::Bool => "|b1",
        Dtype::I8 => "|i1",
        Dtype::U16 | Dtype::BF16 => "<u2",
        Dtype::I16 => "<i2",
        Dtype::F16 => "<f2",
        Dtype::U32 => "<u4",
        Dtype::I32 => "<i4",
        Dtype::F32 => "<f4",
        Dtype::U64 => "<u8",
        Dtype::I64 => "<i8",
        Dtype::F64 => "<f8",
        Dtype::C64 => "<c8",
        _ => "|u1",
    }
}
