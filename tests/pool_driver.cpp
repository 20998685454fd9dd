// The pool of results by itself: no byte is given out twice, what is given back joins and is found again, and memory
// that nothing uses goes back to the system. tests/test_native.py compiles and runs it under the compiler's sanitizers.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <thread>
#include <vector>

#include "common/pool.h"

using namespace gptkernels;

namespace {

int failures = 0;

void expect(bool holds, const char* what) {
    if (holds) return;
    std::printf("failed: %s\n", what);
    ++failures;
}

struct Held {
    unsigned char* data;
    size_t bytes;
    unsigned char mark;

    // Its first and last byte, and one in each page, are still its own.
    bool whole() const {
        for (size_t i = 0; i < bytes; i += 4096)
            if (data[i] != mark) return false;
        return data[bytes - 1] == mark;
    }
};

Held take(size_t bytes, unsigned char mark) {
    Held held{static_cast<unsigned char*>(pool_take(bytes)), bytes, mark};
    for (size_t i = 0; i < bytes; i += 4096) held.data[i] = mark;
    held.data[bytes - 1] = mark;
    return held;
}

size_t resident_pages() {
    size_t all = 0, resident = 0;
    std::FILE* file = std::fopen("/proc/self/statm", "r");
    if (file == nullptr || std::fscanf(file, "%zu %zu", &all, &resident) != 2) std::abort();
    std::fclose(file);
    return resident;
}

// Takes and gives in an order that is a function of the seed. Whether nothing was written over.
bool random_order(uint64_t seed, int rounds) {
    std::vector<Held> held;
    bool fine = true;
    for (int i = 0; i < rounds; ++i) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        uint64_t draw = seed >> 33;
        if (held.size() > 12 || (draw % 2 && !held.empty())) {
            Held& out = held[draw / 2 % held.size()];
            fine = fine && out.whole();
            pool_give(out.data);
            out = held.back();
            held.pop_back();
        } else {
            held.push_back(take(1 + draw / 2 % (3 << 20), (unsigned char)(draw / 64)));
            fine = fine && (uintptr_t)held.back().data % 64 == 0;
        }
    }
    for (const Held& out : held) {
        fine = fine && out.whole();
        pool_give(out.data);
    }
    return fine;
}

}  // namespace

int main() {
    constexpr size_t MB = 1 << 20;
    std::set<char*> small;
    for (int i = 0; i < 8; ++i) small.insert(static_cast<char*>(pool_take(MB)));
    for (char* data : small) pool_give(data);
    char* large = static_cast<char*>(pool_take(8 * MB));
    expect(large == *small.begin(), "eight results given back make room for one of their size together");
    pool_give(large);

    std::vector<std::thread> threads;
    bool fine[3];
    for (int t = 0; t < 3; ++t) threads.emplace_back([&, t] { fine[t] = random_order(t + 1, 400); });
    for (std::thread& thread : threads) thread.join();
    expect(fine[0] && fine[1] && fine[2], "no two results in use share a byte");

    Held kept = take(MB, 2);
    char* huge = static_cast<char*>(pool_take(200 * MB));
    pool_give(huge);
    char* lesser = static_cast<char*>(pool_take(150 * MB));
    expect(lesser == huge, "room that is too large is taken rather than new memory");
    pool_give(lesser);
#if !defined(__SANITIZE_THREAD__) && defined(__linux__)
    for (size_t size = 220; size <= 400; size += 60) pool_give(take(size * MB, 1).data);
    expect(resident_pages() * 4096 < 500 * MB, "memory that nothing uses goes back to the system");
#endif
    expect(kept.whole(), "what is in use stays");
    pool_give(kept.data);
    std::printf("%d failures\n", failures);
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
