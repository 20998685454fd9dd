#include "common/gemm.h"

#include <algorithm>

#include "common/pack.h"
#include "common/parallel.h"
#include "common/workspace.h"

namespace gptkernels {
namespace {

// Registers of the inner loop: MR x NV accumulators, NV vectors of B and one broadcast of A must fit into 32 (AVX-512), 16
// (AVX2, SSE2) vector registers. 12 x 2 takes 27, 6 x 2 takes 15; both hide the 4 cycles of an FMA many times over.
constexpr int MR = W == 16 ? 12 : 6;
constexpr int NV = 2;
constexpr int NR = NV * W;

// Units of K that a slice holds. A's panel (MR x KC) then takes 18 KiB of the L1 cache, B's block (KC x NC) at most 576 KiB
// of a 1 MiB L2. Rows of A's panel lie KC + W units apart, so that they do not all fall into one cache set.
constexpr int64_t KC = 384;
constexpr int64_t NC = 384;
constexpr int64_t MC = 1020;
constexpr int64_t A_STRIDE = KC + W;
// Rows of A packed at a time: reading A across k in such pieces uses whole cache lines.
constexpr int64_t A_PANELS = 4;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <Product P>
inline vf multiply_add(vf acc, uint32_t a, vu b) {
#if defined(__AVX512BF16__)
    if constexpr (P == Product::BF16_PAIRS)
        return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#endif
    return acc + bits_of<float>(a) * bits_of<vf>(b);
}

// acc (MR x V vectors) += A's panel times B's panel. ROW and UNIT are the strides of A's panel.
template <Product P, int V, int ROW, int UNIT>
inline void inner_product(vf (&acc)[MR][V], const uint32_t* a, const uint32_t* b, int64_t units) {
    for (int64_t u = 0; u < units; ++u) {
        vu bv[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) memcpy(&bv[v], b + u * NR + v * W, sizeof bv[v]);
#pragma GCC unroll 12
        for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) acc[i][v] = multiply_add<P>(acc[i][v], a[i * ROW + u * UNIT], bv[v]);
    }
}

// One tile of C of one slice of K, added to the sum `from` of the slices before it, if any. A slice starts at zero: adding
// K numbers in pieces errs by a term in KC + K / KC, not in K.
template <Product P, int V, int ROW, int UNIT>
void tile_product(const uint32_t* a, const uint32_t* b, int64_t units, const float* from, float* to) {
    vf acc[MR][V] = {};
    inner_product<P, V, ROW, UNIT>(acc, a, b, units);
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) store(to + i * NR + v * W, from ? acc[i][v] + load(from + i * NR + v * W) : acc[i][v]);
}

struct Problem {
    int64_t M, N, K;
    Factor a, b;
    Epilogue epilogue;
    const void* context;
    int64_t mc, nc;  // size of a task's block of C
};

template <class T>
const T* at(const Factor& f, int64_t i, int64_t k) {
    return static_cast<const T*>(f.data) + (f.k_contiguous ? i * f.ld + k : k * f.ld + i);
}

// Call f with a null pointer of the factor's element type.
template <class F>
void with_type(const Factor& factor, const F& f) {
    if (factor.is_bf16) f((const bf16*)nullptr);
    else f((const float*)nullptr);
}

// All tiles of MR rows of a block with one slice of B.
template <Product P>
void multiply_rows(const Problem& p, const uint32_t* a, const uint32_t* b, int64_t units, int64_t row, int64_t rows,
                   int64_t col, int64_t cols, float* partial, bool first, bool last) {
    for (int64_t j = 0; j < cols; j += NR, b += units * NR) {
        float values[MR * NR];
        float* sums = partial + j * MR;
        const float* from = first ? nullptr : sums;
        float* to = last ? values : sums;
        bool narrow_tile = cols - j <= W;
        if (p.a.k_contiguous)
            narrow_tile ? tile_product<P, 1, A_STRIDE, 1>(a, b, units, from, to)
                        : tile_product<P, NV, A_STRIDE, 1>(a, b, units, from, to);
        else
            narrow_tile ? tile_product<P, 1, 1, MR>(a, b, units, from, to)
                        : tile_product<P, NV, 1, MR>(a, b, units, from, to);
        if (last)
            p.epilogue(p.context, {row, col + j, (int)rows, (int)std::min<int64_t>(cols - j, NR), values, NR});
    }
}

