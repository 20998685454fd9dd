#include "simt/shadow.h"

#include <algorithm>

namespace gptkernels::simt {
namespace {

// Whether an access at `now` is unordered with the write `w`.
bool races_with_write(Stamp w, Stamp now) {
    if (w.epoch() != now.epoch() || w.thread() == now.thread()) return false;
    return w.warp() != now.warp() || w.warp_epoch() == now.warp_epoch();
}

// Whether a write at `now` is unordered with one of the readers that `r` stands for.
bool races_with_readers(Stamp r, Stamp now) {
    if (r.epoch() != now.epoch()) return false;
    if (r.readers() == Stamp::WARPS || r.warp() != now.warp()) return true;
    return r.warp_epoch() == now.warp_epoch() && (r.readers() != Stamp::ONE || r.thread() != now.thread());
}

// The readers after one more at `now`.
Stamp with_reader(Stamp r, Stamp now) {
    if (r.epoch() != now.epoch()) return now;
    if (r.readers() == Stamp::WARPS) return r;
    if (r.warp() != now.warp()) return {now.bits | Stamp::WARPS};
    bool more = r.warp_epoch() == now.warp_epoch() && (r.readers() != Stamp::ONE || r.thread() != now.thread());
    return {now.bits | (more ? Stamp::LANES_OF_WARP : Stamp::ONE)};
}

}  // namespace

void Shadow::reset(uint32_t bytes) {
    writes.assign((bytes + GRANULE - 1) / GRANULE, Stamp{});
    reads.assign(writes.size(), Stamp{});
}

void Shadow::grow(uint32_t bytes) {
    writes.resize((bytes + GRANULE - 1) / GRANULE);
    reads.resize(writes.size());
}

Hazard Shadow::read(uint32_t address, uint32_t bytes, Stamp now, uint32_t& other) {
    Hazard hazard = Hazard::NONE;
    for (uint32_t g = address / GRANULE; g < (address + bytes + GRANULE - 1) / GRANULE; ++g) {
        Stamp w = writes[g];
        reads[g] = with_reader(reads[g], now);
        if (w.epoch() != now.epoch() && w.bits != 0 && w.epoch() != Stamp::IN_FLIGHT) [[likely]]
            continue;
        other = w.thread();
        if (w.bits == 0) hazard = Hazard::UNINITIALISED;
        else if (w.epoch() == Stamp::IN_FLIGHT) hazard = Hazard::COPY;
        else if (races_with_write(w, now)) hazard = Hazard::RACE;
        if (hazard != Hazard::NONE) return hazard;
    }
    return hazard;
}

Hazard Shadow::write(uint32_t address, uint32_t bytes, Stamp now, uint32_t& other) {
    Hazard hazard = Hazard::NONE;
    for (uint32_t g = address / GRANULE; g < (address + bytes + GRANULE - 1) / GRANULE; ++g) {
        Stamp w = writes[g], r = reads[g];
        if (w.epoch() == Stamp::IN_FLIGHT) hazard = Hazard::COPY, other = w.thread();
        else if (races_with_write(w, now)) hazard = Hazard::RACE, other = w.thread();
        else if (races_with_readers(r, now)) hazard = Hazard::RACE, other = r.thread();
        writes[g] = now;
        reads[g] = Stamp{};
    }
    return hazard;
}

Hazard Shadow::begin_copy(uint32_t address, uint32_t bytes, Stamp now, uint32_t& other) {
    Hazard hazard = write(address, bytes, now, other);
    std::fill_n(writes.begin() + address / GRANULE, bytes / GRANULE, Stamp::make(Stamp::IN_FLIGHT, 0, now.thread()));
    return hazard;
}

void Shadow::end_copy(uint32_t address, uint32_t bytes, Stamp now) {
    std::fill_n(writes.begin() + address / GRANULE, bytes / GRANULE, now);
}

void Shadow::forget_times() {
    for (Stamp& w : writes)
        if (w.bits != 0 && w.epoch() != Stamp::IN_FLIGHT) w = Stamp::make(0, 1, 0);
    std::fill(reads.begin(), reads.end(), Stamp{});
}

}  // namespace gptkernels::simt
