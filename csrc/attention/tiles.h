// What the forward and the backward of attention share: copying heads in and out, products of tiles, mask and dropout.
//
// Scores are held transposed, keys down and queries across: S^T = K Q^T. Then a vector holds one key and W queries, the
// softmax's maximum and sum run down the rows without a step across lanes, and the same tile serves, as it is, as the
// broadcast factor of every other product (P V, P^T dO, dS^T Q, dS K). Only Q (and dO) need a transpose.
#pragma once

#include "attention/attention_cpu.h"
#include "common/philox.h"
#include "common/vec.h"

namespace gptkernels {

constexpr int BQ = 64;  // queries of a tile: 4 vectors of AVX-512
constexpr int BK = 64;  // keys of a tile: 64 x 64 scores are 16 KiB, half of the L1 cache
constexpr int QV = BQ / W;
// Rows of a register tile: with 2 vectors across, 16 sums (AVX-512, of 32 registers) or 8 (of 16).
constexpr int MR = W == 16 ? 8 : 4;

// Where a tile lies: key k of it is visible to its query q when k + diagonal <= q.
struct Place {
    int64_t diagonal;
    int64_t keys;  // of the tile's BK, those that any query of it sees, to the end of their register tile: the rest is
                   // masked

    int first_query(int64_t k) const { return k + diagonal > 0 ? (int)(k + diagonal) : 0; }
    // Where the vectors of key k begin: with those of its register tile's first key, since add_over_queries reads the
    // tile's rows from there.
    int64_t first_vector(int64_t k) const { return first_query(k / MR * MR) / W * W; }
    int64_t keys_of(int64_t q) const { return q - diagonal + 1 < keys ? q - diagonal + 1 : keys; }
};

inline Place place_of(const Attention& p, int64_t query, int64_t queries, int64_t key) {
    int64_t seen = query + queries + p.S - p.T - key;
    return {key - (query + p.S - p.T), seen < BK ? (seen + MR - 1) / MR * MR : BK};
}

// Keys that the queries [query, query + queries) see.
inline int64_t visible_keys(const Attention& p, int64_t query, int64_t queries) {
    int64_t seen = query + queries + p.S - p.T;
    return seen > 0 ? seen : 0;
}

template <class T>
inline T* row_of(const Heads& x, int64_t b, int64_t h, int64_t t) {
    return static_cast<T*>(x.data) + b * x.stride_b + h * x.stride_h + t * x.stride_t;
}

// Rows [t, t + rows) into fp32 rows LD apart, zero beyond D and, up to `padded` rows, beyond rows.
template <int LD, class T>
void copy_rows(const Heads& x, int64_t b, int64_t h, int64_t t, int64_t rows, int64_t padded, int64_t D, float* out) {
    for (int64_t i = 0; i < padded; ++i)
        for (int64_t d = 0; d < LD; d += W) {
            __builtin_prefetch(row_of<T>(x, b, h, t + i + AHEAD) + d);
            store(out + i * LD + d, i < rows && d < D ? load(row_of<T>(x, b, h, t + i) + d, D - d) : vf{});
        }
}
template <int LD>
void copy_in(const Heads& x, int64_t b, int64_t h, int64_t t, int64_t rows, int64_t padded, int64_t D, float* out) {
    x.is_bf16 ? copy_rows<LD, bf16>(x, b, h, t, rows, padded, D, out)
              : copy_rows<LD, float>(x, b, h, t, rows, padded, D, out);
}

// A row of fp32 numbers out to where token t of a head lies.
inline void copy_out(const Heads& x, int64_t b, int64_t h, int64_t t, int64_t D, const float* row) {
    for (int64_t d = 0; d < D; d += W) {
        if (x.is_bf16) store(row_of<bf16>(x, b, h, t) + d, load(row + d), D - d);
        else store(row_of<float>(x, b, h, t) + d, load(row + d), D - d);
    }
}

// BQ fp32 rows LD apart, transposed and multiplied: out[d * BQ + q] = factor * rows[q * LD + d].
template <int LD>
void transpose_rows(const float* rows, int64_t D, float factor, float* out) {
    for (int64_t q = 0; q < BQ; q += W)
        for (int64_t d = 0; d < D; d += W) {
            vu r[W];
            for (int i = 0; i < W; ++i) r[i] = bits_of<vu>(factor * load(rows + (q + i) * LD + d));
            transpose(r);
            for (int i = 0; i < W; ++i) store(out + (d + i) * BQ + q, bits_of<vf>(r[i]));
        }
}

// sums (MR x V vectors) += a b over `depth`: element (i, n) of a at a[i * A_ROW + n * A_STEP], row n of b at b[n *
// B_STEP].
template <int V, int A_ROW, int A_STEP, int B_STEP>
inline void multiply(vf (&sums)[MR][V], const float* a, const float* b, int64_t depth) {
#pragma GCC unroll 2
    for (int64_t n = 0; n < depth; ++n) {
        vf bv[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) bv[v] = load(b + n * B_STEP + v * W);
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) sums[i][v] += a[i * A_ROW + n * A_STEP] * bv[v];
    }
}

