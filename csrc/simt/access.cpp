// What a thread does with memory: checks, counts, and copies that land later.
#include <cstring>

#include "simt/state.h"

namespace gptkernels::simt {
namespace {

std::vector<Extent> buffers;

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

void add_buffer(const void* begin, int64_t bytes) {
    if (bytes > 0) buffers.push_back({static_cast<const char*>(begin), static_cast<const char*>(begin) + bytes});
}

void clear_buffers() { buffers.clear(); }

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
