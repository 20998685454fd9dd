// Sums and maxima over a warp or a block, the same bits in all threads and every time.
#pragma once

#include "common/device.cuh"

namespace gptkernels {

DEVICE float warp_sum(float x) {
    UNROLL
    for (int distance = WARP / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(FULL_WARP, x, distance);
    return x;
}

DEVICE float warp_max(float x) {
    UNROLL
    for (int distance = WARP / 2; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, distance));
    return x;
}

// The sum of one number a warp, through WARP floats of shared memory, which must not be in use before and after.
DEVICE float sum_of_warps(float warp_total, Shared<float> scratch, int warps) {
    int warp = (int)threadIdx.x / WARP;
    if ((int)threadIdx.x % WARP == 0) scratch[warp] = warp_total;
    __syncthreads();
    int lane = (int)threadIdx.x % WARP;
    return warp_sum(lane < warps ? (float)scratch[lane] : 0.0f);
}

// In warp 0 the sum over all warps of what its lanes have, through a float of shared memory for each number.
template <int WARPS, int N>
DEVICE Vector<float, N> sum_over_warps(Vector<float, N> sum, Shared<float> scratch) {
    store(scratch + (int)threadIdx.x * N, sum);
    __syncthreads();
    if (threadIdx.x >= WARP) return sum;
    UNROLL
    for (int w = 1; w < WARPS; ++w) {
        Vector<float, N> other = load<N>(scratch + (w * WARP + (int)threadIdx.x) * N);
        UNROLL
        for (int j = 0; j < N; ++j) sum[j] += other[j];
    }
    return sum;
}

}  // namespace gptkernels
