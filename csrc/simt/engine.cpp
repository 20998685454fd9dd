// Threads as fibers: when each runs, what it waits for, and what becomes of a block whose threads wait in vain.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <stdexcept>

#include "common/device.cuh"
#include "simt/state.h"

namespace gptkernels::simt {
namespace {

constexpr size_t MESSAGES = 20;

Fiber main_fiber;
const std::function<void()>* kernel;
const char* kernel_name;
int64_t violations_now;  // of this launch
std::string first_message;
uint64_t schedule_seed, random_state;

uint32_t random_below(uint32_t n) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((random_state >> 33) % n);
}

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

}  // namespace

Coordinates* coordinates;
Thread threads[MAX_THREADS];
Warp warps[MAX_THREADS / LANES];
Block block;
int running;
KernelReport* kernel_report;
int64_t lane_counts[CLASSES];

Device& emulated_device() {
    static Device the_device{80, 108, 163 * 1024};
    return the_device;
}

void set_schedule(uint64_t seed) { schedule_seed = seed; }

std::recursive_mutex& one_operator() {
    static std::recursive_mutex mutex;
    return mutex;
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

}  // namespace gptkernels::simt
