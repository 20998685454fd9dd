// Packing of gemm's factors into the 32-bit units that its inner loop multiplies: a unit is one fp32 number, or two
// bf16 numbers of neighbouring k where the CPU has bf16 dot products. Elsewhere a bf16 product is an fp32 product of
// rounded numbers, which is the same up to the order of its sums.
#pragma once

#include "common/vec.h"

namespace gptkernels {

enum class Product { FP32, ROUNDED, BF16_PAIRS };

template <Product P>
constexpr int PER_UNIT = P == Product::BF16_PAIRS ? 2 : 1;

template <Product P, class T>
inline vu as_units(vf x) {
    // bf16 numbers are rounded already.
    if constexpr (P == Product::ROUNDED && sizeof(T) == 4) return bits_of<vu>(widen(narrow(x)));
    else return bits_of<vu>(x);
}

// W units along k, from memory where k is contiguous; n is how many elements there are (the rest is zero).
template <Product P, class T>
inline vu units_along_k(const T* p, int64_t n) {
    if constexpr (P == Product::BF16_PAIRS) {
#if defined(__AVX512BF16__)
        if constexpr (sizeof(T) == 2) {
            uint32_t mask = n >= 2 * W ? 0xffffffffu : n <= 0 ? 0u : (1u << n) - 1;
            return (vu)_mm512_maskz_loadu_epi16(mask, p);
        } else {
            vf low = load(p, n), high = n > W ? load(p + W, n - W) : vf{};
            return (vu)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
        }
#endif
    } else {
        return as_units<P, T>(n > 0 ? load(p, n) : vf{});
    }
}

// W units along the other dimension, from the rows of k and (for pairs) k + 1; n is how many elements a row has.
template <Product P, class T>
inline vu units_across_k(const T* row, const T* next, int64_t n) {
    if constexpr (P == Product::BF16_PAIRS) {
        vf low = load(row, n), high = next ? load(next, n) : vf{};
        return __builtin_convertvector(narrow(low), vu) | (__builtin_convertvector(narrow(high), vu) << 16);
    } else {
        (void)next;
        return as_units<P, T>(load(row, n));
    }
}

// Columns [0, cols) of B, k elements deep, into panels [panel][unit][NR]; lanes beyond cols and k are zero.
template <Product P, class T, int NR>
void pack_b(const T* b, int64_t ld, bool k_contiguous, int64_t cols, int64_t k, uint32_t* packed) {
    constexpr int S = PER_UNIT<P>;
    int64_t units = (k + S - 1) / S;
    if (!k_contiguous) {
        for (int64_t u = 0; u < units; ++u) {
            const T* row = b + u * S * ld;
            const T* next = u * S + 1 < k ? row + ld : nullptr;
            for (int64_t j = 0; j < cols; j += W) {
                __builtin_prefetch(row + j + AHEAD * ld);
                vu x = units_across_k<P>(row + j, next ? next + j : nullptr, cols - j < W ? cols - j : W);
                memcpy(packed + (j / NR * units + u) * NR + j % NR, &x, sizeof x);
            }
        }
        // An odd number of vectors leaves the last panel's upper half unwritten: nothing reads it (see gemm's tail
        // kernel).
        return;
    }
    for (int64_t j = 0; j < cols; j += W) {
        uint32_t* panel = packed + j / NR * units * NR + j % NR;
        for (int64_t u = 0; u < units; u += W) {
            vu r[W];
            for (int i = 0; i < W; ++i)
                r[i] = j + i < cols ? units_along_k<P>(b + (j + i) * ld + u * S, k - u * S) : vu{};
            for (int i = 0; i < W; ++i) __builtin_prefetch(b + (j + i) * ld + (u + 2 * W) * S);
            transpose(r);
            int64_t count = units - u < W ? units - u : W;
            for (int64_t i = 0; i < count; ++i) memcpy(panel + (u + i) * NR, &r[i], sizeof r[i]);
        }
    }
}

// Rows of A, k elements deep, into panels of MR rows, `panel` units apart. Where k is contiguous: row by row, `stride`
// units apart; else [unit][MR], a row of k after another through all panels, since it is a new page of memory each
// time. `rows` is how many are there: those beyond are zero.
template <Product P, class T, int MR>
void pack_a(const T* a, int64_t ld, bool k_contiguous, int64_t rows, int64_t k, int64_t panels, uint32_t* packed,
            int64_t panel, int64_t stride) {
    constexpr int S = PER_UNIT<P>;
    int64_t units = (k + S - 1) / S;
    if (k_contiguous) {
        for (int64_t i = 0; i < panels * MR; ++i) {
            uint32_t* to = packed + i / MR * panel + i % MR * stride;
            for (int64_t u = 0; u < units; u += W) {
                __builtin_prefetch(a + (i + 1) * ld + u * S);
                vu x = i < rows ? units_along_k<P>(a + i * ld + u * S, k - u * S) : vu{};
                memcpy(to + u, &x, sizeof x);
            }
        }
        return;
    }
    for (int64_t u = 0; u < units; ++u) {
        const T* row = a + u * S * ld;
        const T* next = u * S + 1 < k ? row + ld : nullptr;
        for (int64_t i = 0; i < panels * MR; i += 64 / sizeof(T)) __builtin_prefetch(row + i + AHEAD * ld);
        for (int64_t r = 0; r < panels; ++r)
            for (int64_t i = r * MR; i < (r + 1) * MR; i += W) {
                vu x = i < rows ? units_across_k<P>(row + i, next ? next + i : nullptr, rows - i) : vu{};
                // The last store of a unit runs over into the next one, which is written after it.
                memcpy(packed + r * panel + u * MR + i - r * MR, &x, sizeof x);
            }
    }
}

}  // namespace gptkernels
