// What was seen while kernels ran: violations of the execution model, and counters.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace gptkernels::simt {

enum class Violation {
    OUT_OF_BOUNDS_GLOBAL,
    OUT_OF_BOUNDS_SHARED,
    MISALIGNED,
    UNINITIALISED_SHARED,
    SHARED_RACE,
    COPY_IN_FLIGHT,
    DIVERGENT_BARRIER,
    DIVERGENT_WARP,
};
constexpr int VIOLATIONS = 8;
const char* name_of(Violation kind);

// Warp-instructions of one class. Bytes are those that lanes asked for. Sectors are the distinct 32-byte pieces of
// global memory that an instruction touches, ideally its distinct bytes / 32. Wavefronts are the passes through the 32
// banks of shared memory, ideally one for each 128 bytes; their excess are bank conflicts.
struct Counter {
    int64_t instructions = 0, bytes = 0, sectors = 0, ideal_sectors = 0, wavefronts = 0, ideal_wavefronts = 0;
};

enum class Class {
    LOAD_GLOBAL,
    STORE_GLOBAL,
    LOAD_SHARED,
    STORE_SHARED,
    CP_ASYNC,
    LDMATRIX,
    MMA,
    SHUFFLE,
    BARRIER,
    ATOMIC,
    APPROXIMATION,
};
constexpr int CLASSES = 11;
const char* name_of(Class c);

struct KernelReport {
    int64_t launches = 0, blocks = 0, warps = 0;
    int shared_bytes = 0;  // of a block: the launch's and the kernel's own
    Counter counters[CLASSES];
};

struct Report {
    std::map<std::string, KernelReport> kernels;
    int64_t violations[VIOLATIONS] = {};
    std::vector<std::string> messages;  // the first ones
};

Report& report();

}  // namespace gptkernels::simt
