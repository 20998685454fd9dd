// Dropout's mask for the CUDA attention kernels: Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011) on absolute places.
//
// Element (row, column), the row counted on the keys' axis, looks at word column % 4 of counter (column / 4, row, h,
// b). A lane's accumulators hold parts of several such quads, so lanes draw a quad each and pass bits on.
#pragma once

#include "common/device.cuh"

// A loop that stays one: Philox is a hundred instructions.
#ifdef __CUDACC__
#define ROLLED _Pragma("unroll 1")
#else
#define ROLLED
#endif

namespace gptkernels {

struct Dropout {
    uint64_t seed;
    uint32_t drop_below, h, b;

    // Bit i is set where word i of the counter keeps its element.
    DEVICE uint32_t quad(uint32_t column_quad, uint32_t row) const {
        uint32_t c0 = column_quad, c1 = row, c2 = h, c3 = b, k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
        UNROLL
        for (int round = 0; round < 10; ++round) {
            uint64_t p0 = (uint64_t)c0 * 0xD2511F53u, p1 = (uint64_t)c2 * 0xCD9E8D57u;
            c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
            c1 = (uint32_t)p1;
            c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
            c3 = (uint32_t)p0;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        return (c0 >= drop_below) | (c1 >= drop_below) << 1 | (c2 >= drop_below) << 2 | (c3 >= drop_below) << 3;
    }

    // For 16 rows of N_TILES x 8 columns from (row, column) on: bit 4 j + e is set where accumulator [j][e] is kept.
    template <int N_TILES>
    DEVICE uint32_t rows_by_columns(int row, int column, int lane) const {
        uint32_t bits = 0;
        bool odd = lane % 2 != 0;
        ROLLED
        for (int j = N_TILES - 1; j >= 0; --j) {
            // Two lanes share a quad of two rows: the even one draws the upper row, the odd one the lower.
            uint32_t mine = quad(column / 4 + 2 * j + lane % 4 / 2, row + lane / 4 + (odd ? 8 : 0));
            uint32_t other = __shfl_xor_sync(FULL_WARP, mine, 1);
            uint32_t upper = odd ? other >> 2 : mine & 3, lower = odd ? mine >> 2 : other & 3;
            bits = bits << 4 | lower << 2 | upper;
        }
        return bits;
    }

    // The same for tiles that lie transposed: 16 columns of N_TILES x 8 rows from (row, column) on.
    template <int N_TILES>
    DEVICE uint32_t columns_by_rows(int row, int column, int lane) const {
        uint32_t bits = 0;
        int place = lane / 4 % 4;
        ROLLED
        for (int j = N_TILES - 1; j >= 0; --j) {
            // Four lanes share two quads of two rows; lane `place` draws for element `place` of all four.
            uint32_t mine = quad(column / 4 + lane / 16 + place / 2 * 2, row + 8 * j + lane % 4 * 2 + place % 2);
            uint32_t four = 0;
            UNROLL
            for (int e = 0; e < 4; ++e) four |= (__shfl_sync(FULL_WARP, mine, (lane & ~12) | e << 2) >> place & 1) << e;
            bits = bits << 4 | four;
        }
        return bits;
    }
};

}  // namespace gptkernels