// c (MR rows C_STEP apart, V vectors) = a b, or += where ADD: added once, at the end, so that a sum of pieces errs by a
// term in their length and their number, not in its whole length.
template <bool ADD, int V, int A_ROW, int A_STEP, int B_STEP, int C_STEP>
inline void product_tile(const float* a, const float* b, int64_t depth, float* c) {
    vf sums[MR][V] = {};
    multiply<V, A_ROW, A_STEP, B_STEP>(sums, a, b, depth);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
            float* to = c + i * C_STEP + v * W;
            store(to, ADD ? load(to) + sums[i][v] : sums[i][v]);
        }
}

// c[k * BQ + q] = rows[k] . columns[q]: a tile K Q^T or V dO^T, `columns` transposed. Register tiles that no query of
// theirs sees are left out: nothing reads them.
template <int LD>
void score_tile(const Place& place, const float* rows, const float* columns, int64_t D, float* c) {
    constexpr int64_t PIECE = 64;
    for (int64_t k = 0; k < place.keys; k += MR)
        for (int64_t q = place.first_query(k) / (2 * W) * (2 * W); q < BQ; q += 2 * W) {
            const float *row = rows + k * LD, *column = columns + q;
            float* to = c + k * BQ + q;
            product_tile<false, 2, LD, 1, BQ, BQ>(row, column, D < PIECE ? D : PIECE, to);
            for (int64_t d = PIECE; d < D; d += PIECE)
                product_tile<true, 2, LD, 1, BQ, BQ>(row + d, column + d * BQ, D - d < PIECE ? D - d : PIECE, to);
        }
}

// c (MR rows) += a b along D, two vectors at a time and the odd one alone.
template <int LD, int A_ROW, int A_STEP>
inline void add_product(const float* a, const float* b, int64_t depth, int64_t D, float* c) {
    int64_t d = 0;
    for (; D - d > W; d += 2 * W) product_tile<true, 2, A_ROW, A_STEP, LD, LD>(a, b + d, depth, c + d);
    if (D - d > 0) product_tile<true, 1, A_ROW, A_STEP, LD, LD>(a, b + d, depth, c + d);
}

// c[q] += sum over k of tile[k][q] rows[k], for every query of the tile.
template <int LD>
void add_over_keys(const Place& place, const float* tile, const float* rows, int64_t D, float* c) {
    for (int64_t q = 0; q < BQ; q += MR) {
        int64_t depth = place.keys_of(q + MR - 1);
        if (depth > 0) add_product<LD, 1, BQ>(tile + q, rows, depth, D, c + q * LD);
    }
}

// c[k] += sum over q of tile[k][q] rows[q], for every key of the tile.
template <int LD>
void add_over_queries(const Place& place, const float* tile, const float* rows, int64_t D, float* c) {
    for (int64_t k = 0; k < place.keys; k += MR) {
        int64_t q = place.first_query(k);
        if (q < BQ) add_product<LD, BQ, 1>(tile + k * BQ + q, rows + q * LD, BQ - q, D, c + k * LD);
    }
}

// x where key k is visible to the queries from q on, `hidden` elsewhere.
inline vf causal(const Place& place, int64_t k, int64_t q, vf x, float hidden) {
    if (k + place.diagonal <= q) return x;
    return lanes() + (int)q >= (int)(k + place.diagonal) ? x : all(hidden);
}

// f(k, q, vector) for every key and vector of queries of which some see the key, in place.
template <class F>
inline void for_visible(const Place& place, float* tile, const F& f) {
    for (int64_t k = 0; k < place.keys; ++k)
        for (int64_t q = place.first_vector(k); q < BQ; q += W)
            store(tile + k * BQ + q, f(k, q, load(tile + k * BQ + q)));
}

// Dropout's factors for a tile of head (b, h): keep_scale where an element is kept, 0 where it is dropped. Element
// (row, col), counted on the keys' axis, looks at word col % 4 of counter (col / 4, row, h, b).
inline void dropout_factors(const Attention& p, const Place& place, int64_t b, int64_t h, int64_t query, int64_t key,
                            float* factors) {
    for (int64_t k = 0; k < place.keys; k += 4)
        for (int64_t q = place.first_vector(k); q < BQ; q += W) {
            vu zero{};
            vu words[4] = {zero + (uint32_t)((key + k) / 4), (vu)lanes() + (uint32_t)(query + q + p.S - p.T),
                           zero + (uint32_t)h, zero + (uint32_t)b};
            philox(p.seed, words[0], words[1], words[2], words[3]);
            for (int i = 0; i < 4; ++i)
                store(factors + (k + i) * BQ + q, words[i] >= p.drop_below ? all(p.keep_scale) : vf{});
        }
}

inline void multiply_by(const Place& place, const float* factors, float* tile) {
    for_visible(place, tile, [&](int64_t k, int64_t q, vf x) { return x * load(factors + k * BQ + q); });
}

}  // namespace gptkernels
