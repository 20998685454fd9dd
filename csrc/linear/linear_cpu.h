#pragma once

#include <cstdint>

namespace gptkernels {

// dbias (C_out) = column sums of dy (N, C_out).
void linear_bias_gradient(const void* dy, bool dy_is_bf16, int64_t N, int64_t C_out, void* dbias, bool dbias_is_bf16);

}  // namespace gptkernels
