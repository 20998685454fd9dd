#include "common/pool.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>
#include <new>
#include <unordered_map>

#include "common/workspace.h"

namespace gptkernels {
namespace {

constexpr size_t HUGE_PAGE = 2 << 20;
// What may be idle beyond the most that was ever in use: a round of operators of many shapes, each freed before the next,
// finds its blocks again.
constexpr size_t SPARE = 32 << 20;

struct Block {
    void* data;
    size_t bytes;
};

// Never destroyed: tensors may be freed while the process exits.
struct Pool {
    std::mutex mutex;
    std::list<Block> idle;                     // the longest unused first
    size_t idle_bytes = 0, used_bytes = 0, most_used = 0;
    std::unordered_map<void*, size_t> in_use;  // sizes
    const bool poison = std::getenv("GPTKERNELS_POISON") != nullptr;
};

Pool& pool() {
    static Pool* instance = new Pool;
    return *instance;
}

// The last given back of the idle blocks that are large enough and at most a quarter too large: it is the likeliest to
// be in a cache still.
bool take_idle(Pool& p, size_t bytes, Block& found) {
    for (auto it = p.idle.rbegin(); it != p.idle.rend(); ++it)
        if (it->bytes >= bytes && it->bytes - bytes <= bytes / 4) {
            found = *it;
            p.idle_bytes -= found.bytes;
            p.idle.erase(std::next(it).base());
            return true;
        }
    return false;
}

// Give idle memory to the system until what the pool holds, with the bytes that are about to be asked for, is no more
// than what was once in use and a little: work that has changed its shapes does not add the new ones' memory to the old
// ones', and work that repeats its shapes finds them.
void release_idle(Pool& p, size_t bytes) {
    size_t limit = std::max(p.most_used, p.used_bytes + bytes) + SPARE;
    for (; p.used_bytes + p.idle_bytes + bytes > limit && !p.idle.empty(); p.idle.pop_front()) {
        p.idle_bytes -= p.idle.front().bytes;
        std::free(p.idle.front().data);
    }
}

Block allocate(size_t bytes) {
    size_t alignment = bytes >= HUGE_PAGE ? HUGE_PAGE : 4096;
    size_t rounded = (bytes + 4095) / 4096 * 4096;
    void* data = nullptr;
    if (posix_memalign(&data, alignment, rounded) != 0) throw std::bad_alloc();
    advise_huge_pages(data, rounded);
    return {data, rounded};
}

}  // namespace

void* pool_take(size_t bytes) {
    Pool& p = pool();
    std::lock_guard<std::mutex> lock(p.mutex);
    Block block;
    if (!take_idle(p, bytes, block)) {
        release_idle(p, bytes);
        block = allocate(bytes);
    }
    p.in_use[block.data] = block.bytes;
    p.used_bytes += block.bytes;
    p.most_used = std::max(p.most_used, p.used_bytes);
    if (p.poison) std::memset(block.data, 0xff, bytes);
    return block.data;
}

void pool_give(void* data) {
    Pool& p = pool();
    std::lock_guard<std::mutex> lock(p.mutex);
    auto it = p.in_use.find(data);
    p.idle.push_back({data, it->second});
    p.idle_bytes += it->second;
    p.used_bytes -= it->second;
    p.in_use.erase(it);
}

}  // namespace gptkernels
