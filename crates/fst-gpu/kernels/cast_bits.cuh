// One element from and to the bits of an F32: the arithmetic of src/cast/bits.rs, and its comments,
// in CUDA C. Both are held to one golden table and to each other bit by bit.
#pragma once

#include "platform.cuh"

namespace fst {

constexpr u32 SIGN = 0x80000000u;
constexpr u32 INF = 0x7F800000u;
constexpr u32 QUIET = 0x00400000u;

// The F32 whose last place is the smallest subnormal of the type.
template <u32 MANT, u32 BIAS> constexpr u32 magic = (127 - BIAS + 23 - MANT + 1) << 23;

// Magnitude `a` (finite F32 bits without sign) rounded to nearest even. Overflow runs on into larger
// bit patterns: the caller selects.
template <u32 MANT, u32 BIAS> FST_FN u32 narrow(u32 a) {
    constexpr u32 shift = 23 - MANT;
    const u32 odd = (a >> shift) & 1;
    const u32 normal = (a - ((127 - BIAS) << 23) + ((1u << (shift - 1)) - 1 + odd)) >> shift;
    const float sum = __uint_as_float(a) + __uint_as_float(magic<MANT, BIAS>);
    const u32 subnormal = __float_as_uint(sum) - magic<MANT, BIAS>;
    return a < ((128 - BIAS) << 23) ? subnormal : normal;
}

// Magnitude `x` as F32 bits. Infinity and NaN come out as finite numbers: the caller selects.
template <u32 MANT, u32 BIAS> FST_FN u32 widen(u32 x) {
    const u32 normal = (x << (23 - MANT)) + ((127 - BIAS) << 23);
    constexpr u32 m = magic<MANT, BIAS>;
    const u32 subnormal = __float_as_uint(__uint_as_float(m | x) - __uint_as_float(m));
    return x < (1u << MANT) ? subnormal : normal;
}

struct f64 {
    static constexpr int size = 8;
    FST_FN u32 to_f32(u64 w) {
        const u32 high = static_cast<u32>(w >> 32);
        const u32 nan = (high & SIGN) | INF | QUIET | (static_cast<u32>(w >> 29) & 0x003FFFFFu);
        const float value = static_cast<float>(__longlong_as_double(static_cast<long long>(w)));
        return (w << 1) > (0x7FFull << 53) ? nan : __float_as_uint(value);
    }
    FST_FN u64 from_f32(u32 bits) {
        const u64 wide = bits;
        const u64 nan = ((wide & SIGN) << 32) | (0xFFFull << 51) | ((wide & 0x003FFFFFu) << 29);
        const double value = static_cast<double>(__uint_as_float(bits));
        return (bits & ~SIGN) > INF ? nan : static_cast<u64>(__double_as_longlong(value));
    }
};

struct f32 {
    static constexpr int size = 4;
    FST_FN u32 to_f32(u64 w) { return static_cast<u32>(w); }
    FST_FN u64 from_f32(u32 bits) { return bits; }
};

struct f16 {
    static constexpr int size = 2;
    FST_FN u32 to_f32(u64 w) {
        const u32 h = static_cast<u32>(w), x = h & 0x7FFF;
        const u32 special = INF | ((x & 0x3FF) << 13) | (x > 0x7C00 ? QUIET : 0);
        return ((h & 0x8000) << 16) | (x >= 0x7C00 ? special : widen<10, 15>(x));
    }
    FST_FN u64 from_f32(u32 bits) {
        const u32 a = bits & ~SIGN;
        u32 value = narrow<10, 15>(a);
        value = a >= (143u << 23) ? 0x7C00 : value;
        value = a > INF ? 0x7E00 | ((a >> 13) & 0x1FF) : value;
        return ((bits >> 16) & 0x8000) | value;
    }
};

struct bf16 {
    static constexpr int size = 2;
    FST_FN u32 to_f32(u64 w) { return static_cast<u32>(w) << 16; }
    FST_FN u64 from_f32(u32 bits) {
        const u32 value = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16;
        return (bits & ~SIGN) > INF ? 0x7FC0 : value;
    }
};

struct f8e4m3 {
    static constexpr int size = 1;
    FST_FN u32 to_f32(u64 w) {
        const u32 b = static_cast<u32>(w), x = b & 0x7F;
        return ((b & 0x80) << 24) | (x == 0x7F ? 0x7FF00000u : widen<3, 7>(x));
    }
    FST_FN u64 from_f32(u32 bits) {
        const u32 a = bits & ~SIGN;
        const u32 value = a >= 0x43F00000u ? 0x7F : narrow<3, 7>(a);
        return ((bits >> 24) & 0x80) | value;
    }
};

struct f8e5m2 {
    static constexpr int size = 1;
    FST_FN u32 to_f32(u64 w) {
        const u32 b = static_cast<u32>(w), x = b & 0x7F;
        const u32 special = INF | ((x & 3) << 21) | (x > 0x7C ? QUIET : 0);
        return ((b & 0x80) << 24) | (x >= 0x7C ? special : widen<2, 15>(x));
    }
    FST_FN u64 from_f32(u32 bits) {
        const u32 a = bits & ~SIGN;
        u32 value = narrow<2, 15>(a);
        value = a >= (143u << 23) ? 0x7C : value;
        value = a > INF ? 0x7F : value;
        return ((bits >> 24) & 0x80) | value;
    }
};

struct f8e8m0 {
    static constexpr int size = 1;
    FST_FN u32 to_f32(u64 w) {
        const u32 x = static_cast<u32>(w);
        const u32 value = x == 0 ? 0x00400000u : x << 23;
        return x == 0xFF ? INF | 1 : value;
    }
};

} // namespace fst
