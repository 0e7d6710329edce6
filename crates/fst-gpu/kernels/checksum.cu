// Sums of buffers, to prove that every byte of a load is there and to touch it. Not cryptographic.
//
//   fst_checksum(jobs, count, sums)   a block takes a job at a time
//
// A buffer is a sequence of little-endian 64-bit words w[0], w[1], ..., the last one padded with
// zeros. Its sums are  sums[2 * slot] += sum of w[i]  and  sums[2 * slot + 1] += sum of
// w[i] * (2 i + 1), modulo 2^64. A long buffer is several jobs of one slot, each but the last of
// whole words.

#include "platform.cuh"

namespace fst {

// Layout shared with `ChecksumJob` in src/kernel/job.rs.
struct ChecksumJob {
    u64 src;        // address of the first byte, any alignment
    u64 bytes;
    u64 first_word; // i of the first word
    u64 slot;
};

struct Sums {
    u64 plain = 0, weighted = 0;
};

FST_FN void count_word(Sums &sums, u64 word, u64 index) {
    sums.plain += word;
    sums.weighted += word * (2 * index + 1);
}

template <bool ALIGNED> FST_FN void sum_pairs(Sums &sums, const ChecksumJob &job, u64 pairs) {
    FST_NO_UNROLL
    for (u64 i = threadIdx.x; i < pairs; i += blockDim.x) {
        u32 w[4];
        if constexpr (ALIGNED) load_aligned(w, job.src + 16 * i);
        else load_unaligned(w, job.src + 16 * i);
        const u64 index = job.first_word + 2 * i;
        count_word(sums, w[0] | static_cast<u64>(w[1]) << 32, index);
        count_word(sums, w[2] | static_cast<u64>(w[3]) << 32, index + 1);
    }
}

} // namespace fst

FST_KERNEL(fst_checksum, const fst::ChecksumJob *jobs, fst::u64 count, unsigned long long *sums) {
    using namespace fst;
    for (u64 j = blockIdx.x; j < count; j += gridDim.x) {
        const ChecksumJob job = jobs[j];
        Sums mine;
        const u64 pairs = job.bytes / 16;
        if (job.src % 16 == 0) sum_pairs<true>(mine, job, pairs);
        else sum_pairs<false>(mine, job, pairs);
        // The last bytes, one a thread.
        for (u64 i = 16 * pairs + threadIdx.x; i < job.bytes; i += blockDim.x)
            count_word(mine, load_element<1>(job.src + i) << (8 * (i % 8)), job.first_word + i / 8);
        if (mine.plain != 0) atomicAdd(sums + 2 * job.slot, mine.plain);
        if (mine.weighted != 0) atomicAdd(sums + 2 * job.slot + 1, mine.weighted);
    }
}
