// layer_norm and its fusion with a residual addition: tensors to pointers.
#include "common/torch.h"
#include "layer_norm/layer_norm_cpu.h"

namespace gptkernels {
namespace {

Numbers numbers(const Tensor& x) { return {data_of(x), is_bf16(x)}; }
Numbers numbers(const MaybeTensor& x) { return x ? numbers(*x) : Numbers{nullptr, false}; }
MutableNumbers mutable_numbers(const Tensor& x) { return {x.mutable_data_ptr(), is_bf16(x)}; }

Tensor statistic(const Tensor& x) {
    std::vector<int64_t> sizes = sizes_of(x);
    sizes.pop_back();
    return empty(x, sizes, ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& x, const MaybeTensor& weight,
                                                      const MaybeTensor& bias, double eps, ScalarType dtype) {
    Tensor y = empty(x, sizes_of(x), dtype), mean = statistic(x), rstd = statistic(x);
    // Without a residual its dtype must not widen the sum's: it takes x's.
    layer_norm_forward_cpu({rows_of(x),
                            x.size(x.dim() - 1),
                            (float)eps,
                            numbers(x),
                            {nullptr, is_bf16(x)},
                            numbers(weight),
                            numbers(bias),
                            mutable_numbers(y),
                            {nullptr, is_bf16(x)},
                            mean.mutable_data_ptr<float>(),
                            rstd.mutable_data_ptr<float>()});
    return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward(const Tensor& x, const Tensor& residual,
                                                                  const MaybeTensor& weight, const MaybeTensor& bias,
                                                                  double eps, ScalarType dtype) {
    Tensor total = empty_as(is_bf16(x) ? residual : x);
    Tensor y = empty(x, sizes_of(x), dtype), mean = statistic(x), rstd = statistic(x);
    layer_norm_forward_cpu({rows_of(x), x.size(x.dim() - 1), (float)eps, numbers(x), numbers(residual), numbers(weight),
                            numbers(bias), mutable_numbers(y), mutable_numbers(total), mean.mutable_data_ptr<float>(),
                            rstd.mutable_data_ptr<float>()});
    return {y, total, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy, const MaybeTensor& dtotal, const Tensor& x,
                                                       const MaybeTensor& weight, bool has_bias, const Tensor& mean,
                                                       const Tensor& rstd) {
    int64_t C = x.size(x.dim() - 1);
    const Tensor& like = weight ? *weight : x;
    Tensor dx = empty_as(x);
    Tensor dweight = empty(like, {weight ? C : 0}, like.scalar_type());
    Tensor dbias = empty(like, {has_bias ? C : 0}, like.scalar_type());
    MutableNumbers none{nullptr, false};
    layer_norm_backward_cpu({rows_of(x), C, numbers(dy), numbers(dtotal), numbers(x), numbers(weight),
                             mean.const_data_ptr<float>(), rstd.const_data_ptr<float>(), mutable_numbers(dx),
                             weight ? mutable_numbers(dweight) : none, has_bias ? mutable_numbers(dbias) : none});
    return {dx, dweight, dbias};
}

}  // namespace
}  // namespace gptkernels

STABLE_TORCH_LIBRARY_IMPL(gptkernels, CPU, m) {
    m.impl("layer_norm_forward", TORCH_BOX(&gptkernels::layer_norm_forward));
    m.impl("add_layer_norm_forward", TORCH_BOX(&gptkernels::add_layer_norm_forward));
    m.impl("layer_norm_backward", TORCH_BOX(&gptkernels::layer_norm_backward));
}
