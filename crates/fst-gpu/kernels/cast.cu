// Casts one dtype into another, FST_FROM into FST_TO, from strided rows into a dense destination:
// slicing and casting in one pass. One PTX file a pair, so that a driver compiles only what is used.
//
//   fst_cast_FROM_TO(src, dst, rows, cols, src_pitch)   the grid shares one job
//   fst_cast_batch_FROM_TO(jobs, count)                 a block takes a job at a time
//
// Compiled with -DFST_FROM=bf16 -DFST_TO=f32 and the like. May be included repeatedly.

#include "cast_bits.cuh"
#include "strided.cuh"

#define FST_NAME_(prefix, from, to) prefix##_##from##_##to
#define FST_NAME(prefix, from, to) FST_NAME_(prefix, from, to)

namespace fst {
struct FST_NAME(Cast, FST_FROM, FST_TO) {
    using From = FST_FROM;
    using To = FST_TO;
    FST_FN u64 apply(u64 bits) { return To::from_f32(From::to_f32(bits)); }
    template <int I, int O> FST_FN void vector(const u32 (&in)[I], u32 (&out)[O]) {
        Vectors<From, To>::convert(in, out);
    }
};
} // namespace fst

FST_KERNEL(FST_NAME(fst_cast, FST_FROM, FST_TO), fst::u64 src, fst::u64 dst, fst::u64 rows,
           fst::u64 cols, fst::u64 src_pitch) {
    const fst::Job job = {src, dst, rows, cols, src_pitch};
    fst::run_job<fst::FST_NAME(Cast, FST_FROM, FST_TO)>(job, fst::grid_team());
}

FST_KERNEL(FST_NAME(fst_cast_batch, FST_FROM, FST_TO), const fst::Job *jobs, fst::u64 count) {
    for (fst::u64 i = blockIdx.x; i < count; i += gridDim.x)
        fst::run_job<fst::FST_NAME(Cast, FST_FROM, FST_TO)>(jobs[i], fst::block_team());
}

#undef FST_NAME
#undef FST_NAME_
