// linear: y = x W^T + b, dx = dy W, dW = dy^T x, db = column sums of dy.
#include "common/torch.h"
#include "linear/linear_cpu.h"

namespace gptkernels {
namespace {

Tensor linear_forward(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
    std::vector<int64_t> sizes = sizes_of(x);
    sizes.back() = weight.size(0);
    Tensor y = empty(x, sizes, x.scalar_type());
    gemm(rows_of(x), weight.size(0), weight.size(1), over_columns(x), over_columns(weight), is_bf16(x),
         output(y, bias));
    return y;
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                   bool has_bias) {
    int64_t N = rows_of(x), C_in = weight.size(1), C_out = weight.size(0);
    Tensor dx = empty_as(x), dweight = empty_as(weight);
    gemm(N, C_in, C_out, over_columns(dy), over_rows(weight), is_bf16(x), output(dx));
    gemm(C_out, C_in, N, over_rows(dy), over_rows(x), is_bf16(x), output(dweight));
    Tensor dbias = empty(weight, {has_bias ? C_out : 0}, weight.scalar_type());
    if (has_bias)
        linear_bias_gradient(dy.const_data_ptr(), is_bf16(dy), N, C_out, dbias.mutable_data_ptr(), is_bf16(dbias));
    return {dx, dweight, dbias};
}

}  // namespace
}  // namespace gptkernels

STABLE_TORCH_LIBRARY_IMPL(gptkernels, CPU, m) {
    m.impl("linear_forward", TORCH_BOX(&gptkernels::linear_forward));
    m.impl("linear_backward", TORCH_BOX(&gptkernels::linear_backward));
}
