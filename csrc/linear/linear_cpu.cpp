// The affine map needs no kernel of its own beside gemm and its store-with-bias epilogue (common/gemm.h); only the bias
// gradient is here.
#include "linear/linear_cpu.h"

#include "common/columns.h"

namespace gptkernels {
namespace {

template <class T>
void sums(const T* dy, int64_t N, int64_t C_out, void* dbias, bool dbias_is_bf16) {
    dbias_is_bf16 ? column_sums(dy, N, C_out, C_out, static_cast<bf16*>(dbias))
                  : column_sums(dy, N, C_out, C_out, static_cast<float*>(dbias));
}

}  // namespace

void linear_bias_gradient(const void* dy, bool dy_is_bf16, int64_t N, int64_t C_out, void* dbias, bool dbias_is_bf16) {
    dy_is_bf16 ? sums(static_cast<const bf16*>(dy), N, C_out, dbias, dbias_is_bf16)
               : sums(static_cast<const float*>(dy), N, C_out, dbias, dbias_is_bf16);
}

}  // namespace gptkernels
