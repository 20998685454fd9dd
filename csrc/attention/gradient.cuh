// What the two kernels of the CUDA attention backward share.
//
//     P = exp2(scale log2(e) Q K^T - lse);  dP = dout V^T;  delta = rowsum(dout * out);  dS = P * (dP - delta)
//
// A block owns rows (queries or keys) and streams the others past them. A group of SPLIT warps owns 16 M_TILES of its
// rows: for the scores each warp takes its part of the streamed rows, for the gradients its part of the D columns, so
// that the accumulators of 32 rows fit at D = 128 too. Between the two the warps of a group hand each other their score
// fragments through shared memory, in the very form in which registers hold them: lane to lane, 16 bytes each.
#pragma once

#include "attention/attention_cuda.h"
#include "attention/dropout.cuh"
#include "attention/tile.cuh"

namespace gptkernels {

template <class T_, int D_, bool DROPOUT_, int M_TILES_, int GROUPS_, int SPLIT_, int STREAM_, int STAGES_,
          bool ONE_PASS_ = false>
struct GradientTile {
    using T = T_;
    static constexpr int D = D_, M_TILES = M_TILES_, GROUPS = GROUPS_, SPLIT = SPLIT_, STREAM = STREAM_,
                         STAGES = STAGES_;
    static constexpr bool DROPOUT = DROPOUT_, ONE_PASS = ONE_PASS_;
    static constexpr int WARP_ROWS = 16 * M_TILES, OWNED = WARP_ROWS * GROUPS, THREADS = 32 * GROUPS * SPLIT;
    static constexpr int PART = STREAM / SPLIT, COLUMNS = D / SPLIT;
    static constexpr int N_TILES = PART / 8, STEPS = PART / 16, D_TILES = COLUMNS / 8;
    static constexpr int ROW_BYTES = D * (int)sizeof(T);
    // One kind of score fragments of all warps, where they are handed over.
    static constexpr int EXCHANGE = SPLIT > 1 ? OWNED * STREAM * (int)sizeof(T) : 0;
};

// Where a warp and its lane stand in a block.
template <class Tile>
struct Place {
    int lane, row, part;  // the group's first row of the block's, the warp's part of its group

    DEVICE explicit Place(unsigned thread) {
        int warp = __shfl_sync(FULL_WARP, (int)thread / 32, 0);
        lane = thread % 32;
        row = warp / Tile::SPLIT * Tile::WARP_ROWS;
        part = warp % Tile::SPLIT;
    }
    // The fragments that part `part` of this warp's group has, of row tile i and step s.
    DEVICE Shared<uint32_t> fragment(Shared<uint32_t> exchange, int part, int i, int s) const {
        int group = row / Tile::WARP_ROWS;
        return exchange + (((group * Tile::SPLIT + part) * Tile::M_TILES + i) * Tile::STEPS + s) * 128 + lane * 4;
    }
};

// What the warps of a group have given each other, as Fragments::add_product takes it.
template <class Tile>
struct Exchange {
    Shared<uint32_t> memory;
    const Place<Tile>& place;

    DEVICE void operator()(uint32_t (&a)[4], int part, int i, int s) const {
        auto given = load<4>(place.fragment(memory, part, i, s));
        UNROLL
        for (int e = 0; e < 4; ++e) a[e] = given[e];
    }
};

// A warp's tile of scores as left operands.
template <class Tile>
struct Fragments {
    static constexpr int M_TILES = Tile::M_TILES, STEPS = Tile::STEPS;
    uint32_t a[STEPS][M_TILES][4];

    DEVICE void pack(const float (&tile)[M_TILES][Tile::N_TILES][4]) {
        UNROLL
        for (int s = 0; s < STEPS; ++s) UNROLL
        for (int i = 0; i < M_TILES; ++i) pack_left<typename Tile::T>(a[s][i], tile[i], s);
    }

    DEVICE void give(Shared<uint32_t> exchange, const Place<Tile>& place) const {
        UNROLL
        for (int s = 0; s < STEPS; ++s) UNROLL
        for (int i = 0; i < M_TILES; ++i)
            store(place.fragment(exchange, place.part, i, s),
                  Vector<uint32_t, 4>{a[s][i][0], a[s][i][1], a[s][i][2], a[s][i][3]});
    }

