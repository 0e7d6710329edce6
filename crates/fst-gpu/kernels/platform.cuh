// What the kernels need from the compiler and the machine: NVRTC for devices, or any C++17 compiler
// with host/shim.h for tests without one. No header of the CUDA toolkit is used.
//
// Accesses are by address: memory of a job has no type, and loads from a source may be unaligned.
#pragma once

#ifdef FST_HOST
#include "host/shim.h"
#else
#define FST_KERNEL(name, ...) extern "C" __global__ void __launch_bounds__(256) name(__VA_ARGS__)
#define FST_FN static __device__ __forceinline__
#define FST_CALL static __device__ __noinline__
#define FST_UNROLL _Pragma("unroll")
#define FST_NO_UNROLL _Pragma("unroll 1")
#endif

namespace fst {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// `.nc` (read-only path): no kernel writes what it reads.
// L1::no_allocate: aligned vectors are read once; the unaligned loads below share words, and use L1.
template <int WORDS> FST_FN void load_aligned(u32 (&w)[WORDS], u64 p) {
    static_assert(WORDS == 1 || WORDS == 2 || WORDS % 4 == 0, "whole loads");
#ifdef FST_HOST
    host_load(w, p, WORDS * 4);
#else
    if constexpr (WORDS == 1) {
        asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(w[0]) : "l"(p));
    } else if constexpr (WORDS == 2) {
        asm("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(p));
    } else {
        FST_UNROLL
        for (int i = 0; i < WORDS; i += 4)
            asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                : "=r"(w[i]), "=r"(w[i + 1]), "=r"(w[i + 2]), "=r"(w[i + 3])
                : "l"(p + 4 * i));
    }
#endif
}

template <int WORDS> FST_FN void store_aligned(u64 p, const u32 (&w)[WORDS]) {
    static_assert(WORDS == 1 || WORDS == 2 || WORDS % 4 == 0, "whole stores");
#ifdef FST_HOST
    host_store(p, w, WORDS * 4);
#else
    if constexpr (WORDS == 1) {
        asm volatile("st.global.u32 [%0], %1;" ::"l"(p), "r"(w[0]) : "memory");
    } else if constexpr (WORDS == 2) {
        asm volatile("st.global.v2.u32 [%0], {%1,%2};" ::"l"(p), "r"(w[0]), "r"(w[1]) : "memory");
    } else {
        FST_UNROLL
        for (int i = 0; i < WORDS; i += 4)
            asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p + 4 * i), "r"(w[i]),
                         "r"(w[i + 1]), "r"(w[i + 2]), "r"(w[i + 3])
                         : "memory");
    }
#endif
}

FST_FN u32 load_word(u64 p) {
#ifdef FST_HOST
    u32 w[1];
    host_load(w, p, 4);
    return w[0];
#else
    u32 w;
    asm("ld.global.nc.u32 %0, [%1];" : "=r"(w) : "l"(p));
    return w;
#endif
}

// From any address, by aligned words: may read up to three bytes before and after the vector, never
// outside of the aligned words that hold a byte of it.
template <int WORDS> FST_FN void load_unaligned(u32 (&w)[WORDS], u64 p) {
    const u32 shift = static_cast<u32>(p & 3) * 8;
    const u64 base = p & ~3ull;
    u32 low = load_word(base);
    FST_UNROLL
    for (int i = 0; i < WORDS; ++i) {
        // The last word is needed only when the vector reaches into it.
        const bool reaches = i + 1 < WORDS || shift != 0;
        const u32 high = reaches ? load_word(base + 4 * (i + 1)) : 0;
        w[i] = __funnelshift_r(low, high, shift);
        low = high;
    }
}

// Every byte of the result is the top bit, eight times, of the byte of `w` that a nibble of `which`
// names, plus 8.
FST_FN u32 spread_top_bits(u32 w, u32 which) {
#ifdef FST_HOST
    return host_spread_top_bits(w, which);
#else
    u32 result;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(result) : "r"(w), "r"(which));
    return result;
#endif
}

// One element of SIZE bytes at any address.
template <int SIZE> FST_FN u64 load_element(u64 p) {
    if (SIZE == 1 || p % SIZE != 0) {
        u64 bits = 0;
        FST_UNROLL
        for (int i = 0; i < SIZE; ++i)
            bits |= static_cast<u64>(*reinterpret_cast<const u8 *>(p + i)) << (8 * i);
        return bits;
    }
    if constexpr (SIZE == 2) return *reinterpret_cast<const u16 *>(p);
    if constexpr (SIZE == 4) return *reinterpret_cast<const u32 *>(p);
    if constexpr (SIZE == 8) return *reinterpret_cast<const u64 *>(p);
    return 0;
}

template <int SIZE> FST_FN void store_element(u64 p, u64 bits) {
    if (SIZE == 1 || p % SIZE != 0) {
        FST_UNROLL
        for (int i = 0; i < SIZE; ++i)
            *reinterpret_cast<u8 *>(p + i) = static_cast<u8>(bits >> (8 * i));
    } else {
        if constexpr (SIZE == 2) *reinterpret_cast<u16 *>(p) = static_cast<u16>(bits);
        if constexpr (SIZE == 4) *reinterpret_cast<u32 *>(p) = static_cast<u32>(bits);
        if constexpr (SIZE == 8) *reinterpret_cast<u64 *>(p) = bits;
    }
}

} // namespace fst
