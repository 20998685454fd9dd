#include "common/pool.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>

#include "common/workspace.h"

namespace gptkernels {
namespace {

constexpr size_t PAGE = 4096;
constexpr size_t HUGE_PAGE = 2 << 20;
// What is asked of the system at once, at least. Pages that no result has touched are not there yet, so the size costs
// nothing; the larger it is, the more of what is given back joins into room for a larger result.
constexpr size_t SLAB = 64 << 20;
// What may be held beyond the most that was ever in use: a round of operators of many shapes finds its memory again.
constexpr size_t SPARE = 32 << 20;

// A piece of a slab: [its key in a map, + bytes).
struct Piece {
    size_t bytes;
    char* slab;
};

using Pieces = std::map<char*, Piece>;

// Never destroyed: tensors may be freed while the process exits.
struct Pool {
    std::mutex mutex;
    std::map<char*, size_t> slabs;  // bytes
    Pieces idle, used;              // by address; neighbours of a slab that are both idle are one
    size_t held_bytes = 0, used_bytes = 0, most_used = 0;
    const bool poison = std::getenv("GPTKERNELS_POISON") != nullptr;
};

Pool& pool() {
    static Pool* instance = new Pool;
    return *instance;
}

size_t rounded(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// The smallest idle piece that is large enough, of those the first: large ones are left for large results.
Pieces::iterator best_fit(Pool& p, size_t bytes) {
    auto best = p.idle.end();
    for (auto it = p.idle.begin(); it != p.idle.end(); ++it)
        if (it->second.bytes >= bytes && (best == p.idle.end() || it->second.bytes < best->second.bytes)) best = it;
    return best;
}

// Give slabs of which nothing is in use to the system until what the pool holds, with the bytes that are about to be
// asked for, is no more than what was once in use and a little: work that has changed its shapes does not add the new
// ones' memory to the old ones'.
void release_idle(Pool& p, size_t bytes) {
    size_t limit = std::max(p.most_used, p.used_bytes + bytes) + SPARE;
    for (auto it = p.idle.begin(); it != p.idle.end() && p.held_bytes + bytes > limit;) {
        auto slab = p.slabs.find(it->second.slab);
        if (it->second.bytes < slab->second) {
            ++it;
            continue;
        }
        p.held_bytes -= slab->second;
        std::free(slab->first);
        p.slabs.erase(slab);
        it = p.idle.erase(it);
    }
}

// A new slab, as one idle piece.
Pieces::iterator add_slab(Pool& p, size_t bytes) {
    size_t size = std::max(SLAB, rounded(bytes, HUGE_PAGE));
    void* data = nullptr;
    if (posix_memalign(&data, HUGE_PAGE, size) != 0) throw std::bad_alloc();
    advise_huge_pages(data, size);
    char* slab = static_cast<char*>(data);
    p.slabs[slab] = size;
    p.held_bytes += size;
    return p.idle.emplace(slab, Piece{size, slab}).first;
}

}  // namespace

void* pool_take(size_t bytes) {
    Pool& p = pool();
    std::lock_guard<std::mutex> lock(p.mutex);
    size_t size = rounded(std::max<size_t>(bytes, 1), PAGE);
    auto it = best_fit(p, size);
    if (it == p.idle.end()) {
        release_idle(p, size);
        it = add_slab(p, size);
    }
    auto [data, piece] = *it;
    p.idle.erase(it);
    if (piece.bytes > size) p.idle.emplace(data + size, Piece{piece.bytes - size, piece.slab});
    p.used.emplace(data, Piece{size, piece.slab});
    p.used_bytes += size;
    p.most_used = std::max(p.most_used, p.used_bytes);
    if (p.poison) std::memset(data, 0xff, bytes);
    return data;
}

void pool_give(void* data) {
    Pool& p = pool();
    std::lock_guard<std::mutex> lock(p.mutex);
    auto used = p.used.extract(static_cast<char*>(data));
    p.used_bytes -= used.mapped().bytes;
    auto it = p.idle.insert(std::move(used)).position, next = std::next(it);
    if (next != p.idle.end() && next->first == it->first + it->second.bytes && next->second.slab == it->second.slab) {
        it->second.bytes += next->second.bytes;
        p.idle.erase(next);
    }
    if (it == p.idle.begin()) return;
    auto before = std::prev(it);
    if (before->first + before->second.bytes == it->first && before->second.slab == it->second.slab) {
        before->second.bytes += it->second.bytes;
        p.idle.erase(it);
    }
}

}  // namespace gptkernels
