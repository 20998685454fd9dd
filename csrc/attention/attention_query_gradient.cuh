// Causal attention backward, first of two kernels: dq (Dao et al. 2022, arXiv 2205.14135, appendix B.4).
//
//     dq = scale dS K, with dS as in gradient.cuh
//
// Tiling: a block owns query rows of a head, the longest first; K and V stream past, the next tile by cp.async while
// this one is worked on. Q's fragments (and dout's, up to D = 64) are loaded once. It also leaves lse and delta of its
// rows for the second kernel, which needs them for rows that it does not own. Cost: 3 products a tile, so 3 B H T^2 D
// flops; reads as the forward. Deterministic: the 7 products of both kernels, instead of 5 in one, buy sums with one
// owner and no fp32 copy of dq.
#pragma once

#include "attention/gradient.cuh"

namespace gptkernels {

template <class Tile>
struct QueryGradientMemory {
    static constexpr bool KEEP_Q = Tile::SPLIT > 1 || Tile::D <= 64, KEEP_DOUT = Tile::D <= 64;
    static constexpr int Q = 0, DOUT = Q + Tile::OWNED * Tile::ROW_BYTES,
                         STREAMED = DOUT + Tile::OWNED * Tile::ROW_BYTES, STAGE = 2 * Tile::STREAM * Tile::ROW_BYTES,
                         TERMS = STREAMED + Tile::STAGES * STAGE, BYTES = TERMS + 2 * Tile::OWNED * 4;
    // The exchange takes Q's place.
    static_assert(Tile::SPLIT == 1 || (KEEP_Q && Tile::EXCHANGE <= DOUT));
};

// dS of a warp's tile. Scores in, p holds them; dp starts at -delta, or at 0 with dropout.
template <class Tile>
struct QueryGradientRows {
    static constexpr int M_TILES = Tile::M_TILES, N_TILES = Tile::N_TILES;
    Shared<float> terms;  // of the lane's first row; read for each tile, since registers are dear

    DEVICE QueryGradientRows(Shared<float> all, int row, int lane) : terms(all + (row + lane / 4)) {}
    DEVICE float lse(int i, int r) const { return terms[16 * i + 8 * r]; }
    DEVICE float delta(int i, int r) const { return terms[Tile::OWNED + 16 * i + 8 * r]; }

    DEVICE void start(float (&dp)[M_TILES][N_TILES][4]) const {
        UNROLL
        for (int i = 0; i < M_TILES; ++i) UNROLL
        for (int r = 0; r < 2; ++r) {
            float first = Tile::DROPOUT ? 0.0f : -delta(i, r);
            UNROLL
            for (int j = 0; j < N_TILES; ++j) dp[i][j][2 * r] = dp[i][j][2 * r + 1] = first;
        }
    }

    // s becomes P; where MASKED, column c of row r is seen if c <= r + diagonal.
    template <bool MASKED>
    DEVICE void weights(float (&s)[M_TILES][N_TILES][4], float scale_log2, int diagonal, int lane) const {
        UNROLL
        for (int i = 0; i < M_TILES; ++i) {
            int seen = diagonal + 16 * i + lane / 4 - lane % 4 * 2;
            float from[2] = {lse(i, 0), lse(i, 1)};
            UNROLL
            for (int j = 0; j < N_TILES; ++j) UNROLL
            for (int e = 0; e < 4; ++e) {
                float p = exp2_approx(s[i][j][e] * scale_log2 - from[e / 2]);
                s[i][j][e] = MASKED && 8 * j + e % 2 > seen + e / 2 * 8 ? 0.0f : p;
            }
        }
    }

