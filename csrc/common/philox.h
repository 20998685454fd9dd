// Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"), W counters at a
// time.
#pragma once

#include "common/vec.h"

namespace gptkernels {

typedef uint64_t vul __attribute__((vector_size(W * 8)));

// The four random words of counters (c0, c1, c2, c3) under a 64-bit key, in the counters' place.
inline void philox(uint64_t key, vu& c0, vu& c1, vu& c2, vu& c3) {
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; ++round) {
        vul p0 = __builtin_convertvector(c0, vul) * 0xD2511F53u, p1 = __builtin_convertvector(c2, vul) * 0xCD9E8D57u;
        vu high0 = __builtin_convertvector(p0 >> 32, vu), high1 = __builtin_convertvector(p1 >> 32, vu);
        c0 = high1 ^ c1 ^ k0;
        c1 = __builtin_convertvector(p1, vu);
        c2 = high0 ^ c3 ^ k1;
        c3 = __builtin_convertvector(p0, vu);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

}  // namespace gptkernels
