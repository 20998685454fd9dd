// linear_cross_entropy: tensors to pointers.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/torch.h"
#include "cross_entropy/cross_entropy_cpu.h"

namespace gptkernels {
namespace {

CrossEntropy problem(const Tensor& x, const Tensor& weight, const Tensor& targets, int64_t ignore_index, bool mean,
                     int64_t vocab_size) {
    CrossEntropy p{x.size(0), x.size(1),    vocab_size, over_columns(x), over_columns(weight), is_bf16(x),
                   nullptr,   ignore_index, mean};
    p.targets = static_cast<const int64_t*>(data_of(targets));
    int64_t bad = first_bad_target(p);
    if (bad >= 0)  // a user's error: STD_TORCH_CHECK would begin it with this file's name
        throw std::runtime_error("targets must be in [0, " + std::to_string(vocab_size) + ") or ignore_index " +
                                 std::to_string(ignore_index) + ", got " + std::to_string(p.targets[bad]) + " at " +
                                 std::to_string(bad) + ": check the tokens and vocab_size");
    return p;
}

Tensor scalar(const Tensor& like, float value) {
    Tensor y = torch::stable::new_empty(like, {}, ScalarType::Float);
    *y.mutable_data_ptr<float>() = value;
    return y;
}

Tensor linear_cross_entropy_forward(const Tensor& x, const Tensor& weight, const Tensor& targets, int64_t ignore_index,
                                    bool mean, int64_t vocab_size) {
    return scalar(x, cross_entropy_cpu(problem(x, weight, targets, ignore_index, mean, vocab_size), nullptr));
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_gradients(const Tensor& x, const Tensor& weight,
                                                                  const Tensor& targets, int64_t ignore_index,
                                                                  bool mean, int64_t vocab_size) {
    CrossEntropy p = problem(x, weight, targets, ignore_index, mean, vocab_size);
    // Both in fp32: the backward multiplies them by what scales the loss before it rounds them.
    Tensor dx = empty(x, sizes_of(x), ScalarType::Float), dweight = empty(weight, sizes_of(weight), ScalarType::Float);
    CrossEntropyGradients gradients{output(dx), dweight.mutable_data_ptr<float>()};
    float loss = cross_entropy_cpu(p, &gradients);
    std::fill(gradients.dweight_sums + p.V * p.C, gradients.dweight_sums + dweight.numel(), 0.0f);  // padding
    return {scalar(x, loss), dx, dweight};
}

}  // namespace
}  // namespace gptkernels

STABLE_TORCH_LIBRARY_IMPL(gptkernels, CPU, m) {
    m.impl("linear_cross_entropy_forward", TORCH_BOX(&gptkernels::linear_cross_entropy_forward));
    m.impl("linear_cross_entropy_gradients", TORCH_BOX(&gptkernels::linear_cross_entropy_gradients));
}
