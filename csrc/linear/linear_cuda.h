#pragma once

#include "common/dtype.h"

namespace gptkernels {

// A factor of a product as in common/product.cuh: rows of at most 2^28 - 1 elements, on 16 bytes, padded.
struct DeviceFactor {
    const void* data;
    int64_t ld;
    bool along_k;
};

struct DeviceProduct {
    Type type;  // of both factors
    int64_t M, N, K;
    DeviceFactor a, b;
    bool tf32;  // fp32 factors may be rounded to tf32, for the tensor cores
};

// C (M, N), contiguous, = A B + bias. C is in the factors' type or fp32, a bias
// in any. Both factors lie along k (y = x W^T), or A only (dx = dy W), or none (dW = dy^T x).
void gemm_cuda(const DeviceProduct& p, Array bias, MutableArray c, void* stream);

// The row length, in elements, of a copy that is a factor.
constexpr int64_t padded(int64_t columns, Type type) {
    int64_t packet = 16 / bytes_of(type);
    return (columns + packet - 1) / packet * packet;
}

// Rows of contiguous x, converted and padded with zeros: y (rows, padded(columns)).
void copy_rows_cuda(Array x, int64_t rows, int64_t columns, MutableArray y, void* stream);

// y (columns) = the sums of the columns of contiguous x (rows, columns), in fixed order. `partial` has
// column_sums_partial_rows(rows) rows of `columns` floats.
int64_t column_sums_partial_rows(int64_t rows);
void column_sums_cuda(Array x, int64_t rows, int64_t columns, float* partial, MutableArray y, void* stream);

}  // namespace gptkernels
