// The accesses of a warp's lanes, put together again into warp-instructions in order to count sectors and wavefronts.
#pragma once

#include <cstdint>
#include <vector>

#include "simt/report.h"

namespace gptkernels::simt {

struct Entry {
    uint64_t address;
    uint32_t site;  // of the instruction: lanes whose accesses have one site made them together
    Class c;
    bool shared;
    uint8_t bytes;
};

class WarpLog {
  public:
    void add(int lane, const Entry& entry) { lanes[lane].push_back(entry); }
    bool is_long() const { return lanes[0].size() >= 64; }
    // Count what was logged, and forget it. The k-th access of a lane at a site belongs to the k-th of the others
    // there.
    void settle(KernelReport& kernel);

  private:
    std::vector<Entry> lanes[32];
};

// Counts an access of 16 bytes a lane by the rows of `matrices` 8x8 matrices.
void count_ldmatrix(KernelReport& kernel, const uint32_t* rows, int matrices);

}  // namespace gptkernels::simt
