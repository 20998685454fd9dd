// Fibers: a thread of the emulated device is a stack of its own, which runs until it has to wait.
#pragma once

#include <cstddef>

namespace gptkernels::simt {

// Where a fiber that is not running goes on: its stack pointer.
struct Fiber {
    void* stack_pointer = nullptr;
    char* stack = nullptr;      // lowest address; null for the fiber that the program started in
    void* sanitizer = nullptr;  // AddressSanitizer's note of the fiber's stack
};

constexpr size_t STACK_BYTES = 256 * 1024;  // address space: only what is touched is memory

// Memory for a fiber's stack, above a page that must not be touched.
void allocate_stack(Fiber& fiber);

// Let switch_to(fiber) call entry(), which must never return.
void prepare(Fiber& fiber, void (*entry)());

// Leave `from`, which can be switched to again, unless it is finished; go on in `to`.
void switch_fiber(Fiber& from, Fiber& to, bool finished = false);

// What the first code that runs in a fiber calls.
void entered(Fiber& fiber);

}  // namespace gptkernels::simt
