// Sums over rows: the gradients of biases and of LayerNorm's vectors.
#pragma once

#include <cstdint>

#include "common/parallel.h"
#include "common/vec.h"
#include "common/workspace.h"

namespace gptkernels {

// Rows that are added one after another: N numbers in sums of sums err by a term in COLUMN_ROWS + N / COLUMN_ROWS, not
// in N.
constexpr int64_t COLUMN_ROWS = 32;

// out[c] = sum over n of x[n * ld + c], of the columns [begin, begin + 4 W) that there are. Four vectors a strip: with
// fp32, whole pairs of cache lines of each row.
template <class T, class Out>
void strip_sums(const T* x, int64_t N, int64_t C, int64_t ld, int64_t begin, Out* out) {
    constexpr int V = 4;
    vf totals[V] = {};
    for (int64_t block = 0; block < N; block += COLUMN_ROWS) {
        vf sums[V] = {};
        for (int64_t n = block; n < N && n < block + COLUMN_ROWS; ++n)
            for (int v = 0; v < V; ++v) {
                int64_t c = begin + v * W;
                if (c < C) sums[v] += load(x + n * ld + c, C - c);
            }
        for (int v = 0; v < V; ++v) totals[v] += sums[v];
    }
    for (int v = 0; v < V; ++v) {
        int64_t c = begin + v * W;
        if (c < C) store(out + c, totals[v], C - c);
    }
}

// out[c] = sum over n of x[n * ld + c], in an order that N alone decides: the result does not depend on the number of
// threads. Many rows are added in up to 64 bands, by the threads that have them, and then the bands.
template <class T, class Out>
void column_sums(const T* x, int64_t N, int64_t C, int64_t ld, Out* out) {
    constexpr int64_t STRIP = 4 * W, GROUP = 8 * STRIP;
    auto whole = [&](auto* from, int64_t count, int64_t from_ld) {
        parallel_for((C + STRIP - 1) / STRIP, [&](int64_t i) { strip_sums(from, count, C, from_ld, i * STRIP, out); });
    };
    int64_t rows = (N / 64 / COLUMN_ROWS + 1) * COLUMN_ROWS, bands = (N + rows - 1) / rows;
    if (bands <= 2) return whole(x, N, ld);
    float* sums = workspace_of<float>(Slot::COLUMNS, bands * C);
    int64_t groups = (C + GROUP - 1) / GROUP;
    parallel_for(bands * groups, [&](int64_t task) {
        int64_t n = task / groups * rows, count = n + rows < N ? rows : N - n, begin = task % groups * GROUP;
        for (int64_t c = begin; c < C && c < begin + GROUP; c += STRIP)
            strip_sums(x + n * ld, count, C, ld, c, sums + task / groups * C);
    });
    whole(sums, bands, C);
}

}  // namespace gptkernels
