#pragma once

#include "common/gemm.h"

namespace gptkernels {

// Cross-entropy of the logits x W^T: x (N, C), W (V, C), targets (N).
struct CrossEntropy {
    int64_t N, C, V;
    Factor x, weight;  // summed over C
    bool bf16_product;
    const int64_t* targets;
    int64_t ignore_index;
    bool mean;
};

// Where the gradients go; dweight_sums is fp32 memory (V, C).
struct CrossEntropyGradients {
    Output dx;
    float* dweight_sums;
};

// Index of the first target that is neither in [0, V) nor ignore_index, -1 if there is none.
int64_t first_bad_target(const CrossEntropy& p);

// The loss; with gradients, those too.
float cross_entropy_cpu(const CrossEntropy& p, const CrossEntropyGradients* gradients);

}  // namespace gptkernels
