// Causal attention backward (Dao et al. 2022, arXiv 2205.14135, appendix B.4).
//
//     P = exp(scale Q K^T - m) / l;  dP = dout V^T;  delta = rowsum(P * dP) = rowsum(dout * out);  dS = P * (dP -
//     delta) dV = P^T dout;  dK = scale dS^T Q;  dQ = scale dS K          (with dropout, P in dV and dP carry the mask)
//
// A task owns a head, so every sum has one owner and one order: deterministic without atomics, at 5 products a tile. It
// walks over tiles of queries; dQ of the tile stays in the L1 and L2 caches, dK and dV of the head in fp32 rows.
#include <algorithm>
#include <cmath>

#include "attention/tiles.h"
#include "common/math.h"
#include "common/parallel.h"
#include "common/workspace.h"

namespace gptkernels {
namespace {

template <int LD>
struct Backward {
    const Attention& p;
    Heads dout, q, k, v, out;
    const float* stats;
    Heads dq, dk, dv;

    struct Memory {
        float *keys, *values, *dkeys, *dvalues;                            // the head
        float *queries, *douts, *query_columns, *dout_columns, *dqueries;  // a tile of queries
        float *weights, *dscores, *factors;                                // a tile of scores
    };
    static Memory memory(int64_t padded_keys) {
        int64_t head = padded_keys * LD, rows = BQ * LD, tile = BK * BQ;
        float* at = workspace_of<float>(Slot::OPERATOR_THREAD, 4 * head + 5 * rows + 3 * tile);
        Memory m;
        for (float** part : {&m.keys, &m.values, &m.dkeys, &m.dvalues}) *part = at, at += head;
        for (float** part : {&m.queries, &m.douts, &m.query_columns, &m.dout_columns, &m.dqueries})
            *part = at, at += rows;
        for (float** part : {&m.weights, &m.dscores, &m.factors}) *part = at, at += tile;
        return m;
    }

    // m, 1/l and delta of a tile's rows. Rows without a key, or beyond T, have m = 0 and 1/l = 0: weights 0.
    struct Rows {
        vf m[QV], inverse[QV], delta[QV];
    };

    Rows row_statistics(int64_t head, int64_t query, int64_t queries) const {
        alignas(64) float m[BQ], inverse[BQ];
        for (int64_t i = 0; i < BQ; ++i) {
            const float* row = stats + 2 * (head * p.T + query + i);
            bool any = i < queries && row[1] != 0.0f;
            m[i] = any ? row[0] : 0.0f;
            inverse[i] = any ? 1.0f / row[1] : 0.0f;
        }
        Rows rows;
        for (int j = 0; j < QV; ++j) rows.m[j] = load(m + j * W), rows.inverse[j] = load(inverse + j * W);
        return rows;
    }

    // delta = rowsum(dout * out), `outs` being memory for out's rows.
    void delta_of_rows(const float* douts, const float* outs, Rows& rows) const {
        alignas(64) float delta[BQ];
        for (int64_t i = 0; i < BQ; ++i) {
            vf acc{};
            for (int64_t d = 0; d < p.D; d += W) acc += load(douts + i * LD + d) * load(outs + i * LD + d);
            delta[i] = sum(acc);
        }
        for (int j = 0; j < QV; ++j) rows.delta[j] = load(delta + j * W);
    }

    // The same from a tile that holds all keys of its rows, by the very numbers that it is subtracted from: a query
    // that sees one key has a gradient of exactly 0, whatever out was rounded to.
    static void delta_of_tile(const Place& place, const float* weights, float* dweights, Rows& rows) {
        for (vf& delta : rows.delta) delta = vf{};
        for_visible(place, dweights, [&](int64_t k, int64_t q, vf dw) {
            rows.delta[q / W] += load(weights + k * BQ + q) * dw;
            return dw;
        });
    }

