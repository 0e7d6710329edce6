// The walk that all copies and casts share: rows of a strided source into a dense destination, by
// vectors of 16 bytes on the wider side where the destination's alignment allows, by elements else.
#pragma once

#include "platform.cuh"

namespace fst {

// One piece of work. Layout shared with `StridedJob` in src/kernel/job.rs.
struct Job {
    u64 src;       // address of the first element, any alignment
    u64 dst;       // address of the result, dense; must not overlap the source
    u64 rows;      // at least one row is a vector of its own
    u64 cols;      // elements per row (bytes for a gather)
    u64 src_pitch; // bytes from one row to the next in the source
};

// Which threads share a job: all of `blocks` blocks of `unit` threads; this one is number `lane` of
// block `block`.
struct Team {
    u64 lane, unit, block, blocks;
};

// All blocks share the job.
FST_FN Team grid_team() { return {threadIdx.x, blockDim.x, blockIdx.x, gridDim.x}; }

// The block has the job to itself.
FST_FN Team block_team() { return {threadIdx.x, blockDim.x, 0, 1}; }

// Item `index` of rows of `per_row` items each, advanced without divisions.
struct Place {
    u64 row, col, per_row;
    FST_FN Place at(u64 index, u64 per_row, u64 total) {
        if (per_row >= total) return {0, index, per_row};
        const u64 row = index / per_row;
        return {row, index - row * per_row, per_row};
    }
    FST_FN void advance(Place &place, const Place &by) {
        place.row += by.row;
        place.col += by.col;
        if (place.col >= place.per_row) {
            place.col -= place.per_row;
            place.row += 1;
        }
    }
};

template <class F, class T> struct Vector {
    static constexpr int larger = F::size > T::size ? F::size : T::size;
    static constexpr int smaller = F::size > T::size ? T::size : F::size;
    // At least a word on the narrower side.
    static constexpr int elements = 16 / larger > 4 / smaller ? 16 / larger : 4 / smaller;
    static constexpr int in_bytes = elements * F::size, out_bytes = elements * T::size;
    // Vectors loaded before the first is stored, for enough bytes in flight to cover the latency.
    static constexpr int unroll = in_bytes < 16 ? 4 : 2;
    static constexpr u64 in_align = in_bytes < 16 ? in_bytes : 16;
    static constexpr u64 out_align = out_bytes < 16 ? out_bytes : 16;
};

// `Op` has types `From` and `To`, `apply` from the bits of one to the bits of the other, and `vector`
// that does so for all elements of a vector; its result is zeroed before.
template <class Op>
FST_FN void run_vectors(u64 src, u64 dst, u64 total, u64 per_row, u64 pitch, const Team &team) {
    using F = typename Op::From;
    using T = typename Op::To;
    using V = Vector<F, T>;
    constexpr int in_words = V::in_bytes / 4, out_words = V::out_bytes / 4;
    // A block takes `unroll` vectors a thread that lie side by side, then moves on by all blocks.
    const u64 start = team.block * team.unit * V::unroll + team.lane;
    const u64 stride = team.blocks * team.unit * V::unroll;
    Place place = Place::at(start, per_row, total);
    const Place unit = Place::at(team.unit, per_row, total);
    const Place rest = Place::at(stride - team.unit * V::unroll, per_row, total);
    // The pitch of a single row means nothing.
    const bool aligned = (src | (per_row < total ? pitch : 0)) % V::in_align == 0;
    for (u64 first = start; first < total; first += stride) {
        u64 from[V::unroll];
        u32 in[V::unroll][in_words];
        FST_UNROLL
        for (int u = 0; u < V::unroll; ++u) {
            from[u] = src + place.row * pitch + place.col * V::in_bytes;
            Place::advance(place, unit);
        }
        Place::advance(place, rest);
        if (aligned) {
            FST_UNROLL
            for (int u = 0; u < V::unroll; ++u)
                if (first + u * team.unit < total) load_aligned(in[u], from[u]);
        } else {
            FST_UNROLL
            for (int u = 0; u < V::unroll; ++u)
                if (first + u * team.unit < total) load_unaligned(in[u], from[u]);
        }
        FST_UNROLL
        for (int u = 0; u < V::unroll; ++u) {
            const u64 item = first + u * team.unit;
            if (item < total) {
                u32 out[out_words] = {};
                Op::vector(in[u], out);
                store_aligned(dst + item * V::out_bytes, out);
            }
        }
    }
}

// One element at a time, of `total` in rows of `per_row`.
template <class Op>
FST_CALL void run_elements(u64 src, u64 dst, u64 total, u64 per_row, u64 pitch, u64 start,
                           u64 stride) {
    using F = typename Op::From;
    using T = typename Op::To;
    Place place = Place::at(start, per_row, total);
    const Place step = Place::at(stride, per_row, total);
    FST_NO_UNROLL
    for (u64 item = start; item < total; item += stride) {
        const u64 bits = load_element<F::size>(src + place.row * pitch + place.col * F::size);
        store_element<T::size>(dst + item * T::size, Op::apply(bits));
        Place::advance(place, step);
    }
}

template <class Op>
FST_CALL void run(u64 src, u64 dst, u64 rows, u64 cols, u64 pitch, u64 lane, u64 unit, u64 block,
                  u64 blocks) {
    using F = typename Op::From;
    using T = typename Op::To;
    using V = Vector<F, T>;
    const u64 thread = block * unit + lane, threads = blocks * unit;
    if (rows > 1 && pitch == cols * F::size) { // the source is dense too
        cols *= rows;
        rows = 1;
    }
    u64 head = (0 - dst) % V::out_align;
    bool vectors = head % T::size == 0;
    head /= T::size;
    if (rows == 1) head = head < cols ? head : cols;
    else vectors = vectors && head == 0 && cols % V::elements == 0;
    if (!vectors) {
        run_elements<Op>(src, dst, rows * cols, cols, pitch, thread, threads);
        return;
    }
    const u64 per_row = (cols - head) / V::elements;
    run_vectors<Op>(src + head * F::size, dst + head * T::size, rows * per_row, per_row, pitch,
                    {lane, unit, block, blocks});
    if (rows > 1) return;
    // A single row's ragged ends, fewer elements than a vector each.
    const u64 body = per_row * V::elements;
    for (u64 i = thread; i < cols - body; i += threads) {
        const u64 at = i < head ? i : i + body;
        run_elements<Op>(src + at * F::size, dst + at * T::size, 1, 1, 0, 0, 1);
    }
}

template <class Op> FST_FN void run_job(const Job &job, const Team &team) {
    run<Op>(job.src, job.dst, job.rows, job.cols, job.src_pitch, team.lane, team.unit, team.block,
            team.blocks);
}

} // namespace fst
