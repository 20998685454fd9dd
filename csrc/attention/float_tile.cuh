// Tiles of fp32 rows for the CUDA attention kernels, whose products are plain multiply-adds: TF32 would lose 13 bits.
//
// A block of 16 x 16 threads owns ROWS rows and streams tiles of COLUMNS rows past them. Thread (y, x) has rows y RM +
// i; of a score tile the columns x + 16 j, of an output the packets x + 16 c. Rows in shared memory are a packet longer
// than D, so that one packet of eight rows in turn lies in different banks. Every sum over a tile is formed by itself
// and then added to what came before: a sum of pieces errs by their length and their number, not by its whole length.
#pragma once

#include "attention/attention_cuda.h"
#include "attention/dropout.cuh"
#include "attention/tile.cuh"

namespace gptkernels {

template <int D_, bool DROPOUT_, int RM_, int RN_>
struct FloatTile {
    static constexpr int D = D_, RM = RM_, RN = RN_, ROWS = 16 * RM, COLUMNS = 16 * RN, THREADS = 256;
    static constexpr bool DROPOUT = DROPOUT_;
    static constexpr int LD = D + 4, LW = COLUMNS + 4, PACKETS = D / 64;
    using Scores = float[RM][RN];
    using Outputs = float[RM][4 * PACKETS];
};

// ROWS rows of a head from `first` on, times a factor; zero beyond the last one and D.
template <class Tile, int ROWS>
DEVICE void load_rows(const Heads<const float>& from, int b, int h, int first, int end, int D_in_memory, float factor,
                      Shared<float> tile) {
    constexpr int LANES = Tile::D / 4;
    Global<const float> head = from.head(b, h);
    for (int i = threadIdx.x; i < ROWS * LANES; i += Tile::THREADS) {
        int row = i / LANES, column = i % LANES * 4;
        Vector<float, 4> x = {};
        if (first + row < end && column < D_in_memory) x = load<4>(head + ((first + row) * from.stride_t + column));
        UNROLL
        for (int e = 0; e < 4; ++e) x[e] *= factor;
        store(tile + (row * Tile::LD + column), x);
    }
}

// s = rows of a times rows of b, both D long.
template <class Tile>
DEVICE void inner_products(typename Tile::Scores& s, Shared<float> a, Shared<float> b) {
    constexpr int RM = Tile::RM, RN = Tile::RN, LD = Tile::LD, PIECE = 32;
    a = a + threadIdx.x / 16 * RM * LD;
    b = b + threadIdx.x % 16 * LD;
    UNROLL
    for (int i = 0; i < RM; ++i) UNROLL
    for (int j = 0; j < RN; ++j) s[i][j] = 0.0f;
    for (int begin = 0; begin < Tile::D; begin += PIECE) {
        typename Tile::Scores piece = {};
        UNROLL
        for (int d = begin; d < begin + PIECE; d += 4) {
            Vector<float, 4> x[RM], y[RN];
            UNROLL
            for (int i = 0; i < RM; ++i) x[i] = load<4>(a + (i * LD + d));
            UNROLL
            for (int j = 0; j < RN; ++j) y[j] = load<4>(b + (16 * j * LD + d));
            UNROLL
            for (int e = 0; e < 4; ++e) UNROLL
            for (int i = 0; i < RM; ++i) UNROLL
            for (int j = 0; j < RN; ++j) piece[i][j] += x[i][e] * y[j][e];
        }
        UNROLL
        for (int i = 0; i < RM; ++i) UNROLL
        for (int j = 0; j < RN; ++j) s[i][j] += piece[i][j];
    }
}

// A score tile into shared memory, for the product that sums over its columns.
template <class Tile>
DEVICE void store_scores(const typename Tile::Scores& s, Shared<float> tile) {
    int y = threadIdx.x / 16, x = threadIdx.x % 16;
    UNROLL
    for (int i = 0; i < Tile::RM; ++i) UNROLL
    for (int j = 0; j < Tile::RN; ++j) tile[(y * Tile::RM + i) * Tile::LW + x + 16 * j] = s[i][j];
}

// sums = alpha * sums + weights times the streamed rows.
template <class Tile>
DEVICE void add_weighted(typename Tile::Outputs& sums, const float (&alpha)[Tile::RM], Shared<float> weights,
                         Shared<float> rows) {
    constexpr int RM = Tile::RM, PACKETS = Tile::PACKETS;
    weights = weights + threadIdx.x / 16 * RM * Tile::LW;
    rows = rows + threadIdx.x % 16 * 4;
    typename Tile::Outputs product = {};
    for (int n = 0; n < Tile::COLUMNS; n += 4) {
        Vector<float, 4> w[RM];
        UNROLL
        for (int i = 0; i < RM; ++i) w[i] = load<4>(weights + (i * Tile::LW + n));
        UNROLL
        for (int k = 0; k < 4; ++k) UNROLL
        for (int c = 0; c < PACKETS; ++c) {
            Vector<float, 4> x = load<4>(rows + ((n + k) * Tile::LD + 64 * c));
            UNROLL
            for (int i = 0; i < RM; ++i) UNROLL
            for (int e = 0; e < 4; ++e) product[i][4 * c + e] += w[i][k] * x[e];
        }
    }
    UNROLL
    for (int i = 0; i < RM; ++i) UNROLL
    for (int e = 0; e < 4 * PACKETS; ++e) sums[i][e] = alpha[i] * sums[i][e] + product[i][e];
}

// Outputs, each row times its factor, to rows [first, ..) of a head.
template <class Tile>
DEVICE void store_outputs(const typename Tile::Outputs& sums, const float (&factor)[Tile::RM], const Heads<float>& to,
                          int b, int h, int first, int end, int D_in_memory) {
    Global<float> head = to.head(b, h);
    UNROLL
    for (int i = 0; i < Tile::RM; ++i) UNROLL
    for (int c = 0; c < Tile::PACKETS; ++c) {
        int row = first + (int)threadIdx.x / 16 * Tile::RM + i, column = (int)threadIdx.x % 16 * 4 + 64 * c;
        Vector<float, 4> x;
        UNROLL
        for (int e = 0; e < 4; ++e) x[e] = factor[i] * sums[i][4 * c + e];
        if (row < end && column < D_in_memory) store(head + (row * to.stride_t + column), x);
    }
}

// Over the 16 threads that share a row.
DEVICE float row_sum(float x) {
    UNROLL
    for (int distance = 1; distance < 16; distance *= 2) x += __shfl_xor_sync(FULL_WARP, x, distance);
    return x;
}
DEVICE float row_max(float x) {
    UNROLL
    for (int distance = 1; distance < 16; distance *= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, distance));
    return x;
}

// Whether dropout keeps an element; the row is counted on the keys' axis.
DEVICE bool keeps(const Dropout& dropout, int row, int column) {
    return dropout.quad(column / 4, row) >> column % 4 & 1;
}

}  // namespace gptkernels
