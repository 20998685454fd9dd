// How a LayerNorm kernel's threads own a row: what forward and backward share.
#pragma once

#include <initializer_list>

#include "common/convert.cuh"
#include "common/reduce.cuh"

namespace gptkernels {

// A row belongs to a warp, of which a block of BLOCK threads has several, or to a whole block. Each thread owns K
// packets of N columns, as many packets apart as the row has threads, so that a warp's accesses are contiguous. In a
// kernel ROW_THREADS is that number, or 0 for the block's size: a constant makes addresses constants.
constexpr int BLOCK = 128;

struct Tile {
    int row_threads;
    int packets;  // a thread
};

// The fewest threads for C columns in packets of N, of which a thread has registers for `columns` columns.
inline Tile tile_of(int64_t C, int N, int columns) {
    int most = columns / N, threads = WARP;
    int64_t packets = (C + N - 1) / N;
    while (packets > (int64_t)threads * most) threads *= 2;
    return {threads, (int)((packets + threads - 1) / threads)};
}

inline int block_of(Tile tile) { return tile.row_threads == WARP ? BLOCK : tile.row_threads; }
inline int rows_a_block(Tile tile) { return block_of(tile) / tile.row_threads; }

// The kernel's rows a block, and this thread's place among them.
template <int ROW_THREADS>
DEVICE int block_rows() {
    return ROW_THREADS == WARP ? BLOCK / WARP : 1;
}
template <int ROW_THREADS>
DEVICE int64_t first_row() {
    if constexpr (ROW_THREADS != WARP) return (int64_t)blockIdx.x;
    // From lane 0, so that the compiler sees one number a warp and shuffles after a branch on it need no reconvergence.
    int warp = __shfl_sync(FULL_WARP, (int)threadIdx.x / WARP, 0);
    return (int64_t)blockIdx.x * (BLOCK / WARP) + warp;
}

// A thread's packets of a row of C columns. The first FULL packets exist in every thread.
template <int ROW_THREADS, int N, int FULL>
struct Packets {
    static constexpr int ROW = ROW_THREADS;
    int C, column;  // of the first packet
    int64_t begin;  // of the row in an array of all rows

    DEVICE Packets(int64_t row, int C) : C(C) {
        column = (int)threadIdx.x % threads() * N;
        begin = row * C;
    }
    // Where registers are short: no column, address or predicate that was computed so far is kept beyond here.
    DEVICE void forget() { column = again(column); }
    DEVICE static int threads() { return ROW_THREADS ? ROW_THREADS : (int)blockDim.x; }
    DEVICE int column_of(int k) const { return column + k * (threads() * N); }
    DEVICE int64_t index_of(int k) const { return begin + column + k * (threads() * N); }  // a constant apart
    DEVICE bool exists(int k) const { return k < FULL || column_of(k) < C; }
};

// The sum over a row of a number a thread. A block that is one row takes a barrier, and a scratch of its own each time.
template <int ROW_THREADS>
DEVICE float row_sum(float x, Shared<float> scratch) {
    x = warp_sum(x);
    if constexpr (ROW_THREADS == WARP) return x;
    else return sum_of_warps(x, scratch, (int)blockDim.x / WARP);
}

// Whether arrays of C columns can be accessed in packets of N elements: each row begins on a multiple of a packet.
inline bool in_packets(int64_t C, int N, std::initializer_list<Array> arrays) {
    bool fits = C % N == 0;
    for (const Array& a : arrays) {
        int bytes = N * bytes_of(a.type) < 16 ? N * bytes_of(a.type) : 16;
        fits = fits && reinterpret_cast<uintptr_t>(a.data) % (uintptr_t)bytes == 0;
    }
    return fits;
}

// Call run.operator()<T, S, W, N>() for the element types of values and of the residual stream, the type of weights and
// the packet that suit the arrays: types as they are where `typed`, that is where all of `arrays` but the weights have
// one of the first two, else types are looked up. Of mixtures, what autocast makes has an instance: a stream and
// weights in fp32 beside values of 16 bits, in packets of 4, so that a warp's accesses of either are contiguous.
template <class Run>
void with_types(Type value, Type stream, Type vector, bool typed, int64_t C, std::initializer_list<Array> arrays,
                Run run) {
    if (typed && value == stream && in_packets(C, 16 / bytes_of(value), arrays)) {
        if (value == Type::FLOAT32 && vector == value) return run.template operator()<float, float, float, 4>();
        if (value == Type::BFLOAT16 && vector == value) return run.template operator()<bf16, bf16, bf16, 8>();
        if (value == Type::BFLOAT16 && vector == Type::FLOAT32) return run.template operator()<bf16, bf16, float, 8>();
        if (value == Type::FLOAT16 && vector == value) return run.template operator()<fp16, fp16, fp16, 8>();
        if (value == Type::FLOAT16 && vector == Type::FLOAT32) return run.template operator()<fp16, fp16, float, 8>();
    }
    bool packets = in_packets(C, 4, arrays);
    if (typed && packets && value != stream && stream == Type::FLOAT32 && vector == stream) {
        if (value == Type::BFLOAT16) return run.template operator()<bf16, float, float, 4>();
        return run.template operator()<fp16, float, float, 4>();
    }
    if (packets) return run.template operator()<any, any, any, 4>();
    return run.template operator()<any, any, any, 1>();
}

}  // namespace gptkernels
