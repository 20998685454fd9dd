// The state of the block that runs, which the parts of the engine share.
#pragma once

#include <vector>

#include "simt/engine.h"
#include "simt/fiber.h"
#include "simt/log.h"
#include "simt/shadow.h"

namespace gptkernels::simt {

struct Copy {
    uint32_t to;
    const void* from;
    int bytes;
    int64_t group;
};

enum class State { RUNNABLE, AT_WARP_FUNCTION, AT_BARRIER, RETURNED };

struct Thread {
    Coordinates coordinates;  // first: `coordinates` points here
    Fiber fiber;
    State state;
    int line;  // where it waits
    WarpFunction function;
    void* operands;
    std::vector<Copy> copies;
    int64_t group;  // of cp.async that is not committed yet
};

struct Warp {
    uint32_t runnable;  // a bit a lane
    int arrived;        // lanes at the warp function
    uint32_t epoch;     // see shadow.h
    WarpLog log;
};

struct StaticArray {
    const void* key;
    uint32_t address;
};

struct Block {
    int threads, warps;
    int at_barrier;
    uint32_t epoch;
    bool aborted;
    std::vector<char> shared;
    uint32_t dynamic_size;
    std::vector<StaticArray> arrays;
    Shadow shadow;
};

extern Thread threads[MAX_THREADS];
extern Warp warps[MAX_THREADS / LANES];
extern Block block;
extern int running;  // index of the running thread
extern KernelReport* kernel_report;
extern int64_t lane_counts[CLASSES];  // of classes that are counted by lane

inline Thread& me() { return threads[running]; }
inline Warp& my_warp() { return warps[running / LANES]; }
inline Stamp now() { return Stamp::make(block.epoch, my_warp().epoch, (uint32_t)running); }

}  // namespace gptkernels::simt
