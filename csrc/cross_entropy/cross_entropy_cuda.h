#pragma once

#include "common/dtype.h"

namespace gptkernels {

// counts[0] = targets that are not ignore_index, counts[1] = those of them outside [0, V).
void cross_entropy_count_cuda(const int64_t* targets, int64_t N, int64_t V, int64_t ignore_index, int64_t* counts,
                              void* stream);

// Rows of logits, `stride` columns apart (a multiple of 16 bytes), of which the first V count. losses[n] is the row's
// loss, 0 where it is ignored or its target is out of range. With `gradient` the whole row becomes
// scale (softmax - onehot(target)), 0 from V on; scale is 1 / counts[0] with `mean`, else 1.
struct CrossEntropyRows {
    int64_t N, V, stride, ignore_index;
    MutableArray logits;
    const int64_t *targets, *counts;
    float* losses;
    bool mean, gradient;
};
void cross_entropy_rows_cuda(const CrossEntropyRows& p, void* stream);

}  // namespace gptkernels
