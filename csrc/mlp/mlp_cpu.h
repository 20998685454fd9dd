#pragma once

#include "common/gemm.h"

namespace gptkernels {

// A matrix (rows, F) in fp32 or bf16.
struct Matrix {
    void* data;
    int64_t ld;
    bool is_bf16;
};

// h = a b + bias and g = gelu(h) in one product; a (N, K), b (K, F).
void gemm_gelu(int64_t N, int64_t F, int64_t K, Factor a, Factor b, bool bf16_product, bool tanh, const void* bias,
               bool bias_is_bf16, Matrix h, Matrix g);

// dh = (a b) * gelu'(h) and g = gelu(h) in one product, h read where the tile is.
void gemm_gelu_backward(int64_t N, int64_t F, int64_t K, Factor a, Factor b, bool bf16_product, bool tanh, Matrix h,
                        Matrix dh, Matrix g);

}  // namespace gptkernels
