#include "common/gemm.h"

#include <algorithm>

#include "common/pack.h"
#include "common/parallel.h"
#include "common/workspace.h"

namespace gptkernels {
namespace {

// Registers of the inner loop: MR x NV accumulators, NV vectors of B and one broadcast of A must fit into 32 (AVX-512),
// 16 (AVX2, SSE2) vector registers. 12 x 2 takes 27, 6 x 2 takes 15; both hide the 4 cycles of an FMA many times over.
constexpr int MR = GEMM_ROWS;
constexpr int NV = 2;
constexpr int NR = NV * W;

// Units of K that a slice holds: B's panel (KC x NR, 24 KiB) stays in the L1 cache while A's panels (MR x KC) pass by.
// AVX-512's, of 48 KiB, does not where that has 32, and is as fast as one that would. Rows of A's panel lie KC + W
// units apart, so that they do not all fall into one cache set.
constexpr int64_t KC = 384;
constexpr int64_t A_STRIDE = KC + W;
// Units of fp32 that are added one after another, at most: equal chains. A sum in one chain of KC erred by 3.6 times as
// much as that of an AVX-512 CPU's BLAS (x 9 x 380), and by 1.4 times as much as that of an AVX2 one, whose sums are in
// more pieces.
constexpr int64_t CHAIN = W == 16 ? 96 : 192;
// One vector of slack: see pack_a's last store.
constexpr int64_t A_PANEL = MR * A_STRIDE + W;
// Panels of A packed at a time: 100 to 150 KiB, a part of the L2 cache.
constexpr int64_t A_PANELS = W == 16 ? 6 : 16;
// The block of C that a task owns; B's slice is then 576 KiB.
constexpr int64_t NC = 384;
constexpr int64_t MC = 1020;
// Elements of the largest C that is summed in pieces of K, two of them 4 MiB: they stay in the caches.
constexpr int64_t MOST_SUMS = 1 << 19;

template <Product P>
inline vf multiply_add(vf acc, uint32_t a, vu b) {
#if defined(__AVX512BF16__)
    if constexpr (P == Product::BF16_PAIRS)
        return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#endif
    return acc + bits_of<float>(a) * bits_of<vf>(b);
}

// acc (MR x V vectors) += A's panel times B's panel. A's panel is [unit][MR], or rows `stride` units apart.
template <Product P, int V, bool ROWS>
inline void inner_product(vf (&acc)[MR][V], const uint32_t* a, int64_t stride, const uint32_t* b, int64_t units) {
// Twice: half of the loop's own instructions, worth 8 % on a Zen 3 core.
#pragma GCC unroll 2
    for (int64_t u = 0; u < units; ++u) {
        vu bv[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) memcpy(&bv[v], b + u * NR + v * W, sizeof bv[v]);
#pragma GCC unroll 12
        for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v)
                acc[i][v] = multiply_add<P>(acc[i][v], ROWS ? a[i * stride + u] : a[i + u * MR], bv[v]);
    }
}

// One tile of C of one slice of K, added to the sum `from` of the slices before it, if any. A slice, and a chain of it,
// starts at zero: adding K numbers in pieces errs by a term in the chain + K / chain, not in K.
template <Product P, int V, bool ROWS>
void tile_product(const uint32_t* a, int64_t stride, const uint32_t* b, int64_t units, const float* from, float* to) {
    int64_t chains = P == Product::FP32 ? std::max<int64_t>(1, ceil_div(units, CHAIN)) : 1;
    int64_t chain = ceil_div(units, chains), u = 0;
    do {
        vf acc[MR][V] = {};
        inner_product<P, V, ROWS>(acc, a + (ROWS ? u : u * MR), stride, b + u * NR, std::min(chain, units - u));
#pragma GCC unroll 12
        for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v)
                store(to + i * NR + v * W, from ? acc[i][v] + load(from + i * NR + v * W) : acc[i][v]);
        from = to;
        u += chain;
    } while (u < units);
}

