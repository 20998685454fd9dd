// linear on CUDA: tensors to pointers. gptkernels/ops/linear/cuda.py chooses between the products here and torch's.
#include "linear/factor_torch.h"

namespace gptkernels {
namespace {

bool (*tf32_source)() = nullptr;

Tensor linear_forward(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
    DeviceScope scope(x);
    Type type = type_of(x);
    std::vector<int64_t> sizes = sizes_of(x);
    sizes.back() = weight.size(0);
    Tensor y = empty(x, sizes, x.scalar_type());
    Rows a = rows_for(x, type, scope.stream), b = rows_for(weight, type, scope.stream);
    gemm_cuda(product(type, rows_of(x), weight.size(0), weight.size(1), a.over_columns(), b.over_columns()),
              array(bias, type), mutable_array(y), scope.stream);
    return y;
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                   bool has_bias) {
    DeviceScope scope(x);
    Type type = type_of(x);
    int64_t N = rows_of(x), C_in = weight.size(1), C_out = weight.size(0);
    Tensor dx = empty_as(x), dweight = empty_as(weight);
    Array none{nullptr, type};
    Rows dy_rows = rows_for(dy, type, scope.stream), x_rows = rows_for(x, type, scope.stream);
    Rows w_rows = rows_for(weight, type, scope.stream);
    gemm_cuda(product(type, N, C_in, C_out, dy_rows.over_columns(), w_rows.over_rows()), none, mutable_array(dx),
              scope.stream);
    gemm_cuda(product(type, C_out, C_in, N, dy_rows.over_rows(), x_rows.over_rows()), none, mutable_array(dweight),
              scope.stream);
    return {dx, dweight, bias_gradient(dy, weight, C_out, has_bias, scope.stream)};
}

// The sums of dy's columns, in like's dtype.
Tensor column_sums(const Tensor& dy, const Tensor& like) {
    DeviceScope scope(dy);
    return bias_gradient(dy, like, dy.size(dy.dim() - 1), true, scope.stream);
}

}  // namespace

bool tf32_allowed() { return tf32_source && tf32_source(); }

}  // namespace gptkernels

// The stable ABI does not tell whether torch allows tf32: Python does (gptkernels/cuda_backend.py).
extern "C" __attribute__((visibility("default"))) void gptkernels_tf32_source(bool (*source)()) {
    gptkernels::tf32_source = source;
}

GPTKERNELS_KERNELS(m) {
    m.impl("linear_forward", TORCH_BOX(&gptkernels::linear_forward));
    m.impl("linear_backward", TORCH_BOX(&gptkernels::linear_backward));
    m.impl("column_sums", TORCH_BOX(&gptkernels::column_sums));
}
