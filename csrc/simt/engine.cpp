#include "simt/engine.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "common/device.cuh"
#include "simt/fiber.h"
#include "simt/log.h"
#include "simt/shadow.h"

namespace gptkernels::simt {
namespace {

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

constexpr size_t MESSAGES = 20;

Thread threads[MAX_THREADS];
Warp warps[MAX_THREADS / LANES];
Block block;
Fiber main_fiber;
int running;  // index of the running thread
const std::function<void()>* kernel;
const char* kernel_name;
KernelReport* kernel_report;
int64_t violations_now;  // of this launch
std::string first_message;
int64_t lane_counts[CLASSES];  // of classes that are counted by lane
std::vector<Extent> buffers;
uint64_t schedule_seed, random_state;

uint32_t random_below(uint32_t n) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((random_state >> 33) % n);
}

Thread& me() { return threads[running]; }
Warp& my_warp() { return warps[running / LANES]; }
Stamp now() { return Stamp::make(block.epoch, my_warp().epoch, (uint32_t)running); }

// A lane of the current warp if one can run, else of the next warp that has one; -1 if none has.
int next_thread() {
    int warp = running / LANES;
    if (schedule_seed && random_below(8) == 0) warp = (int)random_below((uint32_t)block.warps);
    for (int i = 0; i < block.warps; ++i, warp = (warp + 1) % block.warps) {
        uint32_t runnable = warps[warp].runnable;
        if (!runnable) continue;
        if (schedule_seed)
            for (int skip = (int)random_below((uint32_t)__builtin_popcount(runnable)); skip > 0; --skip)
                runnable &= runnable - 1;
        return warp * LANES + __builtin_ctz(runnable);
    }
    return -1;
}

// Let another thread run; the launch itself, if none can.
void yield(bool finished = false) {
    Fiber& from = me().fiber;
    int next = block.aborted ? -1 : next_thread();
    if (next == running && !finished) return;
    if (next >= 0) {
        running = next;
        coordinates = &threads[next].coordinates;
    }
    switch_fiber(from, next >= 0 ? threads[next].fiber : main_fiber, finished);
}

void wait_as(State state, int line) {
    me().state = state;
    me().line = line;
    my_warp().runnable &= ~(1u << running % LANES);
}

void thread_main() {
    entered(me().fiber);
    (*kernel)();
    wait_as(State::RETURNED, 0);
    yield(true);
}

void abort_block() {
    block.aborted = true;
    yield();
}

void start_block(const Launch& l, uint3 index) {
    block.threads = l.threads;
    block.warps = l.threads / LANES;
    block.at_barrier = 0;
    block.epoch = 1;
    block.aborted = false;
    block.dynamic_size = (uint32_t)l.shared_bytes;
    block.arrays.clear();
    block.shared.assign((size_t)(l.shared_bytes + 127) / 128 * 128, (char)0xff);
    block.shadow.reset((uint32_t)block.shared.size());
    for (int t = 0; t < block.threads; ++t) {
        Thread& thread = threads[t];
        thread.coordinates = {{(unsigned)t, 0, 0}, index, {(unsigned)l.threads, 1, 1}, {l.grid.x, l.grid.y, l.grid.z}};
        thread.state = State::RUNNABLE;
        thread.copies.clear();
        thread.group = 0;
        if (!thread.fiber.stack) allocate_stack(thread.fiber);
        prepare(thread.fiber, thread_main);
    }
    for (int w = 0; w < block.warps; ++w) {
        warps[w].runnable = FULL_WARP;
        warps[w].arrived = 0;
        warps[w].epoch = 0;
    }
}

// Threads are left that wait for what does not come.
void report_deadlock() {
    const Thread* at_barrier = nullptr;
    const Thread* other = nullptr;
    for (int t = 0; t < block.threads; ++t) {
        if (threads[t].state == State::AT_BARRIER) at_barrier = &threads[t];
        else if (threads[t].state == State::AT_WARP_FUNCTION || !other) other = &threads[t];
    }
    if (at_barrier) {
        running = (int)(at_barrier - threads);
        const char* elsewhere = other->state == State::RETURNED ? "has returned" : "waits at a warp function";
        violation(Violation::DIVERGENT_BARRIER, "%d of %d threads wait at the barrier in line %d, thread %d %s",
                  block.at_barrier, block.threads, at_barrier->line, (int)(other - threads), elsewhere);
    } else {
        running = (int)(other - threads);
        violation(Violation::DIVERGENT_WARP, "%d of 32 lanes wait at the warp function in line %d, the others returned",
                  my_warp().arrived, other->line);
    }
}

void run_block(const Launch& l, uint3 index) {
    start_block(l, index);
    running = schedule_seed ? (int)random_below((uint32_t)block.threads) : 0;
    coordinates = &threads[running].coordinates;
    switch_fiber(main_fiber, threads[running].fiber);
    bool all_returned = true;
    for (int t = 0; t < block.threads; ++t) all_returned &= threads[t].state == State::RETURNED;
    if (!all_returned && !block.aborted) {
        block.aborted = true;
        report_deadlock();
    }
    for (int w = 0; w < block.warps; ++w) warps[w].log.settle(*kernel_report);
    ++kernel_report->blocks;
    kernel_report->warps += block.warps;
    kernel_report->shared_bytes = std::max(kernel_report->shared_bytes, (int)block.shared.size());
}

void check_launch(const Launch& l) {
    std::string text = std::string("gptkernels simt: ") + l.name + ": ";
    if (l.threads < LANES || l.threads > MAX_THREADS || l.threads % LANES != 0)
        throw std::runtime_error(text + "threads must be a multiple of 32 up to 1024, got " +
                                 std::to_string(l.threads));
    if (l.shared_bytes > emulated_device().shared_bytes)
        throw std::runtime_error(text + "a block may use " + std::to_string(emulated_device().shared_bytes) +
                                 " bytes of shared memory, got " + std::to_string(l.shared_bytes));
    if (l.grid.x == 0 || l.grid.y == 0 || l.grid.z == 0 || l.grid.y > 65535 || l.grid.z > 65535)
        throw std::runtime_error(text + "a grid must be from 1 to 2^31 - 1, 65535 and 65535 blocks");
}

void report_hazard(Hazard hazard, const char* what, uint32_t address, int bytes, uint32_t other) {
    Violation kind = hazard == Hazard::UNINITIALISED ? Violation::UNINITIALISED_SHARED
                     : hazard == Hazard::RACE        ? Violation::SHARED_RACE
                                                     : Violation::COPY_IN_FLIGHT;
    if (hazard == Hazard::UNINITIALISED) violation(kind, "%s of %d bytes at %u", what, bytes, address);
    else violation(kind, "%s of %d bytes at %u, used by thread %u without a barrier", what, bytes, address, other);
}

uint32_t site_of(const void* return_address) { return (uint32_t)reinterpret_cast<uintptr_t>(return_address); }

// Bounds and alignment of a shared access.
bool shared_fits(const char* what, uint32_t address, int bytes, uint32_t begin, uint32_t end) {
    if (address < begin || address + (uint32_t)bytes > end || address + (uint32_t)bytes < address) {
        violation(Violation::OUT_OF_BOUNDS_SHARED, "%s of %d bytes at %d of an array of %d bytes", what, bytes,
                  (int)(address - begin), (int)(end - begin));
        return false;
    }
    if (address % (uint32_t)bytes != 0) {
        violation(Violation::MISALIGNED, "%s of %d bytes at shared address %u", what, bytes, address);
        return false;
    }
    return true;
}

}  // namespace

