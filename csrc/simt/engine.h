// The emulated processor: blocks one after the other, a block's threads as fibers that wait at barriers and warp
// functions. One launch at a time runs in the process.
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>

#include "simt/report.h"

struct uint3 {
    unsigned x, y, z;
};
struct float2 {
    float x, y;
};

namespace gptkernels {
struct Launch;
struct Device;
}  // namespace gptkernels

namespace gptkernels::simt {

constexpr int MAX_THREADS = 1024;
constexpr int LANES = 32;

// What a kernel's thread reads about itself.
struct Coordinates {
    uint3 thread, block, block_size, grid;
};
extern Coordinates* coordinates;  // of the running thread

// Global memory that kernels may touch. A kernel's pointer belongs to the buffer that begins where it points when the
// launch receives it, else to the one it points into; from then on it may be moved within that buffer only.
struct Extent {
    const char *begin, *end;
};
void add_buffer(const void* begin, int64_t bytes);
void clear_buffers();
// Held while an operator, and so its buffers, lives.
std::recursive_mutex& one_operator();
Extent extent_of(const void* pointer);

// Run kernel() in every thread of the launch. Throws runtime_error with the first violation, if there was one.
void run(const Launch& launch, const std::function<void()>& kernel);

Device& emulated_device();

// Schedule 0 lets a warp run until it waits, in order of its number; every other seed another order of warps and lanes.
void set_schedule(uint64_t seed);

// Record a violation of the running thread; what follows the format is as in printf.
[[gnu::format(printf, 2, 3)]] void violation(Violation kind, const char* format, ...);

// Checks and counts one access; false: it must not be done. The address that they return to tells instructions apart.
[[gnu::noinline]] bool global_access(Class c, const void* p, int bytes, Extent extent);
[[gnu::noinline]] bool shared_access(Class c, uint32_t address, int bytes, uint32_t begin, uint32_t end);
[[gnu::noinline]] void count(Class c);
char* shared_memory();

// The launch's shared memory, and an array of the kernel's own, told apart by the address of `key`.
uint32_t dynamic_shared_size();
uint32_t static_shared(const void* key, uint32_t bytes);

// cp.async: the copy happens in copy_wait, for all but the latest `pending` groups of this thread.
[[gnu::noinline]] void copy_start(uint32_t to, uint32_t begin, uint32_t end, const void* from, int bytes,
                                  Extent extent);
void copy_commit();
void copy_wait(int pending);

void block_barrier(int line);
void warp_barrier(int line);
void check_mask(unsigned mask, int line);

// A function of a whole warp: all lanes bring their operands; the last to come runs it for all, and all go on.
using WarpFunction = void (*)(void* const (&operands)[LANES]);
void warp_collective(Class c, WarpFunction function, void* operands, int line);

// Checks and counts the rows, 16 bytes each, that the first 8 lanes a matrix read; false if one cannot be read.
bool ldmatrix_access(const uint32_t* addresses, const uint32_t* begins, const uint32_t* ends, int matrices);

}  // namespace gptkernels::simt
