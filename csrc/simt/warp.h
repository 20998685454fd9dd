// Barriers and the functions of a whole warp. Each knows the line that it is called from: lanes or threads that wait in
// different places together are a violation.
#pragma once

#include "common/number.cuh"
#include "simt/engine.h"

// Block-wide and warp-wide barriers, shuffles and votes under CUDA's names; every mask must be all lanes.
inline void __syncthreads(int line = __builtin_LINE()) { gptkernels::simt::block_barrier(line); }
inline void __syncwarp(unsigned mask = gptkernels::FULL_WARP, int line = __builtin_LINE()) {
    gptkernels::simt::check_mask(mask, line);
    gptkernels::simt::warp_barrier(line);
}

namespace gptkernels::simt {

uint32_t shuffle(uint32_t value, int source, unsigned mask, int line);
uint32_t ballot(bool vote, unsigned mask, int line);
inline int lane() { return (int)(coordinates->thread.x % LANES); }

template <class T>
T shuffle_as(T x, int source, unsigned mask, int line) {
    static_assert(sizeof(T) == 4, "shuffles move 32 bits");
    return std::bit_cast<T>(shuffle(std::bit_cast<uint32_t>(x), source, mask, line));
}

}  // namespace gptkernels::simt

template <class T>
T __shfl_sync(unsigned mask, T x, int source, int line = __builtin_LINE()) {
    return gptkernels::simt::shuffle_as(x, source % 32, mask, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int difference, int line = __builtin_LINE()) {
    return gptkernels::simt::shuffle_as(x, gptkernels::simt::lane() ^ difference, mask, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, int distance, int line = __builtin_LINE()) {
    int source = gptkernels::simt::lane() + distance;
    return gptkernels::simt::shuffle_as(x, source < 32 ? source : gptkernels::simt::lane(), mask, line);
}
inline unsigned __ballot_sync(unsigned mask, bool vote, int line = __builtin_LINE()) {
    return gptkernels::simt::ballot(vote, mask, line);
}
inline bool __any_sync(unsigned mask, bool vote, int line = __builtin_LINE()) {
    return __ballot_sync(mask, vote, line) != 0;
}
inline bool __all_sync(unsigned mask, bool vote, int line = __builtin_LINE()) {
    return __ballot_sync(mask, vote, line) == gptkernels::FULL_WARP;
}

namespace gptkernels {
namespace simt {

// Product of a 16 x K matrix a and a K x 8 matrix b of fragments in registers, added to acc; formed in fp64 and rounded
// once. (The device's own rounding between is not documented.)
enum class Product { BF16_K16, FP16_K16, FP16_K8, TF32_K8 };
void mma(Product product, float* acc, const uint32_t* a, uint32_t b0, uint32_t b1, int line);

void ldmatrix(uint32_t* registers, int matrices, bool transposed, uint32_t address, uint32_t begin, uint32_t end,
              int line);

}  // namespace simt

template <class T>
constexpr bool HAS_MMA = true;

template <class T>
DEVICE void mma_m16n8k16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                         int line = __builtin_LINE()) {
    constexpr auto PRODUCT = std::is_same_v<T, bf16> ? simt::Product::BF16_K16 : simt::Product::FP16_K16;
    simt::mma(PRODUCT, acc, a, b0, b1, line);
}
DEVICE void mma_m16n8k8(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t b, int line = __builtin_LINE()) {
    uint32_t a[2] = {a0, a1};
    simt::mma(simt::Product::FP16_K8, acc, a, b, 0, line);
}
DEVICE void mma_m16n8k8_tf32(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                             int line = __builtin_LINE()) {
    simt::mma(simt::Product::TF32_K8, acc, a, b0, b1, line);
}

#define GPTKERNELS_LDMATRIX(count, suffix, transposed, registers, first)                                        \
    template <class T>                                                                                          \
    DEVICE void ldmatrix_x##count##suffix(uint32_t(&r) registers, Shared<T> row, int line = __builtin_LINE()) { \
        simt::ldmatrix(first, count, transposed, row.address, row.begin, row.end, line);                        \
    }
GPTKERNELS_LDMATRIX(1, , false, , &r)
GPTKERNELS_LDMATRIX(2, , false, [2], r)
GPTKERNELS_LDMATRIX(4, , false, [4], r)
GPTKERNELS_LDMATRIX(1, _trans, true, , &r)
GPTKERNELS_LDMATRIX(2, _trans, true, [2], r)
GPTKERNELS_LDMATRIX(4, _trans, true, [4], r)
#undef GPTKERNELS_LDMATRIX

}  // namespace gptkernels