struct Problem {
    int64_t M, N, K;
    Factor a, b;
    Epilogue epilogue;
    const void* context;
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

// A's rows, as they lie in memory or packed: panels of MR rows, `panel` units apart, their rows `stride` units apart.
struct Rows {
    const uint32_t* units;
    int64_t panel, stride;
};

// All tiles of the rows [row, end) with one panel of B, which stays in the L1 cache while A's panels pass by.
template <Product P>
void multiply_panel(const Problem& p, Rows a, const uint32_t* b, int64_t units, int64_t row, int64_t end, int64_t col,
                    int cols, float* partial, bool first, bool last) {
    for (; row < end; row += MR, a.units += a.panel, partial += MR * NR) {
        alignas(64) float values[MR * NR];
        const float* from = first ? nullptr : partial;
        float* to = last ? values : partial;
        if (p.a.k_contiguous)
            cols <= W ? tile_product<P, 1, true>(a.units, a.stride, b, units, from, to)
                      : tile_product<P, NV, true>(a.units, a.stride, b, units, from, to);
        else
            cols <= W ? tile_product<P, 1, false>(a.units, a.stride, b, units, from, to)
                      : tile_product<P, NV, false>(a.units, a.stride, b, units, from, to);
        if (last) p.epilogue(p.context, {row, col, (int)std::min<int64_t>(MR, end - row), cols, values, NR});
    }
}

// A slice of K: its place, and whether it is the first or the last one.
struct Slice {
    int64_t k, depth;
    bool first, last;
};

// f for every slice, at least once, so that C is written when K is 0.
template <Product P, class F>
void for_slices(int64_t K, const F& f) {
    int64_t most = KC * PER_UNIT<P>, even = ceil_div(K, std::max<int64_t>(1, ceil_div(K, most)));
    int64_t size = std::max<int64_t>(W, (even + W - 1) / W * W);  // equal slices, of whole units
    for (int64_t k = 0; k == 0 || k < K; k += size) f(Slice{k, std::min(size, K - k), k == 0, k + size >= K});
}

template <Product P>
void pack_b_slice(const Problem& p, const Slice& s, int64_t col0, int64_t col1, uint32_t* b) {
    with_type(p.b, [&](auto* t) {
        using T = std::remove_cvref_t<decltype(*t)>;
        pack_b<P, T, NR>(at<T>(p.b, col0, s.k), p.b.ld, p.b.k_contiguous, col1 - col0, s.depth, b);
    });
}

// A's rows [row, end) of one slice. fp32 rows are multiplied where they lie, if there are whole panels of them and if
// they do not all fall into one cache set; else they are packed.
template <Product P>
Rows rows_of(const Problem& p, const Slice& s, int64_t row, int64_t end) {
    if (P == Product::FP32 && p.a.k_contiguous && !p.a.is_bf16 && (end - row) % MR == 0 && p.a.ld % 512 != 0)
        return {reinterpret_cast<const uint32_t*>(at<float>(p.a, row, s.k)), MR * p.a.ld, p.a.ld};
    uint32_t* a = workspace_of<uint32_t>(Slot::PACK_A, A_PANELS * A_PANEL);
    with_type(p.a, [&](auto* t) {
        using T = std::remove_cvref_t<decltype(*t)>;
        pack_a<P, T, MR>(at<T>(p.a, row, s.k), p.a.ld, p.a.k_contiguous, p.M - row, s.depth, ceil_div(end - row, MR), a,
                         A_PANEL, A_STRIDE);
    });
    return {a, A_PANEL, A_STRIDE};
}

// The rows [row, end), of at most A_PANELS panels, and columns [col0, col1) of one slice; `partial` holds their sums.
template <Product P>
void multiply_rows(const Problem& p, const Slice& s, const uint32_t* b, int64_t row, int64_t end, int64_t col0,
                   int64_t col1, float* partial) {
    Rows a = rows_of<P>(p, s, row, end);
    int64_t units = ceil_div(s.depth, PER_UNIT<P>), padded_rows = ceil_div(end - row, MR) * MR;
    for (int64_t j = 0; j < col1 - col0; j += NR)
        multiply_panel<P>(p, a, b + j * units, units, row, end, col0 + j, (int)std::min<int64_t>(col1 - col0 - j, NR),
                          partial + j * padded_rows, s.first, s.last);
}

int64_t padded(int64_t columns) { return ceil_div(columns, NR) * NR; }

// The block of C of rows [row0, row1) and columns [col0, col1).
template <Product P>
void multiply_block(const Problem& p, int64_t row0, int64_t row1, int64_t col0, int64_t col1) {
    int64_t N = padded(col1 - col0);
    uint32_t* b = workspace_of<uint32_t>(Slot::PACK_B, KC * N);
    float* partial = workspace_of<float>(Slot::PARTIAL, ceil_div(row1 - row0, MR) * MR * N);
    for_slices<P>(p.K, [&](const Slice& s) {
        pack_b_slice<P>(p, s, col0, col1, b);
        for (int64_t row = row0; row < row1; row += A_PANELS * MR)
            multiply_rows<P>(p, s, b, row, std::min(row1, row + A_PANELS * MR), col0, col1, partial + (row - row0) * N);
    });
}

// Blocks of C of about equal size, near MC x NC or smaller.
struct Blocks {
    int64_t down, across, rows, cols;

