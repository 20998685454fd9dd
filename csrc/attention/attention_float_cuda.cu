// Causal attention on fp32 numbers, forward and backward (formulas as in attention_forward.cuh and gradient.cuh).
//
// q is multiplied by the scale as it is loaded, in all three kernels alike, so that each finds the same scores and
// stats hold a row's very largest one. expf, not exp2_approx: that one's argument loses digits to the factor. Cost: the
// products' flops at fp32's rate, which binds: 4 to 8 multiply-adds for each shared-memory packet. Deterministic.
#include "attention/float_tile.cuh"
#include "attention/launch.cuh"

namespace gptkernels {
namespace {

// What the three kernels are given; unused pointers are null.
struct FloatArguments {
    Heads<const float> q, k, v, dout, out;
    Heads<float> y, dq, dk, dv;
    Global<float> stats_out;
    Global<const float> stats;
    Global<float> terms_out;  // (B, H, 2, rows): 1/l and delta of each row, from the query gradient
    Global<const float> terms;
    Global<const int64_t> seed;
    AttentionSizes p;

    DEVICE int64_t head(int b, int h) const { return (int64_t)b * p.H + h; }
    DEVICE int rows_of_terms() const { return (p.T + TERM_ROWS - 1) / TERM_ROWS * TERM_ROWS; }
    template <class Tile>
    DEVICE Dropout dropout(int b, int h) const {
        return {Tile::DROPOUT ? (uint64_t)seed[0] : 0, p.drop_below, (uint32_t)h, (uint32_t)b};
    }
};

template <class Tile>
constexpr int FORWARD_BYTES = (Tile::ROWS * (Tile::LD + Tile::LW) + 2 * Tile::COLUMNS * Tile::LD) * 4;
template <class Tile>
constexpr int BACKWARD_BYTES = 2 * (Tile::ROWS * (Tile::LD + Tile::LW) + Tile::COLUMNS * Tile::LD) * 4;

// Scores to weights against the running maximum; l takes their sum in, alpha is what sums before this tile shrink by.
template <class Tile>
DEVICE void softmax(typename Tile::Scores& s, float (&m)[Tile::RM], float (&l)[Tile::RM], float (&alpha)[Tile::RM]) {
    UNROLL
    for (int i = 0; i < Tile::RM; ++i) {
        float largest = m[i], sum = 0.0f;
        UNROLL
        for (int j = 0; j < Tile::RN; ++j) largest = fmaxf(largest, s[i][j]);
        largest = row_max(largest);
        float from = largest == -INFINITY ? 0.0f : largest;  // a row that has seen no key yet: weights 0, not NaN
        alpha[i] = expf(m[i] - from);
        UNROLL
        for (int j = 0; j < Tile::RN; ++j) sum += s[i][j] = expf(s[i][j] - from);
        l[i] = alpha[i] * l[i] + sum;
        m[i] = largest;
    }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::THREADS, 1) attention_float_forward(FloatArguments a) {
    constexpr int RM = Tile::RM, RN = Tile::RN, ROWS = Tile::ROWS, COLUMNS = Tile::COLUMNS, LD = Tile::LD;
    const AttentionSizes& p = a.p;
    const int m0 = (gridDim.x - 1 - blockIdx.x) * ROWS, h = blockIdx.y, b = blockIdx.z, offset = p.S - p.T;
    const int y = threadIdx.x / 16, x = threadIdx.x % 16, last = m0 + ROWS + offset < p.S ? m0 + ROWS + offset : p.S;
    Shared<float> q_tile = dynamic_shared<float>(0, ROWS * LD),
                  k_tile = dynamic_shared<float>(ROWS * LD * 4, COLUMNS * LD);
    Shared<float> v_tile = dynamic_shared<float>((ROWS + COLUMNS) * LD * 4, COLUMNS * LD);
    Shared<float> weights = dynamic_shared<float>((ROWS + 2 * COLUMNS) * LD * 4, ROWS * Tile::LW);
    const Dropout dropout = a.dropout<Tile>(b, h);

    load_rows<Tile, ROWS>(a.q, b, h, m0, p.T, p.D, p.scale, q_tile);
    typename Tile::Outputs acc = {};
    float m[RM], l[RM] = {}, alpha[RM];
    UNROLL
    for (int i = 0; i < RM; ++i) m[i] = -INFINITY;
    for (int n = 0; n < last; n += COLUMNS) {
        __syncthreads();
        load_rows<Tile, COLUMNS>(a.k, b, h, n, p.S, p.D, 1.0f, k_tile);
        load_rows<Tile, COLUMNS>(a.v, b, h, n, p.S, p.D, 1.0f, v_tile);
        __syncthreads();
        typename Tile::Scores s;
        inner_products<Tile>(s, q_tile, k_tile);
        UNROLL
        for (int i = 0; i < RM; ++i) UNROLL
        for (int j = 0; j < RN; ++j)
            if (n + x + 16 * j > m0 + y * RM + i + offset) s[i][j] = -INFINITY;
        softmax<Tile>(s, m, l, alpha);
        if (Tile::DROPOUT) UNROLL
        for (int i = 0; i < RM; ++i) UNROLL
        for (int j = 0; j < RN; ++j)
            if (!keeps(dropout, m0 + y * RM + i + offset, n + x + 16 * j)) s[i][j] = 0.0f;
        store_scores<Tile>(s, weights);
        __syncthreads();
        add_weighted<Tile>(acc, alpha, weights, v_tile);
    }
    float inverse[RM];
    Global<float> stats = a.stats_out + a.head(b, h) * p.T * 2;
    UNROLL
    for (int i = 0; i < RM; ++i) {
        float sum = row_sum(l[i]);
        int row = m0 + y * RM + i;
        inverse[i] = sum == 0.0f ? 0.0f : p.keep_scale / sum;
        if (row < p.T && x == 0) store(stats + 2 * row, Vector<float, 2>{m[i], sum});
    }
    store_outputs<Tile>(acc, inverse, a.y, b, h, m0, p.T, p.D);
}

// delta of rows all of whose keys lie in the first tile, by the very numbers that it is subtracted from: a query that
// sees one key then has a gradient of exactly 0, whatever out was rounded to, and one of few keys no error of its own.
template <class Tile>
DEVICE void delta_of_tile(float (&delta)[Tile::RM], const typename Tile::Scores& weights,
                          const typename Tile::Scores& dp, Global<float> terms, int m, int offset) {
    UNROLL
    for (int i = 0; i < Tile::RM; ++i) {
        int row = m + (int)threadIdx.x / 16 * Tile::RM + i;
        float sum = 0.0f;
        UNROLL
        for (int j = 0; j < Tile::RN; ++j) sum += weights[i][j] * dp[i][j];
        sum = row_sum(sum);
        if (row + offset >= Tile::COLUMNS) continue;
        delta[i] = sum;
        if (threadIdx.x % 16 == 0) terms[row] = sum;
    }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::THREADS, 1) attention_float_query_gradient(FloatArguments a) {
    constexpr int RM = Tile::RM, RN = Tile::RN, ROWS = Tile::ROWS, COLUMNS = Tile::COLUMNS, LD = Tile::LD;
    const AttentionSizes& p = a.p;
    const int m0 = (gridDim.x - 1 - blockIdx.x) * ROWS, h = blockIdx.y, b = blockIdx.z, offset = p.S - p.T;
    const int y = threadIdx.x / 16, x = threadIdx.x % 16, last = m0 + ROWS + offset < p.S ? m0 + ROWS + offset : p.S;
    Shared<float> q_tile = dynamic_shared<float>(0, ROWS * LD),
                  dout_tile = dynamic_shared<float>(ROWS * LD * 4, ROWS * LD);
    Shared<float> k_tile = dynamic_shared<float>(2 * ROWS * LD * 4, COLUMNS * LD);
    Shared<float> v_tile = dynamic_shared<float>((2 * ROWS + COLUMNS) * LD * 4, COLUMNS * LD);
    Shared<float> weights = dynamic_shared<float>(2 * (ROWS + COLUMNS) * LD * 4, ROWS * Tile::LW);
    const Dropout dropout = a.dropout<Tile>(b, h);

    load_rows<Tile, ROWS>(a.q, b, h, m0, p.T, p.D, p.scale, q_tile);
    load_rows<Tile, ROWS>(a.dout, b, h, m0, p.T, p.D, 1.0f, dout_tile);
    __syncthreads();
    float m[RM], inverse[RM], delta[RM], ones[RM], scale[RM];
    Global<float> terms = a.terms_out + a.head(b, h) * 2 * a.rows_of_terms();
    UNROLL
    for (int i = 0; i < RM; ++i) {
        int row = m0 + y * RM + i;
        float sum = 0.0f, l = 0.0f;
        m[i] = 0.0f, ones[i] = 1.0f, scale[i] = p.scale;
        if (row < p.T) {
            auto s = load<2>(a.stats + (a.head(b, h) * p.T + row) * 2);
            m[i] = s[1] == 0.0f ? 0.0f : s[0], l = s[1];
            UNROLL
            for (int d = 4 * x; d < Tile::D; d += 64)
                if (d < p.D) {
                    auto o = load<4>(a.out.head(b, h) + (row * a.out.stride_t + d));
                    auto g = load<4>(dout_tile + ((y * RM + i) * LD + d));
                    UNROLL
                    for (int e = 0; e < 4; ++e) sum += o[e] * g[e];
                }
        }
        delta[i] = row_sum(sum);
        inverse[i] = l == 0.0f ? 0.0f : 1.0f / l;
        if (x == 0) terms[row] = inverse[i], terms[a.rows_of_terms() + row] = delta[i];
    }
    typename Tile::Outputs acc = {};
    for (int n = 0; n < last; n += COLUMNS) {
        __syncthreads();
        load_rows<Tile, COLUMNS>(a.k, b, h, n, p.S, p.D, 1.0f, k_tile);
        load_rows<Tile, COLUMNS>(a.v, b, h, n, p.S, p.D, 1.0f, v_tile);
        __syncthreads();
        typename Tile::Scores s, dp;
        inner_products<Tile>(s, q_tile, k_tile);
        inner_products<Tile>(dp, dout_tile, v_tile);
        UNROLL
        for (int i = 0; i < RM; ++i) UNROLL
        for (int j = 0; j < RN; ++j) {
            int row = m0 + y * RM + i + offset, column = n + x + 16 * j;
            if (Tile::DROPOUT) dp[i][j] = keeps(dropout, row, column) ? dp[i][j] * p.keep_scale : 0.0f;
            s[i][j] = column <= row ? expf(s[i][j] - m[i]) * inverse[i] : 0.0f;
        }
        if (n == 0) delta_of_tile<Tile>(delta, s, dp, terms + a.rows_of_terms(), m0, offset);
        UNROLL
        for (int i = 0; i < RM; ++i) UNROLL
        for (int j = 0; j < RN; ++j) s[i][j] *= dp[i][j] - delta[i];
        store_scores<Tile>(s, weights);
        __syncthreads();
        add_weighted<Tile>(acc, ones, weights, k_tile);
    }
    store_outputs<Tile>(acc, scale, a.dq, b, h, m0, p.T, p.D);
}

template <class Tile>
__global__ void __launch_bounds__(Tile::THREADS, 1) attention_float_key_gradient(FloatArguments a) {
    constexpr int RM = Tile::RM, RN = Tile::RN, ROWS = Tile::ROWS, COLUMNS = Tile::COLUMNS, LD = Tile::LD;
    const AttentionSizes& p = a.p;
    const int n0 = blockIdx.x * ROWS, h = blockIdx.y, b = blockIdx.z, offset = p.S - p.T;
    const int y = threadIdx.x / 16, x = threadIdx.x % 16;
    Shared<float> k_tile = dynamic_shared<float>(0, ROWS * LD),
                  v_tile = dynamic_shared<float>(ROWS * LD * 4, ROWS * LD);
    Shared<float> q_tile = dynamic_shared<float>(2 * ROWS * LD * 4, COLUMNS * LD);
    Shared<float> dout_tile = dynamic_shared<float>((2 * ROWS + COLUMNS) * LD * 4, COLUMNS * LD);
    Shared<float> weights = dynamic_shared<float>(2 * (ROWS + COLUMNS) * LD * 4, ROWS * Tile::LW);
    Shared<float> ds = dynamic_shared<float>((2 * (ROWS + COLUMNS) * LD + ROWS * Tile::LW) * 4, ROWS * Tile::LW);
    const Dropout dropout = a.dropout<Tile>(b, h);
    Global<const float> stats = a.stats + a.head(b, h) * p.T * 2,
                        terms = a.terms + a.head(b, h) * 2 * a.rows_of_terms();

    load_rows<Tile, ROWS>(a.k, b, h, n0, p.S, p.D, 1.0f, k_tile);
    load_rows<Tile, ROWS>(a.v, b, h, n0, p.S, p.D, 1.0f, v_tile);
    typename Tile::Outputs dk_acc = {}, dv_acc = {};
    float ones[RM], one_key[RM], keep_scale[RM];
    // One key alone has a weight of 1 whatever its score: its gradient is 0, not a rounding error.
    UNROLL
    for (int i = 0; i < RM; ++i) ones[i] = 1.0f, one_key[i] = p.S > 1 ? 1.0f : 0.0f, keep_scale[i] = p.keep_scale;
    for (int m = (n0 - offset > 0 ? n0 - offset : 0) / COLUMNS * COLUMNS; m < p.T; m += COLUMNS) {
        __syncthreads();
        load_rows<Tile, COLUMNS>(a.q, b, h, m, p.T, p.D, p.scale, q_tile);
        load_rows<Tile, COLUMNS>(a.dout, b, h, m, p.T, p.D, 1.0f, dout_tile);
        __syncthreads();
        typename Tile::Scores s, dp;
        inner_products<Tile>(s, k_tile, q_tile);
        inner_products<Tile>(dp, v_tile, dout_tile);
        UNROLL
        for (int j = 0; j < RN; ++j) {
            int query = m + x + 16 * j;
            float largest = query < p.T ? stats[2 * query] : -INFINITY;
            float inverse = query < p.T ? terms[query] : 0.0f,
                  delta = query < p.T ? terms[a.rows_of_terms() + query] : 0.0f;
            if (largest == -INFINITY) largest = 0.0f;
            UNROLL
            for (int i = 0; i < RM; ++i) {
                int key = n0 + y * RM + i;
                bool keep = !Tile::DROPOUT || keeps(dropout, query + offset, key);
                float weight = key <= query + offset ? expf(s[i][j] - largest) * inverse : 0.0f;
                if (Tile::DROPOUT) dp[i][j] = keep ? dp[i][j] * p.keep_scale : 0.0f;
                dp[i][j] = weight * (dp[i][j] - delta);
                s[i][j] = keep ? weight : 0.0f;
            }
        }
        store_scores<Tile>(s, weights);
        store_scores<Tile>(dp, ds);
        __syncthreads();
        add_weighted<Tile>(dv_acc, ones, weights, dout_tile);
        add_weighted<Tile>(dk_acc, ones, ds, q_tile);
    }
    store_outputs<Tile>(dk_acc, one_key, a.dk, b, h, n0, p.S, p.D);
    store_outputs<Tile>(dv_acc, keep_scale, a.dv, b, h, n0, p.S, p.D);
}

template <class Tile>
void start(const AttentionCuda& p, const char* name, void (*kernel)(FloatArguments), int64_t rows, int bytes,
           const FloatArguments& a, void* stream) {
    if (rows == 0) return;
    if (bytes > device().shared_bytes) refuse(p, device());
    launch({name, {(rows + Tile::ROWS - 1) / Tile::ROWS, p.H, p.B}, Tile::THREADS, bytes, stream}, kernel, a);
}

// f<Tile>() for the forward's or the backward's tiles.
template <bool FORWARD, class F>
void with_tile(const AttentionCuda& p, const F& f) {
    auto run = [&]<bool DROPOUT>() {
        if (p.D <= 64) f.template operator()<FloatTile<64, DROPOUT, 4, FORWARD ? 4 : 2>>();
        else if (p.D <= 128) f.template operator()<FloatTile<128, DROPOUT, FORWARD ? 4 : 2, 2>>();
        else f.template operator()<FloatTile<256, DROPOUT, FORWARD ? 2 : 1, 1>>();
    };
    p.drop_below ? run.template operator()<true>() : run.template operator()<false>();
}

}  // namespace

void attention_float_forward_cuda(const AttentionCuda& p, HeadsArray q, HeadsArray k, HeadsArray v, HeadsArray out,
                                  float* stats, void* stream) {
    FloatArguments a = {};
    a.q = heads<const float>(q), a.k = heads<const float>(k), a.v = heads<const float>(v), a.y = heads<float>(out);
    a.stats_out = Global<float>(stats), a.seed = Global<const int64_t>(p.seed), a.p = sizes_of(p);
    with_tile<true>(p, [&]<class Tile>() {
        start<Tile>(p, "attention_forward", attention_float_forward<Tile>, p.T, FORWARD_BYTES<Tile>, a, stream);
    });
}

void attention_float_backward_cuda(const AttentionCuda& p, const AttentionBackwardCuda& x, void* stream) {
    FloatArguments a = {};
    a.q = heads<const float>(x.q), a.k = heads<const float>(x.k), a.v = heads<const float>(x.v);
    a.dout = heads<const float>(x.dout), a.out = heads<const float>(x.out);
    a.dq = heads<float>(x.dq), a.dk = heads<float>(x.dk), a.dv = heads<float>(x.dv);
    a.stats = Global<const float>(x.stats), a.terms_out = Global<float>(x.terms),
    a.terms = Global<const float>(x.terms);
    a.seed = Global<const int64_t>(p.seed), a.p = sizes_of(p);
    with_tile<false>(p, [&]<class Tile>() {
        constexpr int BYTES = BACKWARD_BYTES<Tile>;
        start<Tile>(p, "attention_query_gradient", attention_float_query_gradient<Tile>, p.T, BYTES, a, stream);
        start<Tile>(p, "attention_key_gradient", attention_float_key_gradient<Tile>, p.S, BYTES, a, stream);
    });
}

}  // namespace gptkernels
