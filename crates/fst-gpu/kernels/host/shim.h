// The kernels' platform on a machine without a GPU: what platform.cuh asks for, in plain C++17, and
// a registry through which a simulated driver finds and launches kernels by name.
//
// Blocks and threads run one after the other, on the launching thread, from the last to the first:
// code that relies on the order in which hardware happens to start blocks gives wrong bytes here.
// There is nothing like __syncthreads or a shuffle; the kernels do without.
#pragma once

#include <cstdlib>
#include <cstring>

#define FST_FN static inline __attribute__((always_inline))
#define FST_CALL static
#define FST_UNROLL
#define FST_NO_UNROLL
#define FST_STRING_(x) #x
#define FST_STRING(x) FST_STRING_(x)
#define FST_JOIN_(a, b) a##b
#define FST_JOIN(a, b) FST_JOIN_(a, b)

// Besides the kernel, the symbol that runs it:
// void fst_sim_kernel_NAME(const unsigned grid[3], const unsigned block[3], void **params)
#define FST_KERNEL(name, ...)                                                                      \
    static void name(__VA_ARGS__);                                                                 \
    extern "C" void FST_JOIN(fst_sim_kernel_, name)(const unsigned *grid, const unsigned *block,   \
                                                    void **params) {                               \
        fst::host_launch(name, grid, block, params);                                               \
    }                                                                                              \
    static const fst::HostKernel FST_JOIN(registered_, name)(FST_STRING(name),                     \
                                                             FST_JOIN(fst_sim_kernel_, name));     \
    static void name(__VA_ARGS__)

struct FstIndex {
    unsigned x, y, z;
};
static thread_local FstIndex threadIdx, blockIdx, blockDim, gridDim;

static inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
static inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
static inline double __longlong_as_double(long long bits) {
    double value;
    std::memcpy(&value, &bits, 8);
    return value;
}
static inline long long __double_as_longlong(double value) {
    long long bits;
    std::memcpy(&bits, &value, 8);
    return bits;
}
static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    const unsigned long long both = low | static_cast<unsigned long long>(high) << 32;
    return static_cast<unsigned>(both >> (shift & 31));
}
static inline unsigned long long atomicAdd(unsigned long long *p, unsigned long long value) {
    return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}

namespace fst {

// A device would report a misaligned address and lose its context.
static inline void host_check(unsigned long long p, unsigned bytes) {
    if (p % (bytes < 16 ? bytes : 16) != 0) std::abort();
}
static inline void host_load(unsigned *words, unsigned long long p, unsigned bytes) {
    host_check(p, bytes);
    std::memcpy(words, reinterpret_cast<const void *>(p), bytes);
}
static inline void host_store(unsigned long long p, const unsigned *words, unsigned bytes) {
    host_check(p, bytes);
    std::memcpy(reinterpret_cast<void *>(p), words, bytes);
}

static inline unsigned host_spread_top_bits(unsigned w, unsigned which) {
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned byte = (which >> (4 * i)) & 7; // 4 to 7 would be of a word of zeros
        const bool set = byte < 4 && (w >> (8 * byte + 7)) & 1;
        result |= set ? 0xFFu << (8 * i) : 0;
    }
    return result;
}

using HostFunction = void (*)(const unsigned *grid, const unsigned *block, void **params);

struct HostKernel {
    const char *name;
    HostFunction function;
    const HostKernel *next;
    static inline const HostKernel *all = nullptr;
    HostKernel(const char *name, HostFunction function)
        : name(name), function(function), next(all) {
        all = this;
    }
};

template <int... I> struct Indices {};
template <int N, int... I> struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I> struct MakeIndices<0, I...> {
    using type = Indices<I...>;
};

template <class... A, int... I>
void host_call(void (*kernel)(A...), void **params, Indices<I...>) {
    kernel(*static_cast<A *>(params[I])...);
}

template <class... A>
void host_launch(void (*kernel)(A...), const unsigned *grid, const unsigned *block, void **params) {
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    using All = typename MakeIndices<sizeof...(A)>::type;
    for (unsigned bz = grid[2]; bz-- > 0;)
        for (unsigned by = grid[1]; by-- > 0;)
            for (unsigned bx = grid[0]; bx-- > 0;)
                for (unsigned tz = block[2]; tz-- > 0;)
                    for (unsigned ty = block[1]; ty-- > 0;)
                        for (unsigned tx = block[0]; tx-- > 0;) {
                            blockIdx = {bx, by, bz};
                            threadIdx = {tx, ty, tz};
                            host_call(kernel, params, All());
                        }
}

} // namespace fst
