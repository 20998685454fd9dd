// What the bindings of the CUDA kernels share: tensors in, arrays out, for the CUDA library and, with GPTKERNELS_SIMT,
// for csrc/simt. Only *_cuda_torch.cpp files include this.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "common/dtype.h"

#ifdef GPTKERNELS_SIMT
#include <mutex>

#include "simt/engine.h"
#define GPTKERNELS_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(gptkernels_simt, CPU, m)
#define GPTKERNELS_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(gptkernels_kernels, CPU, m)
#else
#include <torch/csrc/stable/accelerator.h>
#define GPTKERNELS_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(gptkernels, CUDA, m)
#define GPTKERNELS_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(gptkernels_kernels, CUDA, m)
#endif

namespace gptkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Lives as long as an operator runs: x's device is the current one, and `stream` its current stream. In csrc/simt it is
// the time for which the tensors that were asked for their pointers may be touched.
#ifdef GPTKERNELS_SIMT
class DeviceScope {
  public:
    explicit DeviceScope(const Tensor&) : lock(simt::one_operator()) {}
    ~DeviceScope() { simt::clear_buffers(); }
    void* stream = nullptr;

  private:
    std::lock_guard<std::recursive_mutex> lock;
};
#else
class DeviceScope {
  public:
    explicit DeviceScope(const Tensor& x) : guard(x.get_device_index()) {
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    }
    void* stream = nullptr;

  private:
    torch::stable::accelerator::DeviceGuard guard;
};
#endif

// The pointer of a tensor; csrc/simt takes note of how far it reaches.
inline void* pointer_of(const Tensor& x) {
    void* data = x.numel() == 0 ? nullptr : x.mutable_data_ptr();
#ifdef GPTKERNELS_SIMT
    int64_t last = 0;
    for (int64_t d = 0; d < x.dim(); ++d) last += (x.size(d) - 1) * x.stride(d);
    if (data) simt::add_buffer(data, (last + 1) * x.element_size());
#endif
    return data;
}

// api.py has checked what users pass; this catches a raw operator called by hand with what the kernels cannot read.
inline Type type_of(const Tensor& x) {
    ScalarType type = x.scalar_type();
    if (type == ScalarType::Float) return Type::FLOAT32;
    if (type == ScalarType::BFloat16) return Type::BFLOAT16;
    STD_TORCH_CHECK(type == ScalarType::Half, "gptkernels cuda kernels take float32, bfloat16 or float16, got ",
                    torch::headeronly::toString(type));
    return Type::FLOAT16;
}

inline void check_contiguous(const Tensor& x) {
    STD_TORCH_CHECK(x.is_contiguous(),
                    "gptkernels cuda kernels take a contiguous tensor here: call contiguous() first");
}

inline Array array(const Tensor& x) {
    check_contiguous(x);
    return {pointer_of(x), type_of(x)};
}
inline Array array(const MaybeTensor& x, Type absent) { return x ? array(*x) : Array{nullptr, absent}; }
inline MutableArray mutable_array(const Tensor& x) { return {pointer_of(x), type_of(x)}; }
inline float* floats(const Tensor& x) { return static_cast<float*>(pointer_of(x)); }

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
    return torch::stable::new_empty(like, sizes, type);
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

}  // namespace gptkernels
