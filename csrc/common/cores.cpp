// How far apart the cores of two threads are: where they share a cache, a number goes from one to the other and back in
// some 50 ns on a Zen 4 CPU, else in 300 and more. A virtual machine's cores may move from one to the other.
#include <atomic>
#include <chrono>

#include "common/parallel.h"

namespace gptkernels {
namespace {

constexpr int ROUNDS = 2000;
constexpr std::chrono::milliseconds LIMIT{20};

struct Exchange {
    alignas(64) std::atomic<int> ball{0};  // odd on its way there, even on its way back
    alignas(64) std::atomic<bool> over{false};
    double seconds = 0;

    // Wait for the ball to have a value; false where the exchange is over before that, or it takes too long.
    bool wait_for(int value, std::chrono::steady_clock::time_point limit) {
        for (int spins = 1; ball.load(std::memory_order_acquire) != value; ++spins)
            if (over.load(std::memory_order_relaxed) || (spins % 1024 == 0 && std::chrono::steady_clock::now() > limit))
                return false;
        return true;
    }

    void play(int64_t side) {
        auto start = std::chrono::steady_clock::now(), limit = start + LIMIT;
        int round = 0;
        if (side == 0) {
            for (; round < ROUNDS; ++round) {
                ball.store(2 * round + 1, std::memory_order_release);
                if (!wait_for(2 * round + 2, limit)) break;
                if (round == 0) start = std::chrono::steady_clock::now();  // the other thread is there
            }
            std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start;
            if (round > 1) seconds = passed.count() / (round - 1);
            over.store(true);
        } else {
            for (; round < ROUNDS && wait_for(2 * round + 1, limit); ++round)
                ball.store(2 * round + 2, std::memory_order_release);
        }
    }
};

}  // namespace
}  // namespace gptkernels

// Seconds from one thread of torch's to a second one and back; 0 where there are no two at the same time.
extern "C" __attribute__((visibility("default"))) double gptkernels_cores_apart() {
    using namespace gptkernels;
    if (thread_count() < 2) return 0;
    Exchange exchange;
    parallel_run(2, [](void* context, int64_t i) { static_cast<Exchange*>(context)->play(i); }, &exchange);
    return exchange.seconds;
}
