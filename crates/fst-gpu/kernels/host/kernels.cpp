// All kernels as one C++17 file for the host. Compile this file alone (`-std=c++17`, no include
// paths); find kernels by name with `fst_sim_kernel_lookup`, or by symbol as shim.h says.

#define FST_HOST

#include "../gather.cu"
#include "../checksum.cu"

#define FST_FROM f64
#include "from.inc"
#undef FST_FROM
#define FST_FROM f32
#include "from.inc"
#undef FST_FROM
#define FST_FROM f16
#include "from.inc"
#undef FST_FROM
#define FST_FROM bf16
#include "from.inc"
#undef FST_FROM
#define FST_FROM f8e4m3
#include "from.inc"
#undef FST_FROM
#define FST_FROM f8e5m2
#include "from.inc"
#undef FST_FROM
#define FST_FROM f8e8m0
#include "from.inc"
#undef FST_FROM

// The function that launches kernel `name` (as a PTX file names its entry) or null.
extern "C" fst::HostFunction fst_sim_kernel_lookup(const char *name) {
    for (const fst::HostKernel *kernel = fst::HostKernel::all; kernel; kernel = kernel->next)
        if (std::strcmp(kernel->name, name) == 0) return kernel->function;
    return nullptr;
}
