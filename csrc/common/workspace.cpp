#include "common/workspace.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace gptkernels {
namespace {

constexpr size_t HUGE_PAGE = 2 << 20;

struct Buffer {
    void* data = nullptr;
    size_t bytes = 0;
    ~Buffer() { std::free(data); }
};

thread_local Buffer buffers[(int)Slot::COUNT];

}  // namespace

void* workspace(Slot slot, size_t bytes) {
    Buffer& buffer = buffers[(int)slot];
    if (buffer.bytes < bytes) {
        std::free(buffer.data);
        buffer = Buffer();
        size_t alignment = bytes >= HUGE_PAGE ? HUGE_PAGE : 64;
        size_t rounded = (bytes + alignment - 1) / alignment * alignment;
        buffer.data = std::aligned_alloc(alignment, rounded);
        if (buffer.data == nullptr) throw std::bad_alloc();
        buffer.bytes = rounded;
        advise_huge_pages(buffer.data, rounded);
    }
    // For tests, as of results (pool.cpp): what a kernel reads before it has written it must show.
    static const bool poison = std::getenv("GPTKERNELS_POISON") != nullptr;
    if (poison && bytes > 0) std::memset(buffer.data, 0xff, bytes);
    return buffer.data;
}

void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
    uintptr_t begin = ((uintptr_t)data + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    uintptr_t end = ((uintptr_t)data + bytes) / HUGE_PAGE * HUGE_PAGE;
    // Advice only: a system without huge pages refuses it, and nothing is lost but speed.
    if (end > begin) (void)madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

}  // namespace gptkernels
