// gelu_mlp: h = x W_fc^T + b_fc, g = gelu(h), y = g W_proj^T + b_proj, and its gradients.
#include "common/torch.h"
#include "linear/linear_cpu.h"
#include "mlp/mlp_cpu.h"

namespace gptkernels {
namespace {

// g, and dh in the backward, live only within a call: one workspace for both. Pages of memory hold h; at odd lines of a
// page, the rows of the three that an epilogue reads and writes together do not fall into the same sets of the cache.
Matrix scratch(int64_t rows, int64_t F, bool bf16, int64_t index, int64_t count) {
    constexpr size_t LINE = 64, SHIFT = 21 * LINE;
    size_t bytes = ((size_t)rows * F * (bf16 ? 2 : 4) + LINE - 1) / LINE * LINE + SHIFT;
    return {static_cast<char*>(workspace(Slot::OPERATOR, bytes * count)) + SHIFT + bytes * index, F, bf16};
}

Factor matrix_over_columns(const Matrix& m) { return {m.data, m.ld, m.is_bf16, true}; }
Factor matrix_over_rows(const Matrix& m) { return {m.data, m.ld, m.is_bf16, false}; }

std::tuple<Tensor, Tensor> gelu_mlp_forward(const Tensor& x, const Tensor& w_fc, const MaybeTensor& b_fc,
                                            const Tensor& w_proj, const MaybeTensor& b_proj, bool tanh) {
    int64_t N = rows_of(x), C = w_fc.size(1), F = w_fc.size(0);
    bool bf16 = is_bf16(x);
    std::vector<int64_t> sizes = sizes_of(x);
    sizes.back() = F;
    Tensor h = empty(x, sizes, x.scalar_type()), y = empty_as(x);
    Matrix g = scratch(N, F, bf16, 0, 1);
    gemm_gelu(N, F, C, over_columns(x), over_columns(w_fc), bf16, tanh, b_fc ? data_of(*b_fc) : nullptr,
              b_fc && is_bf16(*b_fc), {h.mutable_data_ptr(), F, bf16}, g);
    gemm(N, C, F, matrix_over_columns(g), over_columns(w_proj), bf16, output(y, b_proj));
    return {y, h};
}

Tensor bias_gradient(const void* dy, bool bf16, int64_t N, const Tensor& weight, bool exists) {
    Tensor db = empty(weight, {exists ? weight.size(0) : 0}, weight.scalar_type());
    if (exists) linear_bias_gradient(dy, bf16, N, weight.size(0), db.mutable_data_ptr(), is_bf16(db));
    return db;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gelu_mlp_backward(const Tensor& dy, const Tensor& x, const Tensor& h,
                                                                     const Tensor& w_fc, const Tensor& w_proj,
                                                                     bool has_b_fc, bool has_b_proj, bool tanh) {
    int64_t N = rows_of(x), C = w_fc.size(1), F = w_fc.size(0);
    bool bf16 = is_bf16(x);
    Tensor dx = empty_as(x), dw_fc = empty_as(w_fc), dw_proj = empty_as(w_proj);
    Matrix dh = scratch(N, F, bf16, 0, 2), g = scratch(N, F, bf16, 1, 2);
    Matrix saved{const_cast<void*>(data_of(h)), F, bf16};
    gemm_gelu_backward(N, F, C, over_columns(dy), over_rows(w_proj), bf16, tanh, saved, dh, g);
    gemm(C, F, N, over_rows(dy), matrix_over_rows(g), bf16, output(dw_proj));
    gemm(F, C, N, matrix_over_rows(dh), over_rows(x), bf16, output(dw_fc));
    gemm(N, C, F, matrix_over_columns(dh), over_rows(w_fc), bf16, output(dx));
    return {dx, dw_fc, bias_gradient(dh.data, bf16, N, w_fc, has_b_fc), dw_proj,
            bias_gradient(dy.const_data_ptr(), is_bf16(dy), N, w_proj, has_b_proj)};
}

}  // namespace
}  // namespace gptkernels

STABLE_TORCH_LIBRARY_IMPL(gptkernels, CPU, m) {
    m.impl("gelu_mlp_forward", TORCH_BOX(&gptkernels::gelu_mlp_forward));
    m.impl("gelu_mlp_backward", TORCH_BOX(&gptkernels::gelu_mlp_backward));
}
