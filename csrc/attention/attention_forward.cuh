// Causal attention forward on tensor cores: online softmax over tiles of keys (Dao 2023, arXiv 2307.08691).
//
//     out = dropout(softmax(scale Q K^T, causal)) V;  stats: m and l = sum of exp(score - m) of each row
//
// Tiling: a block owns BLOCK_M query rows of a head, the last and longest rows first; a warp owns 16 M_TILES of them,
// so its softmax needs no other warp. K and V stream through shared memory by cp.async, a tile of BLOCK_N keys each:
// the next V is on its way during Q K^T and the softmax, the next K during P V. Two row tiles a warp (M_TILES = 2) let
// each ldmatrix of K and V feed four products: 1 shared-memory cycle a product, where the tensor core takes 2. The
// maximum is lazy: exponentials are taken against a shift that follows the row's maximum only when that has grown by
// more than LAZY powers of two, which a vote of the warp finds; then, rarely, sums are rescaled. The shift cancels in
// out, fp32 holds 2^LAZY times the sums with ease, and a row's shift depends on nothing but the row. It is m in stats.
// Cost: 2 B H T^2 D flops; reads q once, k and v T / BLOCK_M times from the L2 cache. Bound by the tensor cores.
// Deterministic.
#pragma once

#include "attention/dropout.cuh"
#include "attention/tile.cuh"

namespace gptkernels {

template <class T_, int D_, bool DROPOUT_, int M_TILES_, int WARPS, int BLOCK_N_>
struct ForwardTile {
    using T = T_;
    // On sm_75 no registers are left for scores of 64 keys beside accumulators of 128 columns.
    static constexpr int D = D_, M_TILES = M_TILES_, WARP_M = 16 * M_TILES, BLOCK_M = WARP_M * WARPS,
                         BLOCK_N = ARCH < 80 && D == 128 ? 32 : BLOCK_N_, THREADS = 32 * WARPS;
    static constexpr bool DROPOUT = DROPOUT_;
    // Fragments of Q, M_TILES of each of D / 16 steps, that stay in registers: as many as the accumulators leave room
    // for, at D = 128 one (none on sm_90, where it would spill).
    static constexpr int KEPT = M_TILES * D <= 128 ? D / 16 * M_TILES : D == 128 && ARCH != 90 ? 1 : 0;
    static constexpr int SHARED_BYTES = (BLOCK_M + 2 * BLOCK_N) * D * (int)sizeof(T);
};

// What a warp knows of its rows: accumulators, and of a lane's two rows of each row tile the shift and the lane's own
// sum.
template <class Tile>
struct ForwardRows {
    static constexpr int M_TILES = Tile::M_TILES, N_TILES = Tile::BLOCK_N / 8, D_TILES = Tile::D / 8;
    static constexpr float LAZY = 8.0f, NEVER = -3e38f;

    float acc[M_TILES][D_TILES][4] = {};
    float sum[M_TILES][2] = {}, shift[M_TILES][2];

    DEVICE ForwardRows() {
        UNROLL
        for (int i = 0; i < M_TILES; ++i) shift[i][0] = shift[i][1] = NEVER;
    }

    // Scores that the mask hides become -inf: column c of the tile is seen by row r if c <= r + diagonal.
    DEVICE static void mask(float (&s)[M_TILES][N_TILES][4], int diagonal, int lane) {
        UNROLL
        for (int i = 0; i < M_TILES; ++i) {
            int seen = diagonal + 16 * i + lane / 4 - lane % 4 * 2;
            UNROLL
            for (int j = 0; j < N_TILES; ++j) UNROLL
            for (int e = 0; e < 4; ++e)
                if (8 * j + e % 2 > seen + e / 2 * 8) s[i][j][e] = -INFINITY;
        }
    }

    DEVICE bool outgrown(float m, float from, float scale_log2) const { return m * scale_log2 - LAZY > from; }

    // Moves the shifts of rows whose maximum has outgrown them, with all that was summed under the old ones.
    DEVICE void rescale(const float (&largest)[M_TILES][2], float scale_log2) {
        UNROLL
        for (int i = 0; i < M_TILES; ++i) {
            float factor[2];
            UNROLL
            for (int r = 0; r < 2; ++r) {
                float m = largest[i][r];
                m = fmaxf(m, __shfl_xor_sync(FULL_WARP, m, 1));
                m = fmaxf(m, __shfl_xor_sync(FULL_WARP, m, 2));
                float before = shift[i][r];
                if (outgrown(m, before, scale_log2)) shift[i][r] = m * scale_log2;
                factor[r] = exp2_approx(before - shift[i][r]);
                sum[i][r] *= factor[r];
            }
            UNROLL
            for (int j = 0; j < D_TILES; ++j) UNROLL
            for (int e = 0; e < 4; ++e) acc[i][j][e] *= factor[e / 2];
        }
    }