Coordinates* coordinates;

Device& emulated_device() {
    static Device the_device{80, 108, 163 * 1024};
    return the_device;
}

void set_schedule(uint64_t seed) { schedule_seed = seed; }

void add_buffer(const void* begin, int64_t bytes) {
    if (bytes > 0) buffers.push_back({static_cast<const char*>(begin), static_cast<const char*>(begin) + bytes});
}

void clear_buffers() { buffers.clear(); }

std::recursive_mutex& one_operator() {
    static std::recursive_mutex mutex;
    return mutex;
}

Extent extent_of(const void* pointer) {
    const char* p = static_cast<const char*>(pointer);
    Extent best{p, p};
    bool begins = false;
    for (const Extent& b : buffers) {
        bool here = b.begin == p, inside = b.begin <= p && p < b.end;
        if ((here && (!begins || b.end > best.end)) || (inside && !begins)) best = b;
        begins |= here;
    }
    return best;
}

void run(const Launch& l, const std::function<void()>& body) {
    std::lock_guard lock(one_operator());
    check_launch(l);
    kernel = &body;
    kernel_name = l.name;
    kernel_report = &report().kernels[l.name];
    violations_now = 0;
    random_state = schedule_seed;
    std::fill_n(lane_counts, CLASSES, 0);
    for (unsigned z = 0; z < l.grid.z; ++z)
        for (unsigned y = 0; y < l.grid.y; ++y)
            for (unsigned x = 0; x < l.grid.x && violations_now == 0; ++x) run_block(l, {x, y, z});
    ++kernel_report->launches;
    for (int c = 0; c < CLASSES; ++c) kernel_report->counters[c].instructions += (lane_counts[c] + LANES - 1) / LANES;
    if (violations_now)
        throw std::runtime_error("gptkernels simt: " + first_message +
                                 (violations_now > 1 ? " (and " + std::to_string(violations_now - 1) + " more)" : ""));
}

