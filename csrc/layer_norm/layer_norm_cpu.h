#pragma once

#include <cstdint>

namespace gptkernels {

// Pointers to fp32 or bf16 numbers. A null pointer is an input or output that does not exist.
struct Numbers {
    const void* data;
    bool is_bf16;
};
struct MutableNumbers {
    void* data;
    bool is_bf16;
};

// N rows of width C. total = x + residual is written in the wider dtype of both (without residual it is x itself, and
// the argument is not used); y = (total - mean) * rstd * weight + bias.
struct LayerNormForward {
    int64_t N, C;
    float eps;
    Numbers x, residual, weight, bias;
    MutableNumbers y, total;
    float *mean, *rstd;
};
void layer_norm_forward_cpu(const LayerNormForward& p);

// dx = rstd (wdy - mean(wdy) - xhat mean(wdy xhat)) + dtotal, wdy = dy weight; dtotal and dx have x's dtype (x is the
// forward's total). dweight = sum of dy xhat and dbias = sum of dy over rows, in their given dtype.
struct LayerNormBackward {
    int64_t N, C;
    Numbers dy, dtotal, x, weight;
    const float *mean, *rstd;
    MutableNumbers dx, dweight, dbias;
};
void layer_norm_backward_cpu(const LayerNormBackward& p);

}  // namespace gptkernels
