#pragma once

#include "common/dtype.h"

namespace gptkernels {

// As in layer_norm_cpu.h. Without a residual, total is not written. Of weight and bias both have one type.
struct LayerNormForwardCuda {
    int64_t N, C;
    float eps;
    Array x, residual, weight, bias;
    MutableArray y, total;
    float *mean, *rstd;
};
void layer_norm_forward_cuda(const LayerNormForwardCuda& p, void* stream);

// dweight and dbias have weight's type. `partial` is memory for layer_norm_partial_floats(N, C) floats for each of the
// two that is wanted.
struct LayerNormBackwardCuda {
    int64_t N, C;
    Array dy, dtotal, x, weight;
    const float *mean, *rstd;
    MutableArray dx, dweight, dbias;
    float* partial;
};
int64_t layer_norm_partial_floats(int64_t N, int64_t C);
void layer_norm_backward_cuda(const LayerNormBackwardCuda& p, void* stream);

constexpr int64_t LAYER_NORM_MOST_COLUMNS = 16384;

}  // namespace gptkernels
