// gelu_mlp on CUDA: tensors to pointers. gptkernels/ops/mlp/cuda.py chooses between the products here and torch's.
#include "linear/factor_torch.h"
#include "mlp/mlp_cuda.h"

namespace gptkernels {
namespace {

std::tuple<Tensor, Tensor> gelu_mlp_forward(const Tensor& x, const Tensor& w_fc, const MaybeTensor& b_fc,
                                            const Tensor& w_proj, const MaybeTensor& b_proj, bool tanh) {
    DeviceScope scope(x);
    Type type = type_of(x);
    int64_t N = rows_of(x), C = w_fc.size(1), F = w_fc.size(0);
    std::vector<int64_t> sizes = sizes_of(x);
    sizes.back() = F;
    Tensor h = empty(x, sizes, x.scalar_type()), y = empty_as(x);
    Rows g = empty_rows(x, N, F, type);
    Rows x_rows = rows_for(x, type, scope.stream), fc = rows_for(w_fc, type, scope.stream);
    gemm_gelu_cuda(product(type, N, F, C, x_rows.over_columns(), fc.over_columns()), array(b_fc, type), tanh,
                   pointer_of(h), g.data(), scope.stream);
    Rows proj = rows_for(w_proj, type, scope.stream);
    gemm_cuda(product(type, N, C, F, g.over_columns(), proj.over_columns()), array(b_proj, type), mutable_array(y),
              scope.stream);
    return {y, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gelu_mlp_backward(const Tensor& dy, const Tensor& x, const Tensor& h,
                                                                     const Tensor& w_fc, const Tensor& w_proj,
                                                                     bool has_b_fc, bool has_b_proj, bool tanh) {
    DeviceScope scope(x);
    Type type = type_of(x);
    int64_t N = rows_of(x), C = w_fc.size(1), F = w_fc.size(0);
    Array none{nullptr, type};
    check_contiguous(h);
    Rows dy_rows = rows_for(dy, type, scope.stream), x_rows = rows_for(x, type, scope.stream);
    Rows fc = rows_for(w_fc, type, scope.stream), proj = rows_for(w_proj, type, scope.stream);
    Rows dh = empty_rows(x, N, F, type), g = empty_rows(x, N, F, type);
    Tensor db_fc = empty(w_fc, {has_b_fc ? F : 0}, w_fc.scalar_type());
    Tensor partial = empty(w_fc, {has_b_fc ? gelu_partial_rows(N) : 0, F}, ScalarType::Float);
    gemm_gelu_backward_cuda(product(type, N, F, C, dy_rows.over_columns(), proj.over_rows()), pointer_of(h), tanh,
                            dh.data(), g.data(), floats(partial), mutable_array(db_fc), scope.stream);

    Tensor dx = empty_as(x), dw_fc = empty_as(w_fc), dw_proj = empty_as(w_proj);
    gemm_cuda(product(type, C, F, N, dy_rows.over_rows(), g.over_rows()), none, mutable_array(dw_proj), scope.stream);
    gemm_cuda(product(type, F, C, N, dh.over_rows(), x_rows.over_rows()), none, mutable_array(dw_fc), scope.stream);
    gemm_cuda(product(type, N, C, F, dh.over_columns(), fc.over_rows()), none, mutable_array(dx), scope.stream);
    return {dx, dw_fc, db_fc, dw_proj, bias_gradient(dy, w_proj, C, has_b_proj, scope.stream)};
}

Tensor gelu(const Tensor& h, bool tanh) {
    DeviceScope scope(h);
    Tensor g = empty_as(h);
    gelu_cuda(array(h), h.numel(), tanh, pointer_of(g), scope.stream);
    return g;
}

// dg becomes dh; (g, the sums of dh's columns in like's dtype, or an empty tensor).
std::tuple<Tensor, Tensor> gelu_backward(Tensor& dg, const Tensor& h, const Tensor& like, bool tanh, bool sums) {
    DeviceScope scope(h);
    check_contiguous(dg);
    STD_TORCH_CHECK(dg.scalar_type() == h.scalar_type() && dg.numel() == h.numel(), "dg must be like h");
    int64_t rows = rows_of(h), columns = h.size(h.dim() - 1);
    Tensor g = empty_as(h), db = empty(like, {sums ? columns : 0}, like.scalar_type());
    Tensor partial = empty(h, {sums ? gelu_pass_partial_rows(rows) : 0, columns}, ScalarType::Float);
    gelu_backward_cuda(array(h), rows, columns, tanh, pointer_of(dg), pointer_of(g), floats(partial), mutable_array(db),
                       scope.stream);
    return {g, db};
}

}  // namespace
}  // namespace gptkernels

GPTKERNELS_KERNELS(m) {
    m.impl("gelu_mlp_forward", TORCH_BOX(&gptkernels::gelu_mlp_forward));
    m.impl("gelu_mlp_backward", TORCH_BOX(&gptkernels::gelu_mlp_backward));
    m.impl("gelu", TORCH_BOX(&gptkernels::gelu));
    m.impl("gelu_backward", TORCH_BOX(&gptkernels::gelu_backward));
}
