// Causal attention forward: online softmax over tiles of keys (Dao et al. 2022, arXiv 2205.14135; 2023, arXiv
// 2307.08691).
//
// A task owns a head, or every n-th query tile of one where heads are fewer than threads can share. It copies the
// head's K and V into fp32 rows (T D of copying against T^2 D of arithmetic), then for each tile of 64 queries walks
// over the tiles of keys up to the diagonal: scores, running maximum m and sum l, weights, out. Only the diagonal's
// tiles are masked. flops: 2 T S D a head (half of 4 T S D); memory: K, V and one tile; arithmetic binds.
#include <algorithm>
#include <cmath>

#include "attention/tiles.h"
#include "common/math.h"
#include "common/parallel.h"
#include "common/workspace.h"

namespace gptkernels {
namespace {

template <int LD>
struct Forward {
    const Attention& p;
    Heads q, k, v, out;
    float* stats;

    // One head's memory: K and V for all keys, then what belongs to a tile of queries.
    struct Memory {
        float *keys, *values, *rows, *columns, *tile, *factors, *sums;
    };
    static Memory memory(int64_t padded_keys) {
        constexpr int64_t row_tile = BQ * LD, score_tile = BK * BQ;
        float* at = workspace_of<float>(Slot::OPERATOR_THREAD, 2 * padded_keys * LD + 3 * row_tile + 2 * score_tile);
        auto take = [&](int64_t size) { return at += size, at - size; };
        float *keys = take(padded_keys * LD), *values = take(padded_keys * LD);
        float *rows = take(row_tile), *columns = take(row_tile), *sums = take(row_tile);
        float *tile = take(score_tile), *factors = take(score_tile);
        return {keys, values, rows, columns, tile, factors, sums};
    }

    // The running maximum m takes the tile in; returns what earlier sums shrink by, and what to subtract from scores.
    static void update_maximum(const Place& place, float* tile, vf (&m)[QV], vf (&from)[QV], float* alpha) {
        vf before[QV];
        for (int j = 0; j < QV; ++j) before[j] = m[j];
        for_visible(place, tile, [&](int64_t k, int64_t q, vf x) {
            x = causal(place, k, q, x, -INFINITY);
            m[q / W] = vmax(m[q / W], x);
            return x;
        });
        for (int j = 0; j < QV; ++j) {
            // A query that has seen no key yet: any finite number in the place of its maximum gives weights 0, not NaN.
            from[j] = m[j] == -INFINITY ? vf{} : m[j];
            store(alpha + j * W, exp(before[j] - from[j]));
        }
    }

    // tile = exp(tile - from); returns its sum over keys in l. Eight keys at a time: a sum of sums errs less than a
    // chain.
    static void exponentials(const Place& place, const vf (&from)[QV], float* tile, vf (&l)[QV]) {
        for (int64_t begin = 0; begin < place.keys; begin += 8) {
            vf total[QV] = {};
            for (int64_t k = begin; k < std::min(begin + 8, place.keys); ++k)
                for (int64_t j = place.first_vector(k) / W; j < QV; ++j) {
                    vf x = exp(load(tile + k * BQ + j * W) - from[j]);
                    store(tile + k * BQ + j * W, x);
                    total[j] += x;
                }
            for (int j = 0; j < QV; ++j) l[j] += total[j];
        }
    }

    void query_tile(int64_t b, int64_t h, int64_t query, const Memory& w) const {
        int64_t queries = std::min<int64_t>(BQ, p.T - query);
        copy_in<LD>(q, b, h, query, queries, BQ, p.D, w.rows);
        transpose_rows<LD>(w.rows, p.D, p.scale, w.columns);
        std::fill(w.sums, w.sums + BQ * LD, 0.0f);
        vf m[QV], l[QV] = {};
        for (vf& x : m) x = all(-INFINITY);
        int64_t seen = visible_keys(p, query, queries);
        for (int64_t key = 0; key < seen; key += BK) {
            Place place = place_of(p, query, queries, key);
            alignas(64) float alpha[BQ];
            vf from[QV];
            score_tile<LD>(place, w.keys + key * LD, w.columns, p.D, w.tile);
            update_maximum(place, w.tile, m, from, alpha);
            for (int j = 0; j < QV; ++j) l[j] *= load(alpha + j * W);
            exponentials(place, from, w.tile, l);
            if (p.drop_below) {
                dropout_factors(p, place, b, h, query, key, w.factors);
                multiply_by(place, w.factors, w.tile);
            }
            if (key > 0)
                for (int i = 0; i < BQ; ++i)
                    for (int64_t d = 0; d < p.D; d += W)
                        store(w.sums + i * LD + d, alpha[i] * load(w.sums + i * LD + d));
            add_over_keys<LD>(place, w.tile, w.values + key * LD, p.D, w.sums);
        }
        alignas(64) float largest[BQ], total[BQ];
        for (int j = 0; j < QV; ++j) store(largest + j * W, m[j]), store(total + j * W, l[j]);
        for (int64_t i = 0; i < queries; ++i) {
            float inverse = total[i] > 0 || total[i] != total[i] ? 1.0f / total[i] : 0.0f;  // no key: 0, and NaN stays
            for (int64_t d = 0; d < p.D; d += W) store(w.sums + i * LD + d, inverse * load(w.sums + i * LD + d));
            copy_out(out, b, h, query + i, p.D, w.sums + i * LD);
            float* row = stats + 2 * ((b * p.H + h) * p.T + query + i);
            row[0] = largest[i], row[1] = total[i];
        }
    }

    void run() const {
        int64_t tiles = (p.T + BQ - 1) / BQ, heads = p.B * p.H, padded_keys = (p.S + BK - 1) / BK * BK, splits = 1;
        while (heads * splits < 4 * thread_count() && splits < tiles) ++splits;
        parallel_for(heads * splits, [&](int64_t task) {
            int64_t head = task / splits, b = head / p.H, h = head % p.H;
            Memory w = memory(padded_keys);
            copy_in<LD>(k, b, h, 0, p.S, padded_keys, p.D, w.keys);
            copy_in<LD>(v, b, h, 0, p.S, padded_keys, p.D, w.values);
            // Every splits-th tile, the long ones of the end first; tasks with longer and with shorter ones take turns.
            int64_t part = task % splits, first = part % 2 ? splits - 1 - part / 2 : part / 2;
            for (int64_t tile = tiles - 1 - first; tile >= 0; tile -= splits) query_tile(b, h, tile * BQ, w);
        });
    }
};

}  // namespace

void attention_forward_cpu(const Attention& p, Heads q, Heads k, Heads v, Heads out, float* stats) {
    if (p.D <= 32) Forward<32>{p, q, k, v, out, stats}.run();
    else if (p.D <= 64) Forward<64>{p, q, k, v, out, stats}.run();
    else if (p.D <= 128) Forward<128>{p, q, k, v, out, stats}.run();
    else Forward<256>{p, q, k, v, out, stats}.run();
}

}  // namespace gptkernels
