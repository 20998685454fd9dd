// What the bindings share: tensors in, raw pointers out. Only *_torch.cpp files include this, and any torch header.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "common/gemm.h"
#include "common/workspace.h"

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

// An uninitialised tensor; large ones on huge pages, since they are written at once.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
    Tensor y = torch::stable::new_empty(like, sizes, type);
    size_t bytes = (size_t)y.numel() * y.element_size();
    if (bytes >= (size_t)4 << 20) advise_huge_pages(y.mutable_data_ptr(), bytes);
    return y;
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
inline Factor over_columns(const Tensor& x) {
    return {data_of(x), x.size(x.dim() - 1), is_bf16(x), true};
}
inline Factor over_rows(const Tensor& x) {
    return {data_of(x), x.size(x.dim() - 1), is_bf16(x), false};
}

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
