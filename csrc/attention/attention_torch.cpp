// causal_attention, and its form on the packed projection: tensors to pointers and strides.
#include <cmath>

#include "attention/attention_cpu.h"
#include "common/torch.h"

namespace gptkernels {
namespace {

// (B, H, T, D) with any strides but the last one.
Heads heads(const Tensor& x) {
    STD_TORCH_CHECK(x.size(3) <= 1 || x.stride(3) == 1, "gptkernels attention takes a contiguous last dimension");
    return {const_cast<void*>(x.const_data_ptr()), is_bf16(x), x.stride(0), x.stride(1), x.stride(2)};
}

// (B, T, H, D).
Heads token_major(const Tensor& x) {
    STD_TORCH_CHECK(x.size(3) <= 1 || x.stride(3) == 1, "gptkernels attention takes a contiguous last dimension");
    return {const_cast<void*>(x.const_data_ptr()), is_bf16(x), x.stride(0), x.stride(2), x.stride(1)};
}

// Part 0, 1 or 2 (q, k, v) of (B, T, 3, H, D).
Heads part(const Tensor& qkv, int64_t index) {
    STD_TORCH_CHECK(qkv.size(4) <= 1 || qkv.stride(4) == 1, "gptkernels attention takes a contiguous last dimension");
    char* data = static_cast<char*>(const_cast<void*>(qkv.const_data_ptr()));
    return {data + index * qkv.stride(2) * (int64_t)qkv.element_size(), is_bf16(qkv), qkv.stride(0), qkv.stride(3),
            qkv.stride(1)};
}

Attention problem(int64_t B, int64_t H, int64_t T, int64_t S, int64_t D, double scale, double dropout_p,
                  const MaybeTensor& seed) {
    STD_TORCH_CHECK(D <= MAX_HEAD_DIM, "gptkernels attention takes a head dim up to ", MAX_HEAD_DIM, ", got ", D);
    STD_TORCH_CHECK(dropout_p == 0.0 || seed.has_value(), "gptkernels attention needs a seed for dropout ", dropout_p);
    uint64_t key = seed ? (uint64_t)*static_cast<const int64_t*>(seed->const_data_ptr()) : 0;
    return {
        B,  H, T, S, D, (float)scale, (uint32_t)std::floor(dropout_p * 4294967296.0), (float)(1.0 / (1.0 - dropout_p)),
        key};
}

void check_deterministic(bool atomics) {
    STD_TORCH_CHECK(!atomics, "gptkernels cpu attention has the deterministic backward only: leave atomics off");
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                             double dropout_p, const MaybeTensor& seed) {
    int64_t B = q.size(0), H = q.size(1), T = q.size(2), D = q.size(3);
    Tensor out = empty(q, {B, T, H, D}, q.scalar_type()), stats = empty(q, {B, H, T, 2}, ScalarType::Float);
    attention_forward_cpu(problem(B, H, T, k.size(2), D, scale, dropout_p, seed), heads(q), heads(k), heads(v),
                          token_major(out), stats.mutable_data_ptr<float>());
    return {torch::stable::transpose(out, 1, 2), stats};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& out, const Tensor& stats,
                                                      double scale, double dropout_p, const MaybeTensor& seed,
                                                      bool atomics) {
    check_deterministic(atomics);
    Tensor dq = empty_as(q), dk = empty_as(k), dv = empty_as(v);
    attention_backward_cpu(problem(q.size(0), q.size(1), q.size(2), k.size(2), q.size(3), scale, dropout_p, seed),
                           heads(dout), heads(q), heads(k), heads(v), heads(out),
                           static_cast<const float*>(data_of(stats)), heads(dq), heads(dk), heads(dv));
    return {dq, dk, dv};
}

std::tuple<Tensor, Tensor> attention_packed_forward(const Tensor& qkv, double scale, double dropout_p,
                                                    const MaybeTensor& seed) {
    int64_t B = qkv.size(0), T = qkv.size(1), H = qkv.size(3), D = qkv.size(4);
    Tensor out = empty(qkv, {B, T, H, D}, qkv.scalar_type()), stats = empty(qkv, {B, H, T, 2}, ScalarType::Float);
    attention_forward_cpu(problem(B, H, T, T, D, scale, dropout_p, seed), part(qkv, 0), part(qkv, 1), part(qkv, 2),
                          token_major(out), stats.mutable_data_ptr<float>());
    return {out, stats};
}

Tensor attention_packed_backward(const Tensor& dout, const Tensor& qkv, const Tensor& out, const Tensor& stats,
                                 double scale, double dropout_p, const MaybeTensor& seed, bool atomics) {
    check_deterministic(atomics);
    int64_t B = qkv.size(0), T = qkv.size(1), H = qkv.size(3), D = qkv.size(4);
    Tensor dqkv = empty_as(qkv);
    attention_backward_cpu(problem(B, H, T, T, D, scale, dropout_p, seed), token_major(dout), part(qkv, 0),
                           part(qkv, 1), part(qkv, 2), token_major(out), static_cast<const float*>(data_of(stats)),
                           part(dqkv, 0), part(dqkv, 1), part(dqkv, 2));
    return dqkv;
}

}  // namespace
}  // namespace gptkernels

STABLE_TORCH_LIBRARY_IMPL(gptkernels, CPU, m) {
    m.impl("attention_forward", TORCH_BOX(&gptkernels::attention_forward));
    m.impl("attention_backward", TORCH_BOX(&gptkernels::attention_backward));
    m.impl("attention_packed_forward", TORCH_BOX(&gptkernels::attention_packed_forward));
    m.impl("attention_packed_backward", TORCH_BOX(&gptkernels::attention_packed_backward));
}
