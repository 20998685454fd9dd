// Parallel loops over tasks. The threads are torch's own (csrc/common/parallel_torch.cpp), so that no second pool of
// threads competes with it; a build without torch, for sanitizers, gives its own parallel_run.
#pragma once

#include <atomic>
#include <cstdint>

namespace gptkernels {

int64_t thread_count();

// Run body(context) once on each of `threads` threads at the same time.
void parallel_run(int64_t threads, void (*body)(void* context), void* context);

// f(task) for every task, each thread taking the next one when it is done with its last: a slow core takes fewer.
template <class F>
void parallel_for(int64_t tasks, const F& f) {
    int64_t threads = thread_count() < tasks ? thread_count() : tasks;
    if (threads <= 1) {
        for (int64_t task = 0; task < tasks; ++task) f(task);
        return;
    }
    struct Shared {
        const F& f;
        int64_t tasks;
        std::atomic<int64_t> next;
    } shared{f, tasks, 0};
    parallel_run(
        threads,
        [](void* context) {
            Shared& s = *static_cast<Shared*>(context);
            for (int64_t task; (task = s.next.fetch_add(1)) < s.tasks;) s.f(task);
        },
        &shared);
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
