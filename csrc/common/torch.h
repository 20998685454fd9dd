// What the bindings share: tensors in, raw pointers out. Only *_torch.cpp files include this, and any torch header.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "common/gemm.h"
#include "common/pool.h"
#include "common/workspace.h"

// Since torch 2.11; this library also loads into 2.10, where the symbol is missing and therefore null.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* result, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace gptkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// api.py has checked what users pass; this catches a raw operator called by hand with what the kernels cannot read.
inline bool is_bf16(const Tensor& x) {
    ScalarType type = x.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
                    "gptkernels cpu kernels take float32 or bfloat16, got ", torch::headeronly::toString(type));
    return type == ScalarType::BFloat16;
}

inline const void* data_of(const Tensor& x) {
    STD_TORCH_CHECK(x.is_contiguous(), "gptkernels cpu kernels take a contiguous tensor here: call contiguous() first");
    return x.const_data_ptr();
}

inline int32_t aoti_dtype(ScalarType type) {
    return torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
}

// An uninitialised contiguous tensor. Large ones are made in common/pool.h's memory where torch is new enough to take
// it.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
    size_t bytes = type == ScalarType::BFloat16 ? 2 : 4;
    for (int64_t size : sizes) bytes *= (size_t)size;
    if (bytes < POOLED_BYTES || torch_from_blob == nullptr) return torch::stable::new_empty(like, sizes, type);
    std::vector<int64_t> strides(sizes.size());
    int64_t stride = 1;
    for (size_t d = sizes.size(); d-- > 0; stride *= sizes[d]) strides[d] = stride;
    AtenTensorHandle handle;
    auto give = [](void* data, void*) { pool_give(data); };
    TORCH_ERROR_CODE_CHECK(torch_from_blob(pool_take(bytes), (int64_t)sizes.size(), sizes.data(), strides.data(), 0,
                                           aoti_dtype(type), aoti_torch_device_type_cpu(), -1, &handle,
                                           aoti_torch_layout_strided(), nullptr, 0, give, nullptr));
    return Tensor(handle);
}

inline std::vector<int64_t> sizes_of(const Tensor& x) {
    auto sizes = x.sizes();
    return {sizes.begin(), sizes.end()};
}

inline Tensor empty_as(const Tensor& x) { return empty(x, sizes_of(x), x.scalar_type()); }

// Rows of a tensor that is seen as (rows, last dimension).
inline int64_t rows_of(const Tensor& x) {
    int64_t rows = 1;
    for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
    return rows;
}

// A tensor seen as (rows, C) as a factor of gemm, summed over its columns (k is C) or over its rows (k is rows).
inline Factor over_columns(const Tensor& x) { return {data_of(x), x.size(x.dim() - 1), is_bf16(x), true}; }
inline Factor over_rows(const Tensor& x) { return {data_of(x), x.size(x.dim() - 1), is_bf16(x), false}; }

inline Output output(const Tensor& y) { return {y.mutable_data_ptr(), y.size(y.dim() - 1), is_bf16(y)}; }

inline Output output(const Tensor& y, const MaybeTensor& bias) {
    Output out = output(y);
    if (bias) {
        out.bias = data_of(*bias);
        out.bias_is_bf16 = is_bf16(*bias);
    }
    return out;
}

}  // namespace gptkernels
