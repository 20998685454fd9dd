// Sums over rows: the gradients of biases and of LayerNorm's vectors.
#pragma once

#include <cstdint>

#include "common/parallel.h"
#include "common/vec.h"

namespace gptkernels {

// out[c] = sum over n of x[n * ld + c], in an order that N alone decides: the result does not depend on the number of
// threads.
template <class T, class Out>
void column_sums(const T* x, int64_t N, int64_t C, int64_t ld, Out* out) {
    // Four vectors a strip: with fp32, whole pairs of cache lines of each row.
    constexpr int V = 4;
    // Sums of sums: N numbers then err by a term in ROWS + N / ROWS, not in N.
    constexpr int64_t ROWS = 32;
    parallel_for((C + V * W - 1) / (V * W), [&](int64_t strip) {
        vf totals[V] = {};
        int64_t begin = strip * V * W;
        for (int64_t block = 0; block < N; block += ROWS) {
            vf sums[V] = {};
            for (int64_t n = block; n < N && n < block + ROWS; ++n)
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
    });
}

}  // namespace gptkernels
