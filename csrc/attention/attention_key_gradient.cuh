// Causal attention backward, second of two kernels: dk and dv (Dao et al. 2022, arXiv 2205.14135, appendix B.4).
//
//     dv = P^T dout;  dk = scale dS^T Q, with P and dS as in gradient.cuh (with dropout, P in dv and dP carry the mask)
//
// Tiling: a block owns keys of a head; q, dout and the rows' terms stream past, the next tile by cp.async while this
// one is worked on. Scores are computed transposed, keys down: then P^T and dS^T are left operands as they lie in
// registers. Cost: 4 products a tile, so 4 B H T^2 D flops. Deterministic.
#pragma once

#include "attention/one_pass.cuh"

namespace gptkernels {

template <class Tile>
struct KeyGradientMemory {
    static constexpr int K = 0, V = K + Tile::OWNED * Tile::ROW_BYTES, STREAMED = V + Tile::OWNED * Tile::ROW_BYTES,
                         STAGE = 2 * Tile::STREAM * Tile::ROW_BYTES, TERMS = STREAMED + Tile::STAGES * STAGE,
                         P = TERMS + Tile::STAGES * 2 * Tile::STREAM * 4, DS = P + Tile::EXCHANGE,
                         // Fragments for the group's other warps, or the matrix that all warps form dq from.
        DS_BYTES = Tile::ONE_PASS ? OnePass<Tile>::BYTES : Tile::EXCHANGE, BYTES = DS + DS_BYTES;
};

// The queries that stream past: what a thread copies of each tile of q and dout, and of the rows' terms.
template <class Tile>
struct QueryStream {
    using T = typename Tile::T;
    static constexpr int STREAM = Tile::STREAM, TILE = STREAM * Tile::D;

    Copy<T, Tile::D, STREAM, Tile::THREADS> q, dout;
    Global<const float> terms;  // the thread's packet: STREAM / 4 packets are lse, the next as many delta
    unsigned thread;

    DEVICE QueryStream(const Heads<const T>& q, const Heads<const T>& dout, Global<const float> terms, int b, int h,
                       int first, const AttentionSizes& p, unsigned thread)
        : q(q, b, h, first, p.T, p.D, thread), dout(dout, b, h, first, p.T, p.D, thread), thread(thread) {
        const int kind = thread / (STREAM / 4);
        this->terms = terms + ((((int64_t)b * p.H + h) * 2 + kind) * rows_of_terms(p) + thread % (STREAM / 4) * 4);
    }
    // Start copying rows [m, m + STREAM).
    DEVICE void start(Shared<T> tile, Shared<float> row_memory, int m) {
        q.start(tile, m);
        dout.start(tile + TILE, m);
        if (thread < STREAM / 2) cp_async16(row_memory + 4 * (int)thread, terms + m);
    }
};

// P^T and dS^T of a warp's tile: keys down, queries across.
template <class Tile>
struct KeyGradientScores {
    static constexpr int M_TILES = Tile::M_TILES, N_TILES = Tile::N_TILES;
    using Scores = float[M_TILES][N_TILES][4];

    // s becomes P; where MASKED, row r (a key) is seen by column c (a query) if r <= c + diagonal.
    template <bool MASKED>
    DEVICE static void weights(Scores& s, Shared<float> lse, float scale_log2, int diagonal, int lane) {
        UNROLL
        for (int j = 0; j < N_TILES; ++j) {
            auto l = load<2>(lse + (8 * j + lane % 4 * 2));
            UNROLL
            for (int i = 0; i < M_TILES; ++i) {
                int seen = diagonal - 16 * i - lane / 4 + lane % 4 * 2;
                UNROLL
                for (int e = 0; e < 4; ++e) {
                    float p = exp2_approx(s[i][j][e] * scale_log2 - l[e % 2]);
                    s[i][j][e] = MASKED && e / 2 * 8 > seen + 8 * j + e % 2 ? 0.0f : p;
                }
            }
        }
    }

    // dp starts at -delta: the product then leaves what P is multiplied by.
    DEVICE static void start(Scores& dp, Shared<float> delta, int lane) {
        UNROLL
        for (int j = 0; j < N_TILES; ++j) {
            auto d = load<2>(delta + (8 * j + lane % 4 * 2));
            UNROLL
            for (int i = 0; i < M_TILES; ++i) UNROLL
            for (int e = 0; e < 4; ++e) dp[i][j][e] = -d[e % 2];
        }
    }

