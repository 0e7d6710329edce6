// Copies strided rows of bytes into a dense destination: slices without a cast, and many small
// tensors in one launch.
//
//   fst_gather(src, dst, rows, row_bytes, src_pitch)   the grid shares one job
//   fst_gather_batch(jobs, count)                      a block takes a job at a time; cols are bytes

#include "strided.cuh"

namespace fst {

template <int SIZE> struct Raw {
    static constexpr int size = SIZE;
};

template <int SIZE> struct Copy {
    using From = Raw<SIZE>;
    using To = Raw<SIZE>;
    FST_FN u64 apply(u64 bits) { return bits; }
    template <int WORDS> FST_FN void vector(const u32 (&in)[WORDS], u32 (&out)[WORDS]) {
        FST_UNROLL
        for (int w = 0; w < WORDS; ++w) out[w] = in[w];
    }
};

FST_FN void gather(const Job &job, const Team &team) {
    const u64 together = job.rows == 1 ? 0 : job.dst | job.cols;
    // Rows that are not whole vectors go by the largest unit that keeps the destination aligned.
    if (together % 16 == 0) {
        run_job<Copy<1>>(job, team);
    } else if (together % 8 == 0) {
        run_job<Copy<8>>({job.src, job.dst, job.rows, job.cols / 8, job.src_pitch}, team);
    } else if (together % 4 == 0) {
        run_job<Copy<4>>({job.src, job.dst, job.rows, job.cols / 4, job.src_pitch}, team);
    } else if (together % 2 == 0) {
        run_job<Copy<2>>({job.src, job.dst, job.rows, job.cols / 2, job.src_pitch}, team);
    } else {
        run_job<Copy<1>>(job, team);
    }
}

} // namespace fst

FST_KERNEL(fst_gather, fst::u64 src, fst::u64 dst, fst::u64 rows, fst::u64 row_bytes,
           fst::u64 src_pitch) {
    fst::gather({src, dst, rows, row_bytes, src_pitch}, fst::grid_team());
}

FST_KERNEL(fst_gather_batch, const fst::Job *jobs, fst::u64 count) {
    for (fst::u64 i = blockIdx.x; i < count; i += gridDim.x) fst::gather(jobs[i], fst::block_team());
}
