// Memory of the operators' results, kept for the next results.
//
// The system's allocator gives memory of this size back as soon as it is free, and the next result pays for it again: a
// page fault and a zeroed page every 4 KiB, a tenth of a small GPT's training step.
#pragma once

#include <cstddef>

namespace gptkernels {

// Results smaller than this stay with torch's allocator, which keeps such memory itself.
constexpr size_t POOLED_BYTES = 64 << 10;

// At least `bytes` bytes, 64-byte aligned, not initialised; NaN when the environment has GPTKERNELS_POISON, so that
// tests see what a kernel leaves unwritten. Throws std::bad_alloc.
void* pool_take(size_t bytes);

// Give memory of pool_take back, from any thread.
void pool_give(void* data);

}  // namespace gptkernels
