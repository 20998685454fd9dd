// dq within the kernel of the key gradient: the backward in one pass of 5 products instead of 7 in two kernels.
//
//     dq = scale dS K, added up in fp32 in global memory by atomics over the blocks of keys: fewer flops, but sums of
//     no fixed order, and a fp32 copy of dq. An explicit option, never a default.
//
// A first kernel (attention_row_terms) leaves lse and delta of each row and clears the sums; a last one
// (attention_finish) rounds them. The sums lie as accumulators do: 16 x 8 tiles of 4 x 32 numbers, a number a lane, so
// that each atomic instruction of a warp fills whole sectors.
#pragma once

#include "attention/gradient.cuh"

namespace gptkernels {

template <class Tile>
struct OnePass {
    using T = typename Tile::T;
    // Each warp forms dq of QUERIES queries and COLUMNS columns of the streamed tile, over all keys of the block.
    static constexpr int D = Tile::D, STREAM = Tile::STREAM, WARPS = Tile::THREADS / 32;
    static constexpr int COLUMNS = D >= 256 ? 64 : D >= 128 ? 32 : 16, QUERIES = STREAM * (D / COLUMNS) / WARPS;
    static constexpr int M_TILES = QUERIES / 16, N_TILES = COLUMNS / 8;
    static constexpr int BYTES = Tile::OWNED * STREAM * (int)sizeof(T);
    static_assert(QUERIES % 16 == 0 && QUERIES <= STREAM);

    Shared<T> ds;  // keys down, queries across

    DEVICE void give(const float (&tile)[Tile::M_TILES][Tile::N_TILES][4], const Place<Tile>& place) const {
        UNROLL
        for (int i = 0; i < Tile::M_TILES; ++i)
            store_rows<STREAM>(tile[i], 1.0f, 1.0f, ds, place.row + 16 * i, place.part * Tile::N_TILES, place.lane);
    }

    // As Exchange: another warp's fragments, from the matrix.
    DEVICE auto fragments(const Place<Tile>& place) const {
        Shared<T> rows = left_place<STREAM>(ds, place.lane) + place.row * STREAM;
        return [rows](uint32_t (&a)[4], int part, int i, int s) {
            load_left<STREAM>(a, rows, 16 * i, part * Tile::STEPS + s);
        };
    }

    // sums += dS K for the streamed tile's queries, whose sums start at `sums`.
    DEVICE void add(Shared<T> k_tile, Global<float> sums) const {
        const unsigned thread = again(threadIdx.x);  // no register keeps these addresses beside dk, dv and the scores
        const int lane = thread % 32, warp = __shfl_sync(FULL_WARP, (int)thread / 32, 0);
        const int query = warp / (D / COLUMNS) * QUERIES, column = warp % (D / COLUMNS) * COLUMNS;
        Shared<T> left = right_place<STREAM>(ds, lane), right = left_place<D>(k_tile, lane);
        sums = sums + ((query / 16 * (D / 8) + column / 8) * 128 + lane);
        float dq[M_TILES][N_TILES][4] = {};
        UNROLL
        for (int key = 0; key < Tile::OWNED; key += 16) {
            uint32_t a[M_TILES][4];
            UNROLL
            for (int i = 0; i < M_TILES; ++i)
                ldmatrix_x4_trans(a[i], Swizzle<STREAM>::step(left, query / 8 + 2 * i) + key * STREAM);
            add_product<D>(dq, a, right, key, column / 8);
        }
        UNROLL
        for (int i = 0; i < M_TILES; ++i) UNROLL
        for (int j = 0; j < N_TILES; ++j) UNROLL
        for (int e = 0; e < 4; ++e) atomicAdd(sums + ((i * (D / 8) + j) * 128 + 32 * e), dq[i][j][e]);
    }
};

// Terms of TERM_ROWS rows, as the query gradient leaves them, and zeros for the sums of dq.
template <class T, int D>
__global__ void __launch_bounds__(256)
    attention_row_terms(Heads<const T> dout, Heads<const T> out, Global<const float> stats, Global<float> terms,
                        Global<float> dq_sums, AttentionSizes p) {
    const int m = blockIdx.x * TERM_ROWS, h = blockIdx.y, b = blockIdx.z, rows = rows_of_terms(p);
    const int64_t head = (int64_t)b * p.H + h;
    terms = terms + (head * 2 * rows + m);
    row_terms<T, D, TERM_ROWS, 256>(
        dout, out, stats, b, h, m, p, [&](int row, float lse) { terms[row] = lse; },
        [&](int row, float delta) { terms[rows + row] = delta; });
    dq_sums = dq_sums + (head * rows + m) * D;
    UNROLL
    for (int i = 0; i < TERM_ROWS * D; i += 1024) store(dq_sums + (i + 4 * (int)threadIdx.x), Vector<float, 4>{});
}

// dq from its sums: a thread rounds a packet.
template <class T, int D>
__global__ void __launch_bounds__(256) attention_finish(Global<const float> dq_sums, Heads<T> dq, AttentionSizes p) {
    const int m = blockIdx.x * TERM_ROWS, h = blockIdx.y, b = blockIdx.z;
    dq_sums = dq_sums + (((int64_t)b * p.H + h) * rows_of_terms(p) + m) * D;
    Global<T> to = dq.head(b, h);
    // A row that sees one key has a weight of 1 whatever its score: its gradient is 0, not a rounding error.
    const int one_key = p.T - p.S;
    // A warp takes eight rows of four packets at a time: whole sectors both ways.
    for (int tile = threadIdx.x / 32; tile < TERM_ROWS / 8 * (D / 32); tile += 8) {
        int row = tile / (D / 32) * 8 + threadIdx.x % 8, packet = tile % (D / 32) * 4 + threadIdx.x % 32 / 8;
        if (m + row >= p.T || packet * 8 >= p.D) continue;
        Global<const float> from = dq_sums + ((row / 16 * (D / 8) + packet) * 128 + row % 16 / 8 * 64 + row % 8 * 4);
        auto even = load<4>(from), odd = load<4>(from + 32);
        float scale = m + row == one_key ? 0.0f : p.scale;
        Vector<uint32_t, 4> packed;
        UNROLL
        for (int e = 0; e < 4; ++e) packed[e] = pack2<T>(scale * even[e], scale * odd[e]);
        store((to + ((m + row) * dq.stride_t + packet * 8)).template as<uint32_t>(), packed);
    }
}

}  // namespace gptkernels
