// Sums over rows: the gradients of biases and of LayerNorm's vectors.
#pragma once

#include <cstdint>

#include "common/parallel.h"
#include "common/vec.h"

namespace gptkernels {

// out[c] = sum over n of x[n * ld + c], in the order of n: the result does not depend on the number of threads.
template <class T, class Out>
void column_sums(const T* x, int64_t N, int64_t C, int64_t ld, Out* out) {
    // Four vectors a strip: with fp32, whole pairs of cache lines of each row.
    constexpr int V = 4;
    parallel_for((C + V * W - 1) / (V * W), [&](int64_t strip) {
        vf sums[V] = {};
        int64_t begin = strip * V * W;
        for (int64_t n = 0; n < N; ++n)
            for (int v = 0; v < V; ++v) {
                int64_t c = begin + v * W;
                if (c < C) sums[v] += load(x + n * ld + c, C - c);
            }
        for (int v = 0; v < V; ++v) {
            int64_t c = begin + v * W;
            if (c < C) store(out + c, sums[v], C - c);
        }
    });
}

}  // namespace gptkernels
