#pragma once

#include "linear/linear_cuda.h"

namespace gptkernels {

// h (M, N), contiguous, = A B + bias and g = gelu(h), both factors along k. g has rows of padded(N), as a factor has.
void gemm_gelu_cuda(const DeviceProduct& p, Array bias, bool tanh, void* h, void* g, void* stream);

// dh = (A B) * gelu'(h) and g = gelu(h), A along k and B not; both have rows of padded(N). Where db is wanted it is the
// sums of dh's columns, through gelu_partial_rows(M) rows of N floats.
int64_t gelu_partial_rows(int64_t M);
void gemm_gelu_backward_cuda(const DeviceProduct& p, const void* h, bool tanh, void* dh, void* g, float* partial,
                             MutableArray db, void* stream);

// Passes beside a product that another library makes. g = gelu(h), element by element; and dh *= gelu'(h) in the place
// of dg, g = gelu(h) and, where db is wanted, the sums of dh's columns through gelu_pass_partial_rows(rows) rows of
// floats.
void gelu_cuda(Array h, int64_t size, bool tanh, void* g, void* stream);
int64_t gelu_pass_partial_rows(int64_t rows);
void gelu_backward_cuda(Array h, int64_t rows, int64_t columns, bool tanh, void* dh, void* g, float* partial,
                        MutableArray db, void* stream);

}  // namespace gptkernels