// The block of C of rows [row0, row1) and columns [col0, col1).
template <Product P>
void multiply_block(const Problem& p, int64_t row0, int64_t row1, int64_t col0, int64_t col1) {
    constexpr int64_t slice = KC * PER_UNIT<P>;
    int64_t cols = col1 - col0, padded_cols = ceil_div(cols, NR) * NR;
    uint32_t* b = workspace_of<uint32_t>(Slot::PACK_B, KC * padded_cols);
    // One vector of slack: see pack_a's last store.
    constexpr int64_t panel = MR * A_STRIDE + W;
    uint32_t* a = workspace_of<uint32_t>(Slot::PACK_A, A_PANELS * panel);
    bool split = p.K > slice;
    float* partial = split ? workspace_of<float>(Slot::PARTIAL, ceil_div(row1 - row0, MR) * MR * padded_cols) : nullptr;
    // At least once, so that C is written when K is 0.
    for (int64_t k = 0; k == 0 || k < p.K; k += slice) {
        int64_t depth = std::min(slice, p.K - k), units = ceil_div(depth, PER_UNIT<P>);
        bool first = k == 0, last = k + slice >= p.K;
        with_type(p.b, [&](auto* t) {
            using T = std::remove_cvref_t<decltype(*t)>;
            pack_b<P, T, NR>(at<T>(p.b, col0, k), p.b.ld, p.b.k_contiguous, cols, depth, b);
        });
        for (int64_t block = row0; block < row1; block += A_PANELS * MR) {
            int64_t end = std::min(row1, block + A_PANELS * MR);
            with_type(p.a, [&](auto* t) {
                using T = std::remove_cvref_t<decltype(*t)>;
                for (int64_t row = block; row < end; row += MR)
                    pack_a<P, T, MR>(at<T>(p.a, row, k), p.a.ld, p.a.k_contiguous, std::min<int64_t>(MR, end - row), depth,
                                     a + (row - block) / MR * panel, A_STRIDE);
            });
            for (int64_t row = block; row < end; row += MR) {
                float* sums = split ? partial + (row - row0) * padded_cols : nullptr;
                multiply_rows<P>(p, a + (row - block) / MR * panel, b, units, row, std::min<int64_t>(MR, end - row), col0,
                                 cols, sums, first, last);
            }
        }
    }
}

// Blocks of about equal size, near MC x NC or smaller, whose number suits the threads: a multiple of it, or many.
void choose_blocks(Problem& p) {
    int64_t threads = thread_count();
    int64_t across = ceil_div(p.N, NC), down = ceil_div(p.M, MC);
    int64_t most_down = std::max<int64_t>(1, p.M / (4 * MR));
    while (across * down % threads != 0 && across * down < 8 * threads && down < most_down) ++down;
    p.nc = ceil_div(ceil_div(p.N, across), NR) * NR;
    p.mc = ceil_div(ceil_div(p.M, down), MR) * MR;
}

template <Product P>
void run(const Problem& p) {
    int64_t across = ceil_div(p.N, p.nc), down = ceil_div(p.M, p.mc);
    parallel_for(across * down, [&](int64_t task) {
        int64_t row = task / across * p.mc, col = task % across * p.nc;
        multiply_block<P>(p, row, std::min(p.M, row + p.mc), col, std::min(p.N, col + p.nc));
    });
}

template <class T>
void store_tile(const Output& c, const Tile& t) {
    for (int j = 0; j < t.cols; j += W) {
        int n = std::min(W, t.cols - j);
        vf bias{};
        if (c.bias) {
            bias = c.bias_is_bf16 ? load(static_cast<const bf16*>(c.bias) + t.col + j, n)
                                  : load(static_cast<const float*>(c.bias) + t.col + j, n);
        }
        for (int i = 0; i < t.rows; ++i) {
            T* to = static_cast<T*>(c.data) + (t.row + i) * c.ld + t.col + j;
            vf value = load(t.values + i * t.ld + j) + bias;
            store(to, c.add ? load(to, n) + value : value, n);
        }
    }
}

}  // namespace

void gemm(int64_t M, int64_t N, int64_t K, Factor a, Factor b, bool bf16_product, Epilogue epilogue,
          const void* context) {
    if (M == 0 || N == 0) return;
    Problem p{M, N, K, a, b, epilogue, context, 0, 0};
    choose_blocks(p);
    if (!bf16_product) return run<Product::FP32>(p);
#if defined(__AVX512BF16__)
    run<Product::BF16_PAIRS>(p);
#else
    run<Product::ROUNDED>(p);
#endif
}

void gemm(int64_t M, int64_t N, int64_t K, Factor a, Factor b, bool bf16_product, const Output& c) {
    gemm(
        M, N, K, a, b, bf16_product,
        [](const void* context, const Tile& tile) {
            const Output& c = *static_cast<const Output*>(context);
            c.is_bf16 ? store_tile<bf16>(c, tile) : store_tile<float>(c, tile);
        },
        &c);
}

}  // namespace gptkernels
