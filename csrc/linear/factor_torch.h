// Tensors as factors of the products on CUDA. Only *_cuda_torch.cpp files include this.
#pragma once

#include "common/device_torch.h"
#include "linear/linear_cuda.h"

namespace gptkernels {

inline ScalarType scalar_type_of(Type type) {
    return type == Type::FLOAT32 ? ScalarType::Float : type == Type::BFLOAT16 ? ScalarType::BFloat16 : ScalarType::Half;
}

// A tensor seen as (rows, columns) in a product's dtype, rows on 16 bytes.
struct Rows {
    Tensor memory;
    int64_t ld;

    DeviceFactor over_columns() const { return {pointer_of(memory), ld, true}; }
    DeviceFactor over_rows() const { return {pointer_of(memory), ld, false}; }
    void* data() const { return pointer_of(memory); }
};

inline Rows empty_rows(const Tensor& like, int64_t rows, int64_t columns, Type type) {
    int64_t ld = padded(columns, type);
    return {empty(like, {rows, ld}, scalar_type_of(type)), ld};
}

// The tensor's own memory where that will do, else a copy.
inline Rows rows_for(const Tensor& x, Type type, void* stream) {
    int64_t columns = x.size(x.dim() - 1);
    Array a = array(x);
    if (a.type == type && padded(columns, type) == columns && (uintptr_t)a.data % 16 == 0) return {x, columns};
    Rows copy = empty_rows(x, rows_of(x), columns, type);
    copy_rows_cuda(a, rows_of(x), columns, mutable_array(copy.memory), stream);
    return copy;
}

// Whether torch allows tf32 in products of float32 now.
bool tf32_allowed();

inline DeviceProduct product(Type type, int64_t M, int64_t N, int64_t K, DeviceFactor a, DeviceFactor b) {
    return {type, M, N, K, a, b, type == Type::FLOAT32 && tf32_allowed()};
}

// The sums of the columns of dy, in like's dtype; empty if they are not wanted.
inline Tensor bias_gradient(const Tensor& dy, const Tensor& like, int64_t columns, bool wanted, void* stream) {
    Tensor db = empty(like, {wanted ? columns : 0}, like.scalar_type());
    if (!wanted) return db;
    int64_t rows = rows_of(dy);
    Tensor partial = empty(like, {column_sums_partial_rows(rows), columns}, ScalarType::Float);
    column_sums_cuda(array(dy), rows, columns, floats(partial), mutable_array(db), stream);
    return db;
}

}  // namespace gptkernels