    // Scores become weights, up to a factor of each row.
    DEVICE void softmax(float (&s)[M_TILES][N_TILES][4], float scale_log2) {
        float largest[M_TILES][2];
        bool move = false;
        UNROLL
        for (int i = 0; i < M_TILES; ++i) UNROLL
        for (int r = 0; r < 2; ++r) {
            largest[i][r] = fmaxf(s[i][0][2 * r], s[i][0][2 * r + 1]);
            UNROLL
            for (int j = 1; j < N_TILES; ++j)
                largest[i][r] = fmaxf(fmaxf(largest[i][r], s[i][j][2 * r]), s[i][j][2 * r + 1]);
            move |= outgrown(largest[i][r], shift[i][r], scale_log2);
        }
        if (__any_sync(FULL_WARP, move)) rescale(largest, scale_log2);
        UNROLL
        for (int i = 0; i < M_TILES; ++i) UNROLL
        for (int j = 0; j < N_TILES; ++j) UNROLL
        for (int e = 0; e < 4; ++e) {
            float p = exp2_approx(s[i][j][e] * scale_log2 - shift[i][e / 2]);
            sum[i][e / 2] += p;
            s[i][j][e] = p;
        }
    }

    DEVICE static void drop(float (&p)[M_TILES][N_TILES][4], const Dropout& dropout, int row, int column, int lane) {
        UNROLL
        for (int i = 0; i < M_TILES; ++i) {
            uint32_t keep = dropout.rows_by_columns<N_TILES>(row + 16 * i, column, lane);
            UNROLL
            for (int j = 0; j < N_TILES; ++j) UNROLL
            for (int e = 0; e < 4; ++e)
                if (!(keep >> (4 * j + e) & 1)) p[i][j][e] = 0.0f;
        }
    }