    int64_t count() const { return down * across; }
};

// As many blocks, in all pieces of K, as suit the threads: a multiple of them, or many. Where a thread's rows are many
// beside B's columns, each has bands of rows of its own: it finds them in its cache if it wrote them, as parallel_for
// deals them out, and packing all of B, which every thread does then, is little beside multiplying by it.
Blocks blocks_of(int64_t M, int64_t N, int64_t pieces) {
    int64_t threads = thread_count(), across = ceil_div(N, NC), down = ceil_div(M, MC);
    int64_t most_down = std::max<int64_t>(1, M / (4 * MR)), step = 2 * M >= threads * N ? pieces : pieces * across;
    while (step * down % threads != 0 && pieces * across * down < 8 * threads && down < most_down) ++down;
    int64_t cols = padded(ceil_div(N, across)), rows = ceil_div(ceil_div(M, down), MR) * MR;
    return {ceil_div(M, rows), ceil_div(N, cols), rows, cols};
}

template <Product P>
void multiply_block_number(int64_t number, const Blocks& blocks, const Problem& p) {
    int64_t row = number / blocks.across * blocks.rows, col = number % blocks.across * blocks.cols;
    multiply_block<P>(p, row, std::min(p.M, row + blocks.rows), col, std::min(p.N, col + blocks.cols));
}

// Pieces of K that are summed apart, each into a matrix of whole register tiles.
struct Pieces {
    int64_t count, depth, ld, size;
};

// Two where K is long beside C and both factors lie along the other dimension. This is a weight's gradient: the rows of
// x and dy that a thread wrote are then multiplied by that thread. What goes from core to core are sums of C's size,
// written and read, in the place of half of both factors: 4 M N numbers for (M + N) K.
Pieces pieces_of(const Problem& p) {
    int64_t ld = padded(p.N), size = ceil_div(p.M, MR) * MR * ld;
    bool gradient = !p.a.k_contiguous && !p.b.k_contiguous && p.K >= KC;
    bool apart = gradient && 4 * p.M * p.N < (p.M + p.N) * p.K && size <= MOST_SUMS;
    return {apart ? 2 : 1, ceil_div(ceil_div(p.K, 2), W) * W, ld, size};
}

// An epilogue that keeps a piece's sums.
struct Keep {
    float* sums;
    int64_t ld;

