// torch's matrix product as the outside product of common/gemm.h.
#include <array>

#include "common/torch.h"

namespace gptkernels {
namespace {

// A matrix in memory that stays ours.
Tensor matrix(const void* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
    std::array<int64_t, 2> sizes{rows, cols}, strides{row_stride, col_stride};
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(const_cast<void*>(data), 2, sizes.data(), strides.data(),
                                                              0, aoti_dtype(ScalarType::BFloat16),
                                                              aoti_torch_device_type_cpu(), -1, &handle));
    return Tensor(handle);
}

void torch_product(int64_t M, int64_t N, int64_t K, const Factor& a, const Factor& b, bf16* c, int64_t ldc) {
    using torch::stable::detail::from;
    using torch::stable::detail::to;
    std::array<StableIValue, 3> stack{
        from(matrix(a.data, M, K, a.k_contiguous ? a.ld : 1, a.k_contiguous ? 1 : a.ld)),
        from(matrix(b.data, K, N, b.k_contiguous ? 1 : b.ld, b.k_contiguous ? b.ld : 1)),
        from(matrix(c, M, N, ldc, 1)),
    };
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    (void)to<Tensor>(stack[0]);  // out once more, a reference to let go
}

}  // namespace
}  // namespace gptkernels

// What torch says of the CPU is asked in Python (gptkernels/backend.py), which has it for every version of torch.
extern "C" __attribute__((visibility("default"))) void gptkernels_bf16_products_by_torch(bool on) {
    gptkernels::set_outside_product(on ? gptkernels::torch_product : nullptr);
}
