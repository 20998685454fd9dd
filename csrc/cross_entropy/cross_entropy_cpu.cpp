// Linear head and cross-entropy, chunk of rows by chunk of rows (Hsu et al. 2024, arXiv 2410.10989, section 3).
//
// For a chunk: logits = x W^T into the pool; row by row softmax, loss, and the logits' own gradient in their place
// while the row (200 KB at GPT-2's vocabulary) is in the L2 cache; then dx = dlogits W and dW += dlogits^T x. Three
// products and no recomputation; the logits of one chunk are all that is held. A chunk trades memory against passes
// over dW (154 MB there, read and written once a chunk): 53 MB of logits are 264 rows, at which those passes cost about
// 5 % of the products. Where the products are another library's (common/gemm.h) logits are in bf16, which are 528 rows.
#include "cross_entropy/cross_entropy_cpu.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "common/math.h"
#include "common/parallel.h"
#include "common/pool.h"
#include "common/workspace.h"

namespace gptkernels {
namespace {

constexpr int64_t CHUNK_BYTES = 4 * 264 * 50304;

// Rows of a chunk, whose logits take `bytes` a row: about equal chunks, of whole panels of the products if one fits.
int64_t chunk_rows(int64_t N, int64_t bytes) {
    int64_t most = std::max<int64_t>(1, CHUNK_BYTES / std::max<int64_t>(1, bytes));
    int64_t unit = most < GEMM_ROWS ? 1 : GEMM_ROWS;
    int64_t chunks = std::max<int64_t>(1, ceil_div(N, most / unit * unit));
    return chunks == 1 ? N : ceil_div(ceil_div(N, chunks), unit) * unit;
}

// Vectors that are added up before their sum joins the total: a vocabulary's exponentials in one chain would err by eps
// V / W.
constexpr int64_t PIECE = 64;

// Loss of a row of logits; with a scale, the row becomes scale (softmax - onehot(target)).
float softmax_row(float* row, int64_t V, int64_t target, const float* scale) {
    float target_logit = row[target];
    vf largest = all(-INFINITY);
    for (int64_t v = 0; v < V; v += W) {
        vf x = load(row + v, V - v);
        if (V - v < W)
            for (int64_t i = V - v; i < W; ++i) x[i] = row[v];
        largest = vmax(largest, x);
    }
    float m = max(largest);
    vf acc{};
    for (int64_t begin = 0; begin < V; begin += PIECE * W) {
        vf piece{};
        for (int64_t v = begin; v < std::min(V, begin + PIECE * W); v += W) {
            vf e = exp(load(row + v, V - v) - m);
            if (scale) store(row + v, e, V - v);
            if (V - v < W)
                for (int64_t i = V - v; i < W; ++i) e[i] = 0.0f;
            piece += e;
        }
        acc += piece;
    }
    float total = sum(acc);
    if (scale) {
        float factor = *scale / total;
        for (int64_t v = 0; v < V; v += W) store(row + v, load(row + v, V - v) * factor, V - v);
        row[target] -= *scale;
    }
    return std::log(total) + m - target_logit;
}

// The same for a row in bf16, which is widened for it into a workspace.
float softmax_row(bf16* row, int64_t V, int64_t target, const float* scale) {
    float* wide = workspace_of<float>(Slot::OPERATOR_THREAD, V + W);
    for (int64_t v = 0; v < V; v += W) store(wide + v, load(row + v, V - v));
    float loss = softmax_row(wide, V, target, scale);
    if (scale)
        for (int64_t v = 0; v < V; v += W) store(row + v, load(wide + v), V - v);
    return loss;
}

// losses of n rows of logits; with a scale, the rows become their gradients, which of an ignored target's are 0.
template <class T>
void softmax_rows(const Output& logits, int64_t n, int64_t V, const int64_t* targets, int64_t ignore_index,
                  const float* scale, float* losses) {
    parallel_ranges(n, 1, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
            T* row = static_cast<T*>(logits.data) + i * logits.ld;
            if (targets[i] != ignore_index) losses[i] = softmax_row(row, V, targets[i], scale);
            else if (scale) std::fill(row, row + V, T{});
        }
    });
}

Factor rows_from(const Factor& f, int64_t row) {
    Factor g = f;
    g.data = static_cast<const char*>(f.data) + row * f.ld * (f.is_bf16 ? 2 : 4);
    return g;
}

Output rows_from(const Output& f, int64_t row) {
    Output g = f;
    g.data = static_cast<char*>(f.data) + row * f.ld * (f.is_bf16 ? 2 : 4);
    return g;
}

}  // namespace

int64_t first_bad_target(const CrossEntropy& p) {
    for (int64_t n = 0; n < p.N; ++n)
        if (p.targets[n] != p.ignore_index && (p.targets[n] < 0 || p.targets[n] >= p.V)) return n;
    return -1;
}

float cross_entropy_cpu(const CrossEntropy& p, const CrossEntropyGradients* gradients) {
    int64_t used = p.N - std::count(p.targets, p.targets + p.N, p.ignore_index);
    float scale = p.mean ? 1.0f / (float)used : 1.0f;
    bool narrow = p.bf16_product && has_outside_product();
    // Rounded once for the products of all chunks.
    Factor weight = narrow ? rounded(p.weight, p.V, p.C, Slot::ROUNDED) : p.weight;
    int64_t bytes = narrow ? 2 : 4, rows = chunk_rows(p.N, p.V * bytes);
    int64_t unit = narrow ? 32 : W, ld = (p.V + unit - 1) / unit * unit;  // bf16: whole cache lines
    std::unique_ptr<void, decltype(&pool_give)> held(pool_take(rows * ld * bytes), &pool_give);
    Output logits{held.get(), ld, narrow};
    std::vector<float> losses(p.N, 0.0f);
    if (gradients && p.N == 0) std::fill(gradients->dweight_sums, gradients->dweight_sums + p.V * p.C, 0.0f);

    for (int64_t begin = 0; begin < p.N; begin += rows) {
        int64_t n = std::min(rows, p.N - begin);
        gemm(n, p.V, p.C, rows_from(p.x, begin), weight, p.bf16_product, logits);
        (narrow ? softmax_rows<bf16> : softmax_rows<float>)(logits, n, p.V, p.targets + begin, p.ignore_index,
                                                            gradients ? &scale : nullptr, losses.data() + begin);
        if (!gradients) continue;
        Factor weight_over_rows{weight.data, weight.ld, weight.is_bf16, false};
        Factor x_over_rows = rows_from(p.x, begin);
        x_over_rows.k_contiguous = false;
        gemm(n, p.C, p.V, Factor{logits.data, ld, narrow, true}, weight_over_rows, p.bf16_product,
             rows_from(gradients->dx, begin));
        Output dweight{gradients->dweight_sums, p.C, false};
        dweight.add = begin > 0;
        gemm(p.V, p.C, n, Factor{logits.data, ld, narrow, false}, x_over_rows, p.bf16_product, dweight);
    }
    double total = 0;
    for (float loss : losses) total += loss;
    return (float)(p.mean ? total / (double)used : total);
}

}  // namespace gptkernels
