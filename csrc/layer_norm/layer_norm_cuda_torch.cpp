// layer_norm and its fusion with a residual addition on CUDA: tensors to pointers.
#include "common/device_torch.h"
#include "layer_norm/layer_norm_cuda.h"

namespace gptkernels {
namespace {

Tensor statistic(const Tensor& x) {
    std::vector<int64_t> sizes = sizes_of(x);
    sizes.pop_back();
    return empty(x, sizes, ScalarType::Float);
}

int64_t columns_of(const Tensor& x) {
    int64_t C = x.size(x.dim() - 1);
    STD_TORCH_CHECK(C <= LAYER_NORM_MOST_COLUMNS, "layer_norm on cuda takes rows of up to ", LAYER_NORM_MOST_COLUMNS,
                    " columns, got ", C, ": use backend='triton' or 'reference'");
    return C;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& x, const MaybeTensor& weight,
                                                      const MaybeTensor& bias, double eps, ScalarType dtype) {
    DeviceScope scope(x);
    Tensor y = empty(x, sizes_of(x), dtype), mean = statistic(x), rstd = statistic(x);
    Type type = type_of(x);
    layer_norm_forward_cuda({rows_of(x),
                             columns_of(x),
                             (float)eps,
                             array(x),
                             {nullptr, type},
                             array(weight, type),
                             array(bias, type),
                             mutable_array(y),
                             {nullptr, type},
                             floats(mean),
                             floats(rstd)},
                            scope.stream);
    return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward(const Tensor& x, const Tensor& residual,
                                                                  const MaybeTensor& weight, const MaybeTensor& bias,
                                                                  double eps, ScalarType dtype) {
    DeviceScope scope(x);
    bool same = x.scalar_type() == residual.scalar_type();
    Tensor total = empty(x, sizes_of(x), same ? x.scalar_type() : ScalarType::Float);
    Tensor y = empty(x, sizes_of(x), dtype), mean = statistic(x), rstd = statistic(x);
    Type type = type_of(x);
    layer_norm_forward_cuda({rows_of(x), columns_of(x), (float)eps, array(x), array(residual), array(weight, type),
                             array(bias, type), mutable_array(y), mutable_array(total), floats(mean), floats(rstd)},
                            scope.stream);
    return {y, total, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy, const MaybeTensor& dtotal, const Tensor& x,
                                                       const MaybeTensor& weight, bool has_bias, const Tensor& mean,
                                                       const Tensor& rstd) {
    DeviceScope scope(x);
    int64_t N = rows_of(x), C = columns_of(x);
    const Tensor& like = weight ? *weight : x;
    Tensor dx = empty_as(x);
    Tensor dweight = empty(like, {weight ? C : 0}, like.scalar_type());
    Tensor dbias = empty(like, {has_bias ? C : 0}, like.scalar_type());
    Tensor partial =
        empty(x, {(int64_t)weight.has_value() + has_bias, layer_norm_partial_floats(N, C)}, ScalarType::Float);
    layer_norm_backward_cuda(
        {N, C, array(dy), array(dtotal, type_of(x)), array(x), array(weight, type_of(x)), floats(mean), floats(rstd),
         mutable_array(dx), mutable_array(dweight), mutable_array(dbias), floats(partial)},
        scope.stream);
    return {dx, dweight, dbias};
}

}  // namespace
}  // namespace gptkernels

GPTKERNELS_LIBRARY(m) {
    m.impl("layer_norm_forward", TORCH_BOX(&gptkernels::layer_norm_forward));
    m.impl("add_layer_norm_forward", TORCH_BOX(&gptkernels::add_layer_norm_forward));
    m.impl("layer_norm_backward", TORCH_BOX(&gptkernels::layer_norm_backward));
}