    // sums += fragments of all parts times the streamed tile; `rows` points at the warp's columns of its first row, and
    // theirs(a, part, i, s) gives another warp's fragments.
    template <class Theirs>
    DEVICE void add_product(float (&sums)[M_TILES][Tile::D_TILES][4], Shared<typename Tile::T> rows,
                            const Place<Tile>& place, const Theirs& theirs) const {
        constexpr int D = Tile::D;
        UNROLL
        for (int s = 0; s < STEPS; ++s)
            gptkernels::add_product<D>(sums, a[s], rows + place.part * Tile::PART * D, 16 * s, 0);
        UNROLL
        for (int other = 1; other < Tile::SPLIT; ++other) {
            int part = (place.part + other) % Tile::SPLIT;
            UNROLL
            for (int s = 0; s < STEPS; ++s) {
                uint32_t given[M_TILES][4];
                UNROLL
                for (int i = 0; i < M_TILES; ++i) theirs(given[i], part, i, s);
                gptkernels::add_product<D>(sums, given, rows + part * Tile::PART * D, 16 * s, 0);
            }
        }
    }
};

// Rows of the terms (B, H, 2, rows): lse and delta, a whole number of tiles.
DEVICE int rows_of_terms(const AttentionSizes& p) { return (p.T + TERM_ROWS - 1) / TERM_ROWS * TERM_ROWS; }

// lse(row, value) and delta(row, value), by one thread each, for the rows [m, m + ROWS) of a head. lse counts in powers
// of two; it is infinite, so that weights are 0, for rows without a key or beyond T.
template <class T, int D, int ROWS, int THREADS, class Lse, class Delta>
DEVICE void row_terms(const Heads<const T>& dout, const Heads<const T>& out, Global<const float> stats, int b, int h,
                      int m, const AttentionSizes& p, const Lse& lse, const Delta& delta) {
    constexpr int LANES = D / 8, STEP = THREADS / LANES;
    static_assert(ROWS % STEP == 0 && ROWS <= THREADS);
    stats = stats + ((int64_t)b * p.H + h) * p.T * 2;
    if (int row = threadIdx.x; row < ROWS) {
        Vector<float, 2> s = {0.0f, 0.0f};
        if (m + row < p.T) s = load<2>(stats + 2 * (m + row));
        lse(row, s[1] != 0.0f ? s[0] * LOG2E + log2_approx(s[1]) : INFINITY);
    }
    int row = threadIdx.x / LANES, packet = threadIdx.x % LANES * 8;
    Global<const T> x = dout.head(b, h) + ((m + row) * dout.stride_t + packet);
    Global<const T> y = out.head(b, h) + ((m + row) * out.stride_t + packet);
    UNROLL
    for (int i = 0; i < ROWS / STEP; ++i) {
        float sum = 0.0f;
        if (m + row < p.T && packet < p.D) {
            auto a = load<4>(x.template as<const uint32_t>()), c = load<4>(y.template as<const uint32_t>());
            UNROLL
            for (int e = 0; e < 4; ++e) {
                float2 u = unpack2<T>(a[e]), w = unpack2<T>(c[e]);
                sum += u.x * w.x + u.y * w.y;
            }
        }
        UNROLL
        for (int distance = 1; distance < LANES; distance *= 2) sum += __shfl_xor_sync(FULL_WARP, sum, distance);
        if (packet == 0) delta(row, sum);
        row += STEP;
        x = x + STEP * dout.stride_t;
        y = y + STEP * out.stride_t;
    }
}

// The head's rows of a gradient, times a factor, from the warps' accumulators by way of a tile that nobody reads any
// more.
template <class Tile>
DEVICE void store_gradient(const float (&sums)[Tile::M_TILES][Tile::D_TILES][4], float factor,
                           Shared<typename Tile::T> tile, const Place<Tile>& place) {
    UNROLL
    for (int i = 0; i < Tile::M_TILES; ++i)
        store_rows<Tile::D>(sums[i], factor, factor, tile, place.row + 16 * i, place.part * Tile::D_TILES, place.lane);
}

}  // namespace gptkernels