    // `weights` holds scores, `dscores` holds dP; afterwards the weights that dV needs, and scale * dS.
    void gradient_tile(int64_t b, int64_t h, int64_t query, int64_t key, const Place& place, bool all_keys, Rows& rows,
                       const Memory& w) const {
        for_visible(place, w.weights, [&](int64_t k, int64_t q, vf score) {
            return causal(place, k, q, exp(score - rows.m[q / W]) * rows.inverse[q / W], 0.0f);
        });
        if (p.drop_below) {
            dropout_factors(p, place, b, h, query, key, w.factors);
            multiply_by(place, w.factors, w.dscores);
        }
        if (all_keys) delta_of_tile(place, w.weights, w.dscores, rows);
        for_visible(place, w.dscores, [&](int64_t k, int64_t q, vf dw) {
            return load(w.weights + k * BQ + q) * (dw - rows.delta[q / W]) * p.scale;
        });
        if (p.drop_below) multiply_by(place, w.factors, w.weights);
    }

    void query_tile(int64_t b, int64_t h, int64_t query, const Memory& w) const {
        int64_t queries = std::min<int64_t>(BQ, p.T - query), seen = visible_keys(p, query, queries);
        copy_in<LD>(q, b, h, query, queries, BQ, p.D, w.queries);
        copy_in<LD>(dout, b, h, query, queries, BQ, p.D, w.douts);
        transpose_rows<LD>(w.queries, p.D, p.scale, w.query_columns);
        transpose_rows<LD>(w.douts, p.D, 1.0f, w.dout_columns);
        Rows rows = row_statistics(b * p.H + h, query, queries);
        if (seen > BK) {
            copy_in<LD>(out, b, h, query, queries, BQ, p.D, w.dqueries);
            delta_of_rows(w.douts, w.dqueries, rows);
        }
        std::fill(w.dqueries, w.dqueries + BQ * LD, 0.0f);
        for (int64_t key = 0; key < seen; key += BK) {
            Place place = place_of(p, query, queries, key);
            score_tile<LD>(place, w.keys + key * LD, w.query_columns, p.D, w.weights);
            score_tile<LD>(place, w.values + key * LD, w.dout_columns, p.D, w.dscores);
            gradient_tile(b, h, query, key, place, seen <= BK, rows, w);
            add_over_queries<LD>(place, w.weights, w.douts, p.D, w.dvalues + key * LD);
            add_over_queries<LD>(place, w.dscores, w.queries, p.D, w.dkeys + key * LD);
            add_over_keys<LD>(place, w.dscores, w.keys + key * LD, p.D, w.dqueries);
        }
        for (int64_t i = 0; i < queries; ++i) copy_out(dq, b, h, query + i, p.D, w.dqueries + i * LD);
    }

    void run() const {
        int64_t padded_keys = (p.S + BK - 1) / BK * BK;
        parallel_for(p.B * p.H, [&](int64_t head) {
            int64_t b = head / p.H, h = head % p.H;
            Memory w = memory(padded_keys);
            copy_in<LD>(k, b, h, 0, p.S, padded_keys, p.D, w.keys);
            copy_in<LD>(v, b, h, 0, p.S, padded_keys, p.D, w.values);
            std::fill(w.dkeys, w.dkeys + padded_keys * LD, 0.0f);
            std::fill(w.dvalues, w.dvalues + padded_keys * LD, 0.0f);
            for (int64_t query = 0; query < p.T; query += BQ) query_tile(b, h, query, w);
            for (int64_t t = 0; t < p.S; ++t) {
                copy_out(dk, b, h, t, p.D, w.dkeys + t * LD);
                copy_out(dv, b, h, t, p.D, w.dvalues + t * LD);
            }
        });
    }
};

}  // namespace

void attention_backward_cpu(const Attention& p, Heads dout, Heads q, Heads k, Heads v, Heads out, const float* stats,
                            Heads dq, Heads dk, Heads dv) {
    if (p.D <= 32) Backward<32>{p, dout, q, k, v, out, stats, dq, dk, dv}.run();
    else if (p.D <= 64) Backward<64>{p, dout, q, k, v, out, stats, dq, dk, dv}.run();
    else if (p.D <= 128) Backward<128>{p, dout, q, k, v, out, stats, dq, dk, dv}.run();
    else Backward<256>{p, dout, q, k, v, out, stats, dq, dk, dv}.run();
}

}  // namespace gptkernels
