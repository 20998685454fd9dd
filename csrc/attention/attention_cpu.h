#pragma once

#include <cstdint>

namespace gptkernels {

constexpr int64_t MAX_HEAD_DIM = 256;

// (batch, head, token, D) numbers anywhere in memory, D contiguous; strides in elements.
struct Heads {
    void* data;
    bool is_bf16;
    int64_t stride_b, stride_h, stride_t;
};

// Query i of T sees the keys up to i + S - T of S. A weight at (row i + S - T, column j) is kept if its Philox word is
// at least `drop_below`, which is floor(p 2^32), and then multiplied by keep_scale = 1/(1 - p).
struct Attention {
    int64_t B, H, T, S, D;
    float scale;
    uint32_t drop_below;
    float keep_scale;
    uint64_t seed;
};

// out, and stats (B, H, T, 2): each row's largest score m and l = sum of exp(score - m); -inf and 0 for a row without
// keys. Not lse = m + log l in one number: rounding that to fp32 would make every weight of the backward wrong by eps
// |lse|, more than all the rest of the arithmetic.
void attention_forward_cpu(const Attention& p, Heads q, Heads k, Heads v, Heads out, float* stats);

void attention_backward_cpu(const Attention& p, Heads dout, Heads q, Heads k, Heads v, Heads out, const float* stats,
                            Heads dq, Heads dk, Heads dv);

}  // namespace gptkernels