    // Writes out and stats of the warp's rows, out by way of its own rows of a tile.
    DEVICE void finish(Shared<typename Tile::T> tile, int warp_row, int row, const AttentionSizes& p,
                       Global<float> stats, int lane) {
        UNROLL
        for (int i = 0; i < M_TILES; ++i) {
            float inverse[2];
            UNROLL
            for (int r = 0; r < 2; ++r) {
                float l = sum[i][r];
                UNROLL
                for (int x = 1; x <= 2; x *= 2) l += __shfl_xor_sync(FULL_WARP, l, x);
                inverse[r] = l == 0.0f ? 0.0f : p.keep_scale / l;
                int at = row + 16 * i + 8 * r + lane / 4;
                if (at < p.T && lane % 4 == 0)
                    store(stats + 2 * at, Vector<float, 2>{l == 0.0f ? -INFINITY : shift[i][r] * LN2, l});
            }
            store_rows<Tile::D>(acc[i], inverse[0], inverse[1], tile, warp_row + 16 * i, 0, lane);
        }
    }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::THREADS, 1)
    attention_forward(Heads<const typename Tile::T> q, Heads<const typename Tile::T> k, Heads<const typename Tile::T> v,
                      Heads<typename Tile::T> out, Global<float> stats, Global<const int64_t> seed, AttentionSizes p) {
    using T = typename Tile::T;
    constexpr int D = Tile::D, BLOCK_M = Tile::BLOCK_M, BLOCK_N = Tile::BLOCK_N, THREADS = Tile::THREADS,
                  M_TILES = Tile::M_TILES, N_TILES = BLOCK_N / 8, KEPT = Tile::KEPT;
    if constexpr (Tile::SHARED_BYTES > MOST_SHARED) return;
    const int lane = threadIdx.x % 32, warp_row = __shfl_sync(FULL_WARP, (int)threadIdx.x / 32, 0) * Tile::WARP_M;
    const int m = (gridDim.x - 1 - blockIdx.x) * BLOCK_M, h = blockIdx.y, b = blockIdx.z, offset = p.S - p.T;
    // Keys before `free` are seen by every row of the block; none from `last` on is seen by any.
    const int free = (m + offset + 1 > 0 ? m + offset + 1 : 0) / BLOCK_N * BLOCK_N;
    const int last = m + BLOCK_M + offset < p.S ? m + BLOCK_M + offset : p.S;
    const float scale_log2 = fmaxf(fabsf(p.scale), 1e-30f) * LOG2E;  // of 0, the mask's -inf would become NaN

    Shared<T> q_tile = dynamic_shared<T>(0, BLOCK_M * D);
    Shared<T> k_tile = dynamic_shared<T>(BLOCK_M * D * sizeof(T), BLOCK_N * D);
    Shared<T> v_tile = dynamic_shared<T>((BLOCK_M + BLOCK_N) * D * sizeof(T), BLOCK_N * D);
    Copy<T, D, BLOCK_M, THREADS> q_rows(q, b, h, m, p.T, p.D);
    Copy<T, D, BLOCK_N, THREADS> k_rows(k, b, h, 0, p.S, p.D), v_rows(v, b, h, 0, p.S, p.D);
    // From sm_90 on, what a thread copies of V is found anew for each tile where the scores take 64 registers beside
    // 128 of accumulators: none are left to keep it.
    constexpr bool FIND_AGAIN = ARCH >= 90 && D == 128 && BLOCK_N == 64;
    auto start_v = [&](int n) {
        if constexpr (FIND_AGAIN)
            Copy<T, D, BLOCK_N, THREADS>(v, b, h, n, p.S, p.D, again(threadIdx.x)).start(v_tile, n);
        else v_rows.start(v_tile, n);
    };

    q_rows.start(q_tile, m);
    cp_async_commit();
    if (last > 0) k_rows.start(k_tile, 0);
    cp_async_commit();
    cp_async_wait<1>();
    if (p.scale < 0.0f) q_rows.negate(q_tile);  // the maximum is that of scores before the scale
    __syncthreads();

    uint32_t q_kept[KEPT ? KEPT : 1][4];
    const Shared<T> q_place = left_place<D>(q_tile, lane) + warp_row * D, k_place = right_place<D>(k_tile, lane),
                    v_place = left_place<D>(v_tile, lane);
    UNROLL
    for (int f = 0; f < KEPT; ++f) load_left<D>(q_kept[f], q_place, f % M_TILES * 16, f / M_TILES);
    auto left = [&](uint32_t (&a)[4], int i, int s) {
        const int f = s * M_TILES + i;
        if (f < KEPT) UNROLL
        for (int e = 0; e < 4; ++e) a[e] = q_kept[f][e];
        else load_left<D>(a, q_place, 16 * i, s);
    };

    ForwardRows<Tile> rows;
    const Dropout dropout = {Tile::DROPOUT ? (uint64_t)seed[0] : 0, p.drop_below, (uint32_t)h, (uint32_t)b};
    auto keys = [&](int n, auto masked) {
        constexpr bool MASKED = decltype(masked)::value;
        const int diagonal = m + warp_row + offset - n;  // of the warp's first row
        const bool seen = !MASKED || diagonal + Tile::WARP_M > 0;
        cp_async_wait<0>();
        __syncthreads();  // K is there, and all have done with the last V
        start_v(n);
        cp_async_commit();
        float s[M_TILES][N_TILES][4] = {};
        if (seen) {
            inner_product<D>(s, left, k_place);
            if constexpr (MASKED) rows.mask(s, diagonal, lane);
            rows.softmax(s, scale_log2);
            if constexpr (Tile::DROPOUT) rows.drop(s, dropout, m + warp_row + offset, n, lane);
        }
        cp_async_wait<0>();
        __syncthreads();  // V is there, and all have done with K
        if (n + BLOCK_N < last) k_rows.start(k_tile, n + BLOCK_N);
        cp_async_commit();
        if (seen) UNROLL
        for (int step = 0; step < BLOCK_N / 16; ++step) {
            uint32_t a[M_TILES][4];
            UNROLL
            for (int i = 0; i < M_TILES; ++i) pack_left<T>(a[i], s[i], step);
            add_product<D>(rows.acc, a, v_place, 16 * step, 0);
        }
    };
    for (int n = 0; n < free; n += BLOCK_N) keys(n, std::false_type());
    for (int n = free; n < last; n += BLOCK_N) keys(n, std::true_type());

    __syncthreads();  // all have read Q, whose place out takes
    const int again =
        __shfl_sync(FULL_WARP, (int)threadIdx.x / 32, 0) * Tile::WARP_M;  // no register keeps it meanwhile
    rows.finish(q_tile, again, m + again, p, stats + ((int64_t)b * p.H + h) * p.T * 2, lane);
    __syncthreads();
    copy_out<T, D, BLOCK_M, THREADS>(q_tile, out, b, h, m, p.T, p.D);
}

}  // namespace gptkernels
