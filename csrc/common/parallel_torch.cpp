// torch's threads behind common/parallel.h.
#include <torch/csrc/stable/ops.h>

#include "common/parallel.h"

namespace gptkernels {

int64_t thread_count() { return torch::stable::get_num_threads(); }

void parallel_run(int64_t threads, void (*body)(void* context, int64_t i), void* context) {
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) body(context, i);
    });
}

}  // namespace gptkernels
