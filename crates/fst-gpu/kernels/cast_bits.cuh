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

// Element `i` of a vector.
template <int SIZE, int WORDS> FST_FN u64 get(const u32 (&w)[WORDS], int i) {
    if constexpr (SIZE == 1) return (w[i / 4] >> (8 * (i % 4))) & 0xFF;
    if constexpr (SIZE == 2) return (w[i / 2] >> (16 * (i % 2))) & 0xFFFF;
    if constexpr (SIZE == 4) return w[i];
    if constexpr (SIZE == 8) return w[2 * i] | static_cast<u64>(w[2 * i + 1]) << 32;
    return 0;
}

template <int SIZE, int WORDS> FST_FN void put(u32 (&w)[WORDS], int i, u64 bits) {
    if constexpr (SIZE == 1) w[i / 4] |= static_cast<u32>(bits) << (8 * (i % 4));
    if constexpr (SIZE == 2) w[i / 2] |= static_cast<u32>(bits) << (16 * (i % 2));
    if constexpr (SIZE == 4) w[i] = static_cast<u32>(bits);
    if constexpr (SIZE == 8) {
        w[2 * i] = static_cast<u32>(bits);
        w[2 * i + 1] = static_cast<u32>(bits >> 32);
    }
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
    static constexpr u32 pack_bias = 0, infinities = INF;
    FST_FN u32 with_nans(u32 w, u32 mask) { return w | (mask & QUIET); }
    FST_FN void pack(const u32 (&bits)[4], u32 (&out)[4]) {
        FST_UNROLL
        for (int e = 0; e < 4; ++e) out[e] = bits[e];
    }
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
    // Of F32 values times 2^-112, which makes the two exponents' bits the same.
    static constexpr u32 pack_bias = 112, infinities = 0x7C007C00u;
    FST_FN u32 with_nans(u32 w, u32 mask) { return w | (mask & 0x02000200u); }
    FST_FN void pack(const u32 (&bits)[4], u32 (&out)[2]) {
        u32 high[4];
        FST_UNROLL
        for (int e = 0; e < 4; ++e) high[e] = (bits[e] & SIGN) | (bits[e] << 3 & ~SIGN);
        out[0] = high[0] >> 16 | (high[1] & 0xFFFF0000u);
        out[1] = high[2] >> 16 | (high[3] & 0xFFFF0000u);
    }
};

struct bf16 {
    static constexpr int size = 2;
    FST_FN u32 to_f32(u64 w) { return static_cast<u32>(w) << 16; }
    FST_FN u64 from_f32(u32 bits) {
        const u32 value = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16;
        return (bits & ~SIGN) > INF ? 0x7FC0 : value;
    }
    static constexpr u32 pack_bias = 0, infinities = 0x7F807F80u;
    FST_FN u32 with_nans(u32 w, u32 mask) { return (w & ~mask) | (mask & 0x7FC07FC0u); }
    FST_FN void pack(const u32 (&bits)[4], u32 (&out)[2]) {
        out[0] = bits[0] >> 16 | (bits[1] & 0xFFFF0000u);
        out[1] = bits[2] >> 16 | (bits[3] & 0xFFFF0000u);
    }
};

struct f8e4m3 {
    static constexpr int size = 1;
    static constexpr u32 exponent_bits = 4, bias = 7;
    // Least magnitudes that are no finite number, that are no number.
    static constexpr u32 first_special = 0x7F, first_nan = 0x7F;
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
    static constexpr u32 exponent_bits = 5, bias = 15;
    static constexpr u32 first_special = 0x7C, first_nan = 0x7D;
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

// Whole vectors. The general way is element by element, some 20 operations each: too slow to widen
// 8-bit types at the speed of a device's memory.
template <class F, class T> struct Elements {
    template <int I, int O> FST_FN void convert(const u32 (&in)[I], u32 (&out)[O]) {
        FST_UNROLL
        for (int i = 0; i < I * 4 / F::size; ++i)
            put<T::size>(out, i, T::from_f32(F::to_f32(get<F::size>(in, i))));
    }
};

// Four elements of an F8 type in a word, to a type that holds all their values: moved into an F32's
// place, the magnitude of a finite number is its value but for a power of two, also when it is
// subnormal, and one multiplication mends that. Infinity and NaN are put in afterwards.
template <class F, class T> struct Widening {
    static constexpr int words = T::size; // that the four elements become

    template <int I, int O> FST_FN void convert(const u32 (&in)[I], u32 (&out)[O]) {
        FST_UNROLL
        for (int i = 0; i < I; ++i) {
            u32 four[words];
            widen(in[i], four);
            FST_UNROLL
            for (int w = 0; w < words; ++w) out[i * words + w] = four[w];
        }
    }

    FST_FN void widen(u32 in, u32 (&out)[words]) {
        constexpr u32 shift = 8 - F::exponent_bits;
        constexpr u32 mask = SIGN | (0x7F000000u >> shift);
        const float scale = __uint_as_float((254 - F::bias - T::pack_bias) << 23);
        u32 bits[4];
        FST_UNROLL
        for (int e = 0; e < 4; ++e) {
            // The shift copies the sign; the mask keeps one.
            const int top = static_cast<int>(in << (24 - 8 * e));
            const u32 placed = static_cast<u32>(top >> shift) & mask;
            bits[e] = __float_as_uint(__uint_as_float(placed) * scale);
        }
        T::pack(bits, out);
        // The top bit of each byte says whether the element is special, and whether it is NaN.
        const u32 special = (in & 0x7F7F7F7Fu) + (0x80 - F::first_special) * 0x01010101u;
        const u32 nan = (in & 0x7F7F7F7Fu) + (0x80 - F::first_nan) * 0x01010101u;
        FST_UNROLL
        for (int w = 0; w < words; ++w) {
            out[w] |= spread<words>(special, w) & T::infinities;
            out[w] = T::with_nans(out[w], spread<words>(nan, w));
        }
    }

    // All bits of those elements of word `w` whose byte has its top bit set.
    template <int WORDS> FST_FN u32 spread(u32 bytes, int w) {
        return WORDS == 4 ? spread_top_bits(bytes, 0x8888 + 0x1111 * w)
                          : spread_top_bits(bytes, 0x9988 + 0x2222 * w);
    }
};

template <class F, class T> struct Vectors : Elements<F, T> {};
#define FST_WIDENING(from, to)                                                                     \
    template <> struct Vectors<from, to> : Widening<from, to> {};
FST_WIDENING(f8e4m3, f32)
FST_WIDENING(f8e4m3, f16)
FST_WIDENING(f8e4m3, bf16)
FST_WIDENING(f8e5m2, f32)
FST_WIDENING(f8e5m2, f16)
FST_WIDENING(f8e5m2, bf16)

} // namespace fst
