// Who touched each two bytes of a block's shared memory last, and when.
//
// A stamp is (block epoch, warp epoch, thread): the block epoch counts barriers of the block, the warp epoch __syncwarp
// since then. Two accesses are ordered if they are one thread's, or of different block epochs, or of one warp in
// different warp epochs. Of several readers since the last write a stamp remembers that they were several lanes or
// several warps, which is all that a later writer needs to know.
#pragma once

#include <cstdint>
#include <vector>

namespace gptkernels::simt {

struct Stamp {
    uint32_t bits = 0;  // 12 block epoch, 8 warp epoch, 10 thread, 2 readers

    static constexpr uint32_t LAST_EPOCH = 4094, LAST_WARP_EPOCH = 255, IN_FLIGHT = 4095;
    enum Readers : uint32_t { ONE = 0, LANES_OF_WARP = 1, WARPS = 2 };

    static Stamp make(uint32_t epoch, uint32_t warp_epoch, uint32_t thread, Readers readers = ONE) {
        return {epoch << 20 | warp_epoch << 12 | thread << 2 | readers};
    }
    uint32_t epoch() const { return bits >> 20; }
    uint32_t warp_epoch() const { return bits >> 12 & 255; }
    uint32_t thread() const { return bits >> 2 & 1023; }
    uint32_t warp() const { return thread() / 32; }
    Readers readers() const { return Readers(bits & 3); }
    bool same_warp_and_epoch(Stamp other) const { return epoch() == other.epoch() && warp() == other.warp(); }
};

enum class Hazard { NONE, UNINITIALISED, RACE, COPY };

class Shadow {
  public:
    void reset(uint32_t bytes);
    void grow(uint32_t bytes);

    // Note an access of the thread and time in `now`; the first hazard found, and whom it is with.
    Hazard read(uint32_t address, uint32_t bytes, Stamp now, uint32_t& other);
    Hazard write(uint32_t address, uint32_t bytes, Stamp now, uint32_t& other);

    // A cp.async begins (a write, whose data must not be touched from now on) and ends.
    Hazard begin_copy(uint32_t address, uint32_t bytes, Stamp now, uint32_t& other);
    void end_copy(uint32_t address, uint32_t bytes, Stamp now);

    // Make everything old: before epochs begin at 1 again.
    void forget_times();

  private:
    static constexpr uint32_t GRANULE = 2;
    std::vector<Stamp> writes, reads;  // zero bits: never
};

}  // namespace gptkernels::simt