    static void take(const void* context, const Tile& t) {
        const Keep& to = *static_cast<const Keep*>(context);
        for (int i = 0; i < t.rows; ++i)
            for (int j = 0; j < t.cols; j += W)
                store(to.sums + (t.row + i) * to.ld + t.col + j, load(t.values + i * t.ld + j));
    }
};

// The factor from element k of K on.
Factor from_k(const Factor& f, int64_t k) {
    int64_t elements = f.k_contiguous ? k : k * f.ld;
    return {static_cast<const char*>(f.data) + elements * (f.is_bf16 ? 2 : 4), f.ld, f.is_bf16, f.k_contiguous};
}

// Hand over the sums of the pieces, added in order.
void add_pieces(const Problem& p, const Pieces& pieces, float* sums) {
    int64_t ld = pieces.ld;
    parallel_ranges(ceil_div(p.M, MR), 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin * MR; row < std::min(p.M, end * MR); row += MR)
            for (int64_t col = 0; col < p.N; col += NR) {
                float* tile = sums + row * ld + col;
                for (int64_t piece = 1; piece < pieces.count; ++piece)
                    for (int64_t i = 0; i < MR; ++i)
                        for (int64_t j = i * ld; j < i * ld + NR; j += W)
                            store(tile + j, load(tile + j) + load(tile + piece * pieces.size + j));
                p.epilogue(p.context, {row, col, (int)std::min<int64_t>(MR, p.M - row),
                                       (int)std::min<int64_t>(NR, p.N - col), tile, (int)ld});
            }
    });
}

// Tasks own blocks of C and pack what they need of B, so but for pieces of K no thread writes what another one has
// read: a Zen 4 core took 7 to 38 ns for each such cache line, and a B packed by all together 72 us where the product
// takes 480.
template <Product P>
void run(const Problem& p) {
    Pieces pieces = pieces_of(p);
    Blocks blocks = blocks_of(p.M, p.N, pieces.count);
    if (pieces.count == 1)
        return parallel_for(blocks.count(), [&](int64_t task) { multiply_block_number<P>(task, blocks, p); });
    float* sums = workspace_of<float>(Slot::PIECES, pieces.count * pieces.size);
    parallel_for(pieces.count * blocks.count(), [&](int64_t task) {
        int64_t piece = task / blocks.count(), k = piece * pieces.depth, depth = std::min(pieces.depth, p.K - k);
        Keep to{sums + piece * pieces.size, pieces.ld};
        Problem part{p.M, p.N, depth, from_k(p.a, k), from_k(p.b, k), Keep::take, &to};
        multiply_block_number<P>(task % blocks.count(), blocks, part);
    });
    add_pieces(p, pieces, sums);
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
            __builtin_prefetch(to + MR * c.ld, 1);  // the next tile's
            vf value = load(t.values + i * t.ld + j) + bias;
            store(to, c.add ? load(to, n) + value : value, n);
        }
    }
}

}  // namespace

void gemm(int64_t M, int64_t N, int64_t K, Factor a, Factor b, bool bf16_product, Epilogue epilogue,
          const void* context) {
    if (M == 0 || N == 0) return;
    if (bf16_product && has_outside_product()) return gemm_in_pieces(M, N, K, a, b, epilogue, context);
    Problem p{M, N, K, a, b, epilogue, context};
    if (!bf16_product) return run<Product::FP32>(p);
#if defined(__AVX512BF16__)
    run<Product::BF16_PAIRS>(p);
#else
    run<Product::ROUNDED>(p);
#endif
}

void gemm(int64_t M, int64_t N, int64_t K, Factor a, Factor b, bool bf16_product, const Output& c) {
    bool plain = c.is_bf16 && !c.bias && !c.add;
    if (M && N && bf16_product && plain && has_outside_product()) return outside_gemm(M, N, K, a, b, c);
    gemm(
        M, N, K, a, b, bf16_product,
        [](const void* context, const Tile& tile) {
            const Output& c = *static_cast<const Output*>(context);
            c.is_bf16 ? store_tile<bf16>(c, tile) : store_tile<float>(c, tile);
        },
        &c);
}

}  // namespace gptkernels
