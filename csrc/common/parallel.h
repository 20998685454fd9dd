// Parallel loops over tasks. The threads are torch's own (csrc/common/parallel_torch.cpp), so that no second pool of
// threads competes with it; a build without torch, for sanitizers, gives its own parallel_run.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace gptkernels {

int64_t thread_count();

// Run body(context, i) for i of 0 to threads - 1: at the same time, each i on the same thread from call to call, if so
// many threads are free; else some one after another.
void parallel_run(int64_t threads, void (*body)(void* context, int64_t i), void* context);

// f(task) for every task. The tasks are dealt out in order, an equal share each: a thread then has the same rows in one
// operator after another. On two Zen 4 cores that share no cache (330 ns from one to the other and back, for 55) a step
// of shakespeare-cpu is 10 % longer than on two that do; 21 % where each takes whatever task is next. A thread that is
// done takes from what the others have left.
template <class F>
void parallel_for(int64_t tasks, const F& f) {
    int64_t threads = thread_count() < tasks ? thread_count() : tasks;
    if (threads <= 1) {
        for (int64_t task = 0; task < tasks; ++task) f(task);
        return;
    }
    struct alignas(64) Share {
        std::atomic<int64_t> next;
        int64_t end;
    };
    std::vector<Share> shares(threads);
    for (int64_t i = 0; i < threads; ++i) {
        shares[i].next.store(i * tasks / threads, std::memory_order_relaxed);
        shares[i].end = (i + 1) * tasks / threads;
    }
    auto take = [&](int64_t i) {
        for (int64_t j = 0; j < threads; ++j) {
            Share& share = shares[(i + j) % threads];
            for (int64_t task; (task = share.next.fetch_add(1)) < share.end;) f(task);
        }
    };
    parallel_run(threads, [](void* context, int64_t i) { (*static_cast<decltype(take)*>(context))(i); }, &take);
}

// f(begin, end) over pieces of [0, count) of at least `grain` each, about four a thread.
template <class F>
void parallel_ranges(int64_t count, int64_t grain, const F& f) {
    int64_t pieces = 4 * thread_count();
    int64_t size = (count + pieces - 1) / pieces;
    if (size < grain) size = grain;
    parallel_for((count + size - 1) / size, [&](int64_t i) {
        int64_t begin = i * size, end = begin + size < count ? begin + size : count;
        f(begin, end);
    });
}

}  // namespace gptkernels