    // With dropout it starts at 0, and the mask comes between the product and delta. P without the mask in, with it
    // out.
    DEVICE static void drop(Scores& p, Scores& dp, Shared<float> delta, const uint32_t (&keep)[M_TILES],
                            float keep_scale, int lane) {
        UNROLL
        for (int j = 0; j < N_TILES; ++j) {
            auto d = load<2>(delta + (8 * j + lane % 4 * 2));
            UNROLL
            for (int i = 0; i < M_TILES; ++i) UNROLL
            for (int e = 0; e < 4; ++e) {
                bool kept = keep[i] >> (4 * j + e) & 1;
                dp[i][j][e] = p[i][j][e] * ((kept ? dp[i][j][e] * keep_scale : 0.0f) - d[e % 2]);
                if (!kept) p[i][j][e] = 0.0f;
            }
        }
    }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::THREADS, 1)
    attention_key_gradient(Heads<const typename Tile::T> dout, Heads<const typename Tile::T> q,
                           Heads<const typename Tile::T> k, Heads<const typename Tile::T> v, Global<const float> terms,
                           Heads<typename Tile::T> dk, Heads<typename Tile::T> dv, Global<float> dq_sums,
                           Global<const int64_t> seed, AttentionSizes p) {
    using T = typename Tile::T;
    using Memory = KeyGradientMemory<Tile>;
    using Scores = KeyGradientScores<Tile>;
    constexpr int D = Tile::D, OWNED = Tile::OWNED, STREAM = Tile::STREAM, STAGES = Tile::STAGES,
                  THREADS = Tile::THREADS, M_TILES = Tile::M_TILES, N_TILES = Tile::N_TILES, TILE = STREAM * D;
    if constexpr (Memory::BYTES > MOST_SHARED) return;
    const Place<Tile> kept(threadIdx.x);
    const int n = blockIdx.x * OWNED, h = blockIdx.y, b = blockIdx.z, offset = p.S - p.T;
    // No row before `first` sees any key of the block; every row from `free` on sees all of them.
    const int first = (n - offset > 0 ? n - offset : 0) / STREAM * STREAM;
    const int all_see = n + OWNED - 1 - offset > 0 ? n + OWNED - 1 - offset : 0;
    const int free = all_see < p.T ? (all_see + STREAM - 1) / STREAM * STREAM : p.T;

    Shared<T> k_tile = dynamic_shared<T>(Memory::K, OWNED * D), v_tile = dynamic_shared<T>(Memory::V, OWNED * D);
    Shared<T> streamed = dynamic_shared<T>(Memory::STREAMED, 2 * STAGES * TILE);           // q and dout of each stage
    Shared<float> row_memory = dynamic_shared<float>(Memory::TERMS, STAGES * 2 * STREAM);  // lse and delta of each
    Shared<uint32_t> p_memory = dynamic_shared<uint32_t>(Memory::P, Tile::EXCHANGE / 4);
    Shared<uint32_t> ds_memory = dynamic_shared<uint32_t>(Memory::DS, Memory::DS_BYTES / 4);
    Copy<T, D, OWNED, THREADS> k_rows(k, b, h, n, p.S, p.D), v_rows(v, b, h, n, p.S, p.D);
    // Where registers are too few, things are found anew for each tile:
    //                       up to D = 64             one pass with dropout    one stage
    //   copies and seed     sm_75, or one pass       yes                      yes
    //   a thread's place    yes                      yes                      yes
    //   the same, twice     sm_75, or two passes     with one stage
    //                       from sm_100 on
    // The head is found with the copies in one pass, and for dq's sums where the copies are kept. sm_75 and those from
    // sm_100 on need it for the sums too, and with the copies of 32 rows in two passes.
    constexpr bool NARROW = Tile::SPLIT == 1;
    constexpr bool FIND_AGAIN =
        STAGES == 1 || (NARROW && (Tile::ONE_PASS || ARCH < 80)) || (Tile::ONE_PASS && Tile::DROPOUT);
    constexpr bool FIND_PLACE = FIND_AGAIN || NARROW;
    constexpr bool FIND_TWICE =
        (NARROW && (ARCH < 80 || (ARCH >= 100 && !Tile::ONE_PASS))) || (Tile::ONE_PASS && Tile::DROPOUT && STAGES == 1);
    constexpr bool FIND_HEAD = (ARCH < 80 || ARCH >= 100) && (STREAM == 32 || Tile::ONE_PASS);
    QueryStream<Tile> stream(q, dout, terms, b, h, first, p, threadIdx.x);
    auto start = [&](int m, int stage) {
        if (FIND_AGAIN)
            stream = QueryStream<Tile>(q, dout, terms, b, FIND_HEAD || Tile::ONE_PASS ? again(h) : h, m, p,
                                       again(threadIdx.x));
        stream.start(streamed + 2 * stage * TILE, row_memory + 2 * stage * STREAM, m);
    };

    k_rows.start(k_tile, n);
    v_rows.start(v_tile, n);
    if (STAGES > 1 && first < p.T) start(first, 0);
    cp_async_commit();

    const float scale_log2 = p.scale * LOG2E;
    float dk_acc[M_TILES][Tile::D_TILES][4] = {}, dv_acc[M_TILES][Tile::D_TILES][4] = {};
    const OnePass<Tile> one_pass = {ds_memory.template as<T>()};
    int stage = 0;
    auto queries = [&](int m, auto masked) {
        constexpr bool MASKED = decltype(masked)::value;
        const Place<Tile> place = FIND_PLACE ? Place<Tile>(again(threadIdx.x)) : kept;
        const int lane = place.lane;
        const Shared<T> k_place = left_place<D>(k_tile, lane) + place.row * D;
        const Shared<T> v_place = left_place<D>(v_tile, lane) + place.row * D;
        auto k_left = [&](uint32_t (&a)[4], int i, int s) { load_left<D>(a, k_place, 16 * i, s); };
        auto v_left = [&](uint32_t (&a)[4], int i, int s) { load_left<D>(a, v_place, 16 * i, s); };
        const int diagonal = m + offset - n - place.row;  // of the group's first key
        const bool seen = !MASKED || diagonal + STREAM > 0;
        if (STAGES == 1) {
            __syncthreads();  // all have done with the last tile
            start(m, 0);
            cp_async_commit();
        }
        cp_async_wait<0>();
        __syncthreads();  // this tile is there, and all have done with the other stage
        if (STAGES > 1 && m + STREAM < p.T) start(m + STREAM, 1 - stage);
        cp_async_commit();
        Shared<T> q_tile = streamed + 2 * stage * TILE, dout_tile = q_tile + TILE;
        const int column = place.part * Tile::PART;
        Shared<float> lse = row_memory + 2 * stage * STREAM + column, delta = lse + STREAM;
        Fragments<Tile> weights, ds;
        if (seen) {
            float s[M_TILES][N_TILES][4] = {}, dp[M_TILES][N_TILES][4];
            inner_product<D>(s, k_left, right_place<D>(q_tile, lane) + column * D);
            Scores::template weights<MASKED>(s, lse, scale_log2, diagonal + column, lane);
            if constexpr (Tile::DROPOUT) {
                UNROLL
                for (int i = 0; i < M_TILES; ++i) UNROLL
                for (int j = 0; j < N_TILES; ++j) UNROLL
                for (int e = 0; e < 4; ++e) dp[i][j][e] = 0.0f;
                inner_product<D>(dp, v_left, right_place<D>(dout_tile, lane) + column * D);
                const uint64_t key = (uint64_t)seed[FIND_AGAIN ? again(0) : 0];
                const Dropout dropout = {key, p.drop_below, (uint32_t)h, (uint32_t)b};
                uint32_t keep[M_TILES];
                UNROLL
                for (int i = 0; i < M_TILES; ++i)
                    keep[i] = dropout.columns_by_rows<N_TILES>(m + column + offset, n + place.row + 16 * i, lane);
                Scores::drop(s, dp, delta, keep, p.keep_scale, lane);
            } else {
                Scores::start(dp, delta, lane);
                inner_product<D>(dp, v_left, right_place<D>(dout_tile, lane) + column * D);
                UNROLL
                for (int i = 0; i < M_TILES; ++i) UNROLL
                for (int j = 0; j < N_TILES; ++j) UNROLL
                for (int e = 0; e < 4; ++e) dp[i][j][e] *= s[i][j][e];
            }
            weights.pack(s);
            ds.pack(dp);
            if (Tile::SPLIT > 1) weights.give(p_memory, place);
            if (Tile::ONE_PASS) one_pass.give(dp, place);
            else if (Tile::SPLIT > 1) ds.give(ds_memory, place);
        } else if (Tile::ONE_PASS) one_pass.give({}, place);
        if (Tile::SPLIT > 1 || Tile::ONE_PASS) __syncthreads();
        if (seen) {
            const Place<Tile> here = FIND_TWICE ? Place<Tile>(again(threadIdx.x)) : place;
            const int columns = here.part * Tile::COLUMNS;
            Shared<T> q_place = left_place<D>(q_tile, here.lane) + columns;
            weights.add_product(dv_acc, left_place<D>(dout_tile, here.lane) + columns, here,
                                Exchange<Tile>{p_memory, here});
            if constexpr (Tile::ONE_PASS) ds.add_product(dk_acc, q_place, here, one_pass.fragments(here));
            else ds.add_product(dk_acc, q_place, here, Exchange<Tile>{ds_memory, here});
        }
        if constexpr (Tile::ONE_PASS) {
            one_pass.add(
                k_tile,
                dq_sums + (((int64_t)b * p.H + (FIND_HEAD || !FIND_AGAIN ? again(h) : h)) * rows_of_terms(p) + m) * D);
        }
        if (STAGES > 1) stage = 1 - stage;
    };
    for (int m = first; m < free; m += STREAM) queries(m, std::true_type());
    for (int m = free > first ? free : first; m < p.T; m += STREAM) queries(m, std::false_type());

    cp_async_wait<0>();
    __syncthreads();
    const Place<Tile> place(again(threadIdx.x));  // no register keeps it during the loops
    // One key alone has a weight of 1 whatever its score: its gradient is 0, not a rounding error.
    store_gradient<Tile>(dk_acc, p.S > 1 ? p.scale : 0.0f, k_tile, place);
    store_gradient<Tile>(dv_acc, p.keep_scale, v_tile, place);
    __syncthreads();
    const unsigned thread = FIND_AGAIN ? again(threadIdx.x) : threadIdx.x;
    copy_out<T, D, OWNED, THREADS>(k_tile, dk, b, h, n, p.S, p.D, thread);
    copy_out<T, D, OWNED, THREADS>(v_tile, dv, b, h, n, p.S, p.D, thread);
}

}  // namespace gptkernels
