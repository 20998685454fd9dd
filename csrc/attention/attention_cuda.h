#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace gptkernels {

constexpr int64_t MOST_COLUMNS = 256;
// Rows of the backward's terms are a multiple of this many: what no tile of rows is longer than.
constexpr int TERM_ROWS = 128;

// (batch, head, token, D) numbers of the problem's type; strides in elements. D is contiguous and rows start on 16
// bytes.
struct HeadsArray {
    void* data;
    int64_t stride_b, stride_h, stride_t;
};

// Query i of T sees the keys up to i + S - T of S. D is a multiple of 8. A weight at (row i + S - T, column j) is kept
// if its Philox word is at least `drop_below`, which is floor(p 2^32), and then multiplied by keep_scale = 1/(1 - p).
// The seed lies on the device; null without dropout.
struct AttentionCuda {
    Type type;
    int64_t B, H, T, S, D;
    float scale;
    uint32_t drop_below;
    float keep_scale;
    const int64_t* seed;
};

// out, and stats (B, H, T, 2): of each row m and l = sum of exp(score - m), where m is within 8 ln 2 of the largest
// score; -inf and 0 for a row without keys.
void attention_forward_cuda(const AttentionCuda& p, HeadsArray q, HeadsArray k, HeadsArray v, HeadsArray out,
                            float* stats, void* stream);

// `terms` is memory for B H numbers for each of 2 term_rows(T). Without dq_sums the gradients are deterministic; with
// it, memory for term_rows(T) x one_pass_columns(D) numbers a head, dq is added up by atomics, in 5 products instead
// of 7.
inline int64_t one_pass_columns(int64_t D) { return D <= 32 ? 32 : D <= 64 ? 64 : D <= 128 ? 128 : 256; }
inline int64_t term_rows(int64_t T) { return (T + TERM_ROWS - 1) / TERM_ROWS * TERM_ROWS; }
struct AttentionBackwardCuda {
    HeadsArray dout, q, k, v, out;
    const float* stats;
    float* terms;
    HeadsArray dq, dk, dv;
    float* dq_sums;
};
void attention_backward_cuda(const AttentionCuda& p, const AttentionBackwardCuda& x, void* stream);

// On float32, where there is no one-pass form, and the two halves of the backward on 16-bit numbers, in this order.
void attention_float_forward_cuda(const AttentionCuda& p, HeadsArray q, HeadsArray k, HeadsArray v, HeadsArray out,
                                  float* stats, void* stream);
void attention_float_backward_cuda(const AttentionCuda& p, const AttentionBackwardCuda& x, void* stream);
void attention_query_gradient_cuda(const AttentionCuda& p, const AttentionBackwardCuda& x, void* stream);
// With dq_sums: terms and zeros, then the key gradient, then dq.
void attention_row_terms_cuda(const AttentionCuda& p, const AttentionBackwardCuda& x, void* stream);
void attention_finish_cuda(const AttentionCuda& p, const AttentionBackwardCuda& x, void* stream);
void attention_key_gradient_cuda(const AttentionCuda& p, const AttentionBackwardCuda& x, void* stream);

}  // namespace gptkernels
