// causal_attention, and its form on the packed projection, on CUDA: tensors to pointers and strides.
#include <cmath>

#include "attention/attention_cuda.h"
#include "common/device_torch.h"

namespace gptkernels {
namespace {

constexpr int64_t GROUP = 8;  // columns that the kernels take at a time
int64_t whole(int64_t D) { return (D + GROUP - 1) / GROUP * GROUP; }

// x where its rows start on 16 bytes and are whole groups of columns, as the kernels copy them; else a copy that is so.
Tensor readable(const Tensor& x) {
    int64_t D = x.size(x.dim() - 1), packet = 16 / x.element_size();
    bool fits = D % GROUP == 0 && x.stride(x.dim() - 1) == 1 && (uintptr_t)x.const_data_ptr() % 16 == 0;
    for (int64_t d = 0; d + 1 < x.dim(); ++d) fits = fits && (x.size(d) <= 1 || x.stride(d) % packet == 0);
    if (fits || x.numel() == 0) return x;
    return torch::stable::contiguous(torch::stable::pad(x, {0, whole(D) - D}));
}

// An output with whole groups of columns, and the same without the columns that were asked for only by the kernels.
Tensor wide(const Tensor& like, std::vector<int64_t> sizes) {
    sizes.back() = whole(sizes.back());
    return empty(like, sizes, like.scalar_type());
}
Tensor trimmed(Tensor x, int64_t D) {
    int64_t last = x.dim() - 1;
    return x.size(last) == D ? x : torch::stable::contiguous(torch::stable::narrow(x, last, 0, D));
}

// Dimensions b, h and t of a tensor, from `offset` elements on.
HeadsArray heads(const Tensor& x, int64_t b, int64_t h, int64_t t, int64_t offset = 0) {
    auto stride = [&](int64_t d) { return x.size(d) > 1 ? x.stride(d) : 0; };
    char* data = static_cast<char*>(pointer_of(x));
    return {data + offset * (int64_t)x.element_size(), stride(b), stride(h), stride(t)};
}
HeadsArray head_major(const Tensor& x) { return heads(x, 0, 1, 2); }                              // (B, H, T, D)
HeadsArray token_major(const Tensor& x) { return heads(x, 0, 2, 1); }                             // (B, T, H, D)
HeadsArray part(const Tensor& qkv, int64_t i) { return heads(qkv, 0, 3, 1, i * qkv.stride(2)); }  // (B, T, 3, H, D)

AttentionCuda problem(const Tensor& x, int64_t B, int64_t H, int64_t T, int64_t S, double scale, double dropout_p,
                      const MaybeTensor& seed) {
    int64_t D = x.size(x.dim() - 1);
    STD_TORCH_CHECK(D <= MOST_COLUMNS, "gptkernels attention takes a head dim up to ", MOST_COLUMNS, ", got ", D);
    STD_TORCH_CHECK(dropout_p == 0.0 || seed.has_value(), "gptkernels attention needs a seed for dropout ", dropout_p);
    const int64_t* key = dropout_p > 0.0 ? static_cast<const int64_t*>(pointer_of(*seed)) : nullptr;
    return {type_of(x),
            B,
            H,
            T,
            S,
            whole(D),
            (float)scale,
            (uint32_t)std::floor(dropout_p * 4294967296.0),
            (float)(1.0 / (1.0 - dropout_p)),
            key};
}

Tensor stats_of(const Tensor& x, int64_t B, int64_t H, int64_t T) { return empty(x, {B, H, T, 2}, ScalarType::Float); }
Tensor terms_of(const Tensor& x, int64_t B, int64_t H, int64_t T) {
    return empty(x, {B, H, 2, term_rows(T)}, ScalarType::Float);
}
// Memory for the atomics' sums; empty, and then null, without them.
Tensor sums_of(const Tensor& x, int64_t B, int64_t H, int64_t T, int64_t D, bool atomics) {
    return empty(x, {atomics ? B : 0, H, term_rows(T), one_pass_columns(D)}, ScalarType::Float);
}
const float* contiguous_floats(const Tensor& x) {
    check_contiguous(x);
    return floats(x);
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                             double dropout_p, const MaybeTensor& seed) {
    DeviceScope scope(q);
    int64_t B = q.size(0), H = q.size(1), T = q.size(2), D = q.size(3);
    Tensor out = wide(q, {B, T, H, D}), stats = stats_of(q, B, H, T), x = readable(q), y = readable(k), z = readable(v);
    attention_forward_cuda(problem(q, B, H, T, k.size(2), scale, dropout_p, seed), head_major(x), head_major(y),
                           head_major(z), token_major(out), floats(stats), scope.stream);
    Tensor result = trimmed(out, D);
    return {torch::stable::transpose(result, 1, 2), stats};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& out, const Tensor& stats,
                                                      double scale, double dropout_p, const MaybeTensor& seed,
                                                      bool atomics) {
    DeviceScope scope(q);
    int64_t B = q.size(0), H = q.size(1), T = q.size(2), S = k.size(2), D = q.size(3);
    Tensor dq = wide(q, sizes_of(q)), dk = wide(k, sizes_of(k)), dv = wide(v, sizes_of(v)),
           terms = terms_of(q, B, H, T);
    Tensor g = readable(dout), x = readable(q), y = readable(k), z = readable(v), o = readable(out);
    Tensor dq_sums = sums_of(q, B, H, T, D, atomics);
    attention_backward_cuda(
        problem(q, B, H, T, S, scale, dropout_p, seed),
        {head_major(g), head_major(x), head_major(y), head_major(z), head_major(o), contiguous_floats(stats),
         floats(terms), head_major(dq), head_major(dk), head_major(dv), floats(dq_sums)},
        scope.stream);
    return {trimmed(dq, D), trimmed(dk, D), trimmed(dv, D)};
}

std::tuple<Tensor, Tensor> attention_packed_forward(const Tensor& qkv, double scale, double dropout_p,
                                                    const MaybeTensor& seed) {
    DeviceScope scope(qkv);
    int64_t B = qkv.size(0), T = qkv.size(1), H = qkv.size(3), D = qkv.size(4);
    Tensor out = wide(qkv, {B, T, H, D}), stats = stats_of(qkv, B, H, T), x = readable(qkv);
    attention_forward_cuda(problem(qkv, B, H, T, T, scale, dropout_p, seed), part(x, 0), part(x, 1), part(x, 2),
                           token_major(out), floats(stats), scope.stream);
    return {trimmed(out, D), stats};
}

Tensor attention_packed_backward(const Tensor& dout, const Tensor& qkv, const Tensor& out, const Tensor& stats,
                                 double scale, double dropout_p, const MaybeTensor& seed, bool atomics) {
    DeviceScope scope(qkv);
    int64_t B = qkv.size(0), T = qkv.size(1), H = qkv.size(3), D = qkv.size(4);
    Tensor dq_sums = sums_of(qkv, B, H, T, D, atomics);
    Tensor dqkv = wide(qkv, sizes_of(qkv)), terms = terms_of(qkv, B, H, T);
    Tensor g = readable(dout), x = readable(qkv), o = readable(out);
    attention_backward_cuda(
        problem(qkv, B, H, T, T, scale, dropout_p, seed),
        {token_major(g), part(x, 0), part(x, 1), part(x, 2), token_major(o), contiguous_floats(stats), floats(terms),
         part(dqkv, 0), part(dqkv, 1), part(dqkv, 2), floats(dq_sums)},
        scope.stream);
    return trimmed(dqkv, D);
}

}  // namespace
}  // namespace gptkernels

GPTKERNELS_LIBRARY(m) {
    m.impl("attention_forward", TORCH_BOX(&gptkernels::attention_forward));
    m.impl("attention_backward", TORCH_BOX(&gptkernels::attention_backward));
    m.impl("attention_packed_forward", TORCH_BOX(&gptkernels::attention_packed_forward));
    m.impl("attention_packed_backward", TORCH_BOX(&gptkernels::attention_packed_backward));
}
