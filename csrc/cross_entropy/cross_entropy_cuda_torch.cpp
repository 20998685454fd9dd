// The kernels of linear_cross_entropy on CUDA: tensors to pointers. The products around them are torch's
// (gptkernels/ops/cross_entropy/chunks.py).
#include "common/device_torch.h"
#include "cross_entropy/cross_entropy_cuda.h"

namespace gptkernels {
namespace {

const int64_t* integers(const Tensor& x) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Long, "targets and counts must be int64");
    check_contiguous(x);
    return static_cast<const int64_t*>(pointer_of(x));
}

Tensor cross_entropy_count(const Tensor& targets, int64_t ignore_index, int64_t vocab_size) {
    DeviceScope scope(targets);
    Tensor counts = empty(targets, {2}, ScalarType::Long);
    cross_entropy_count_cuda(integers(targets), targets.size(0), vocab_size, ignore_index,
                             static_cast<int64_t*>(pointer_of(counts)), scope.stream);
    return counts;
}

Tensor cross_entropy_rows(Tensor& logits, const Tensor& targets, const Tensor& counts, int64_t ignore_index, bool mean,
                          int64_t vocab_size, bool gradient) {
    DeviceScope scope(logits);
    int64_t N = logits.size(0), stride = logits.size(1);
    STD_TORCH_CHECK(stride * logits.element_size() % 16 == 0 && vocab_size <= stride,
                    "rows of logits must be multiples of 16 bytes that hold vocab_size numbers");
    check_contiguous(logits);
    Tensor losses = empty(logits, {N}, ScalarType::Float);
    cross_entropy_rows_cuda({N, vocab_size, stride, ignore_index, mutable_array(logits), integers(targets),
                             integers(counts), floats(losses), mean, gradient},
                            scope.stream);
    return losses;
}

}  // namespace
}  // namespace gptkernels

GPTKERNELS_KERNELS(m) {
    m.impl("cross_entropy_count", TORCH_BOX(&gptkernels::cross_entropy_count));
    m.impl("cross_entropy_rows", TORCH_BOX(&gptkernels::cross_entropy_rows));
}