    DEVICE void drop(float (&dp)[M_TILES][N_TILES][4], const Dropout& dropout, float keep_scale, int row, int column,
                     int lane) const {
        UNROLL
        for (int i = 0; i < M_TILES; ++i) {
            uint32_t keep = dropout.rows_by_columns<N_TILES>(row + 16 * i, column, lane);
            float d[2] = {delta(i, 0), delta(i, 1)};
            UNROLL
            for (int j = 0; j < N_TILES; ++j) UNROLL
            for (int e = 0; e < 4; ++e)
                dp[i][j][e] = (keep >> (4 * j + e) & 1 ? dp[i][j][e] * keep_scale : 0.0f) - d[e / 2];
        }
    }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::THREADS, 1)
    attention_query_gradient(Heads<const typename Tile::T> dout, Heads<const typename Tile::T> q,
                             Heads<const typename Tile::T> k, Heads<const typename Tile::T> v,
                             Heads<const typename Tile::T> out, Global<const float> stats, Global<float> terms,
                             Heads<typename Tile::T> dq, Global<const int64_t> seed, AttentionSizes p) {
    using T = typename Tile::T;
    using Memory = QueryGradientMemory<Tile>;
    constexpr int D = Tile::D, OWNED = Tile::OWNED, STREAM = Tile::STREAM, STAGES = Tile::STAGES,
                  THREADS = Tile::THREADS, M_TILES = Tile::M_TILES, N_TILES = Tile::N_TILES, TILE = STREAM * D,
                  Q_KEPT = Memory::KEEP_Q ? D / 16 : 1, DOUT_KEPT = Memory::KEEP_DOUT ? D / 16 : 1;
    // With one stage, where a thread stands and what it copies are found anew for each tile: beside Q's fragments there
    // are no registers for them. On sm_120 none are left at D = 64 either for the copies and their head.
    constexpr bool FIND_AGAIN = STAGES == 1, FEWER = ARCH >= 120 && D == 64, FIND_COPIES = FIND_AGAIN || FEWER;
    if constexpr (Memory::BYTES > MOST_SHARED) return;
    const Place<Tile> kept(threadIdx.x);
    const int m = (gridDim.x - 1 - blockIdx.x) * OWNED, h = blockIdx.y, b = blockIdx.z;
    const int offset = p.S - p.T, free = (m + offset + 1 > 0 ? m + offset + 1 : 0) / STREAM * STREAM;
    const int last = m + OWNED + offset < p.S ? m + OWNED + offset : p.S;

    Shared<T> q_tile = dynamic_shared<T>(Memory::Q, OWNED * D), dout_tile = dynamic_shared<T>(Memory::DOUT, OWNED * D);
    Shared<T> streamed = dynamic_shared<T>(Memory::STREAMED, 2 * STAGES * TILE);  // K and V of each stage
    Shared<float> row_memory = dynamic_shared<float>(Memory::TERMS, 2 * OWNED);
    Shared<uint32_t> exchange = q_tile.template as<uint32_t>();
    Copy<T, D, OWNED, THREADS> q_rows(q, b, h, m, p.T, p.D), dout_rows(dout, b, h, m, p.T, p.D);
    Copy<T, D, STREAM, THREADS> k_rows(k, b, h, 0, p.S, p.D), v_rows(v, b, h, 0, p.S, p.D);
    auto start = [&](int n, int stage) {
        Shared<T> tile = streamed + 2 * stage * TILE;
        if constexpr (FIND_COPIES) {
            const unsigned thread = again(threadIdx.x);
            const int head = FEWER ? again(h) : h;
            Copy<T, D, STREAM, THREADS>(k, b, head, n, p.S, p.D, thread).start(tile, n);
            Copy<T, D, STREAM, THREADS>(v, b, head, n, p.S, p.D, thread).start(tile + TILE, n);
        } else {
            k_rows.start(tile, n);
            v_rows.start(tile + TILE, n);
        }
    };

    q_rows.start(q_tile, m);
    dout_rows.start(dout_tile, m);
    cp_async_commit();
    if (STAGES > 1 && last > 0) start(0, 0);
    cp_async_commit();
    terms = terms + ((int64_t)b * p.H + h) * 2 * rows_of_terms(p) + m;
    row_terms<T, D, OWNED, THREADS>(
        dout, out, stats, b, h, m, p,
        [&](int row, float lse) {
            terms[row] = lse;
            // A row that sees one key has a weight of 1 whatever its score: its gradient is 0, not a rounding error.
            row_memory[row] = m + row + offset == 0 ? INFINITY : lse;
        },
        [&](int row, float delta) {
            terms[rows_of_terms(p) + row] = delta;
            row_memory[OWNED + row] = delta;
        });
    cp_async_wait<1>();
    __syncthreads();

    uint32_t q_kept[Q_KEPT][M_TILES][4], dout_kept[DOUT_KEPT][M_TILES][4];
    {
        const Shared<T> q_place = left_place<D>(q_tile, kept.lane) + kept.row * D;
        const Shared<T> dout_place = left_place<D>(dout_tile, kept.lane) + kept.row * D;
        UNROLL
        for (int i = 0; i < M_TILES; ++i) {
            if (Memory::KEEP_Q) UNROLL
            for (int s = 0; s < Q_KEPT; ++s) load_left<D>(q_kept[s][i], q_place, 16 * i, s);
            if (Memory::KEEP_DOUT) UNROLL
            for (int s = 0; s < DOUT_KEPT; ++s) load_left<D>(dout_kept[s][i], dout_place, 16 * i, s);
        }
    }

    const Dropout dropout = {Tile::DROPOUT ? (uint64_t)seed[0] : 0, p.drop_below, (uint32_t)h, (uint32_t)b};
    const float scale_log2 = p.scale * LOG2E;
    float acc[M_TILES][Tile::D_TILES][4] = {};
    int stage = 0;
    auto keys = [&](int n, auto masked) {
        constexpr bool MASKED = decltype(masked)::value;
        const Place<Tile> place = FIND_AGAIN ? Place<Tile>(again(threadIdx.x)) : kept;
        const int lane = place.lane;
        const Shared<T> q_place = left_place<D>(q_tile, lane) + place.row * D;
        const Shared<T> dout_place = left_place<D>(dout_tile, lane) + place.row * D;
        auto q_left = [&](uint32_t (&a)[4], int i, int s) {
            if (Memory::KEEP_Q) UNROLL
            for (int e = 0; e < 4; ++e) a[e] = q_kept[s % Q_KEPT][i][e];
            else load_left<D>(a, q_place, 16 * i, s);
        };
        auto dout_left = [&](uint32_t (&a)[4], int i, int s) {
            if (Memory::KEEP_DOUT) UNROLL
            for (int e = 0; e < 4; ++e) a[e] = dout_kept[s % DOUT_KEPT][i][e];
            else load_left<D>(a, dout_place, 16 * i, s);
        };
        const QueryGradientRows<Tile> rows(row_memory, place.row, lane);
        const int diagonal = m + place.row + offset - n;  // of the group's first row
        const bool seen = !MASKED || diagonal + Tile::WARP_ROWS > 0;
        if (STAGES == 1) {
            __syncthreads();  // all have done with the last tile
            start(n, 0);
            cp_async_commit();
        }
        cp_async_wait<0>();
        __syncthreads();  // this tile is there, and all have done with the other stage
        if (STAGES > 1 && n + STREAM < last) start(n + STREAM, 1 - stage);
        cp_async_commit();
        Shared<T> k_tile = streamed + 2 * stage * TILE, v_tile = k_tile + TILE;
        Fragments<Tile> ds;
        if (seen) {
            float s[M_TILES][N_TILES][4] = {}, dp[M_TILES][N_TILES][4];
            const int column = place.part * Tile::PART;
            inner_product<D>(s, q_left, right_place<D>(k_tile, lane) + column * D);
            rows.template weights<MASKED>(s, scale_log2, diagonal - column, lane);
            rows.start(dp);
            inner_product<D>(dp, dout_left, right_place<D>(v_tile, lane) + column * D);
            if (Tile::DROPOUT) rows.drop(dp, dropout, p.keep_scale, m + place.row + offset, n + column, lane);
            UNROLL
            for (int i = 0; i < M_TILES; ++i) UNROLL
            for (int j = 0; j < N_TILES; ++j) UNROLL
            for (int e = 0; e < 4; ++e) s[i][j][e] *= dp[i][j][e];
            ds.pack(s);
            if (Tile::SPLIT > 1) ds.give(exchange, place);
        }
        if (Tile::SPLIT > 1) __syncthreads();
        if (seen)
            ds.add_product(acc, left_place<D>(k_tile, lane) + place.part * Tile::COLUMNS, place,
                           Exchange<Tile>{exchange, place});
        if (STAGES > 1) stage = 1 - stage;
    };
    for (int n = 0; n < free; n += STREAM) keys(n, std::false_type());
    for (int n = free; n < last; n += STREAM) keys(n, std::true_type());

    cp_async_wait<0>();
    __syncthreads();
    const Place<Tile> place(again(threadIdx.x));  // no register keeps it during the loops
    store_gradient<Tile>(acc, p.scale, dout_tile, place);
    __syncthreads();
    copy_out<T, D, OWNED, THREADS>(dout_tile, dq, b, h, m, p.T, p.D);
}

}  // namespace gptkernels