void violation(Violation kind, const char* format, ...) {
    char text[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    const uint3& b = me().coordinates.block;
    std::string message = std::string(kernel_name) + ", block " + std::to_string(b.x) + " " + std::to_string(b.y) +
                          " " + std::to_string(b.z) + ", thread " + std::to_string(running) + ": " + name_of(kind) +
                          ": " + text;
    if (violations_now++ == 0) first_message = message;
    Report& r = report();
    ++r.violations[(int)kind];
    if (r.messages.size() < MESSAGES) r.messages.push_back(message);
}

bool global_access(Class c, const void* p, int bytes, Extent extent) {
    const char* q = static_cast<const char*>(p);
    if (q < extent.begin || q + bytes > extent.end) {
        violation(Violation::OUT_OF_BOUNDS_GLOBAL, "%s of %d bytes at %lld of a buffer of %lld bytes", name_of(c),
                  bytes, (long long)(q - extent.begin), (long long)(extent.end - extent.begin));
        return false;
    }
    if (reinterpret_cast<uintptr_t>(p) % (uintptr_t)bytes != 0) {
        violation(Violation::MISALIGNED, "%s of %d bytes at %p", name_of(c), bytes, p);
        return false;
    }
    my_warp().log.add(running % LANES,
                      {reinterpret_cast<uintptr_t>(p), site_of(__builtin_return_address(0)), c, false, (uint8_t)bytes});
    return true;
}

bool shared_access(Class c, uint32_t address, int bytes, uint32_t begin, uint32_t end) {
    if (!shared_fits(name_of(c), address, bytes, begin, end)) return false;
    uint32_t other = 0;
    Hazard hazard = c == Class::LOAD_SHARED ? block.shadow.read(address, (uint32_t)bytes, now(), other)
                                            : block.shadow.write(address, (uint32_t)bytes, now(), other);
    if (hazard != Hazard::NONE) report_hazard(hazard, name_of(c), address, bytes, other);
    my_warp().log.add(running % LANES, {address, site_of(__builtin_return_address(0)), c, true, (uint8_t)bytes});
    return true;
}

void count(Class c) { ++lane_counts[(int)c]; }

char* shared_memory() { return block.shared.data(); }
uint32_t dynamic_shared_size() { return block.dynamic_size; }

uint32_t static_shared(const void* key, uint32_t bytes) {
    for (const StaticArray& array : block.arrays)
        if (array.key == key) return array.address;
    uint32_t address = (uint32_t)(block.shared.size() + 15) / 16 * 16;
    block.shared.resize(address + bytes, (char)0xff);
    block.shadow.grow(address + bytes);
    block.arrays.push_back({key, address});
    return address;
}

void copy_start(uint32_t to, uint32_t begin, uint32_t end, const void* from, int bytes, Extent extent) {
    constexpr int SIZE = 16;
    if (!shared_fits("cp.async", to, SIZE, begin, end)) return;
    const char* q = static_cast<const char*>(from);
    if (bytes > 0 && (q < extent.begin || q + bytes > extent.end)) {
        violation(Violation::OUT_OF_BOUNDS_GLOBAL, "cp.async of %d bytes at %lld of a buffer of %lld bytes", bytes,
                  (long long)(q - extent.begin), (long long)(extent.end - extent.begin));
        return;
    }
    if (reinterpret_cast<uintptr_t>(from) % SIZE != 0)
        return violation(Violation::MISALIGNED, "cp.async from %p", from);
    uint32_t other = 0;
    Hazard hazard = block.shadow.begin_copy(to, SIZE, now(), other);
    if (hazard != Hazard::NONE) report_hazard(hazard, "cp.async", to, SIZE, other);
    memset(shared_memory() + to, 0xff, SIZE);
    me().copies.push_back({to, from, bytes, me().group});
    uint32_t site = site_of(__builtin_return_address(0));
    my_warp().log.add(running % LANES, {to, site, Class::CP_ASYNC, true, SIZE});
    if (bytes > 0)
        my_warp().log.add(running % LANES,
                          {reinterpret_cast<uintptr_t>(from), site, Class::CP_ASYNC, false, (uint8_t)bytes});
}

void copy_commit() { ++me().group; }

void copy_wait(int pending) {
    size_t landed = 0;
    for (const Copy& copy : me().copies) {
        if (copy.group >= me().group - pending) break;
        char* to = shared_memory() + copy.to;
        memcpy(to, copy.from, (size_t)copy.bytes);
        memset(to + copy.bytes, 0, (size_t)(16 - copy.bytes));
        block.shadow.end_copy(copy.to, 16, now());
        ++landed;
    }
    me().copies.erase(me().copies.begin(), me().copies.begin() + (std::ptrdiff_t)landed);
}

void block_barrier(int line) {
    count(Class::BARRIER);
    wait_as(State::AT_BARRIER, line);
    if (++block.at_barrier < block.threads) return yield();
    for (int t = 0; t < block.threads; ++t)
        if (threads[t].line != line) {
            violation(Violation::DIVERGENT_BARRIER, "thread %d waits at the barrier in line %d, this one in line %d", t,
                      threads[t].line, line);
            return abort_block();
        }
    block.at_barrier = 0;
    if (++block.epoch > Stamp::LAST_EPOCH) {
        block.shadow.forget_times();
        block.epoch = 1;
    }
    for (int t = 0; t < block.threads; ++t) threads[t].state = State::RUNNABLE;
    for (int w = 0; w < block.warps; ++w) {
        warps[w].runnable = FULL_WARP;
        warps[w].epoch = 0;
        warps[w].log.settle(*kernel_report);
    }
}

void warp_barrier(int line) {
    warp_collective(
        Class::BARRIER,
        [](void* const(&)[LANES]) {
            // The count starts again with a new epoch of the block, which orders more than __syncwarp does.
            if (++my_warp().epoch <= Stamp::LAST_WARP_EPOCH) return;
            block.shadow.forget_times();
            for (int w = 0; w < block.warps; ++w) warps[w].epoch = 0;
        },
        nullptr, line);
}

void warp_collective(Class c, WarpFunction function, void* operands, int line) {
    Warp& warp = my_warp();
    int first = running / LANES * LANES;
    me().function = function;
    me().operands = operands;
    wait_as(State::AT_WARP_FUNCTION, line);
    if (++warp.arrived < LANES) return yield();
    void* of_lane[LANES];
    for (int lane = 0; lane < LANES; ++lane) {
        Thread& thread = threads[first + lane];
        if (thread.function != function || thread.line != line) {
            violation(Violation::DIVERGENT_WARP, "lane %d waits at line %d, this one at line %d", lane, thread.line,
                      line);
            return abort_block();
        }
        of_lane[lane] = thread.operands;
        thread.state = State::RUNNABLE;
    }
    warp.arrived = 0;
    warp.runnable = FULL_WARP;
    if (c != Class::LDMATRIX) ++kernel_report->counters[(int)c].instructions;
    function(of_lane);
    if (warp.log.is_long()) warp.log.settle(*kernel_report);
}

bool ldmatrix_access(const uint32_t* addresses, const uint32_t* begins, const uint32_t* ends, int matrices) {
    int last = running;
    bool fit = true;
    for (int lane = 0; lane < 8 * matrices; ++lane) {
        running = last / LANES * LANES + lane;  // the lane whose row it is reads it
        if (!shared_fits("ldmatrix", addresses[lane], 16, begins[lane], ends[lane])) {
            fit = false;
            continue;
        }
        uint32_t other = 0;
        Hazard hazard = block.shadow.read(addresses[lane], 16, now(), other);
        if (hazard != Hazard::NONE) report_hazard(hazard, "ldmatrix", addresses[lane], 16, other);
    }
    running = last;
    count_ldmatrix(*kernel_report, addresses, matrices);
    return fit;
}

}  // namespace gptkernels::simt
