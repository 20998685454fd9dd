// Conversions, approximations and matrix products under nvcc (see common/device.cuh).
#pragma once

#include <type_traits>

#include "common/number.cuh"

namespace gptkernels {

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return __uint_as_float((uint32_t)x.bits << 16); }
DEVICE float to_float(fp16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

// Two floats rounded to nearest even and packed, the first in the low half.
template <class T>
DEVICE uint32_t pack2(float low, float high);

template <>
DEVICE uint32_t pack2<bf16>(float low, float high) {
#if __CUDA_ARCH__ >= 800
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
#else
    auto round = [](float x) {
        uint32_t u = __float_as_uint(x);
        return x == x ? (u + 0x7fff + ((u >> 16) & 1)) >> 16 : 0x7fffu;  // NaN as the instruction gives it
    };
    return round(low) | round(high) << 16;
#endif
}

template <>
DEVICE uint32_t pack2<fp16>(float low, float high) {
    uint32_t packed;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#else
    asm("{ .reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h}; }"
        : "=r"(packed)
        : "f"(low), "f"(high));
#endif
    return packed;
}

template <class T>
DEVICE float2 unpack2(uint32_t packed);

template <>
DEVICE float2 unpack2<bf16>(uint32_t packed) {
    return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u)};
}
template <>
DEVICE float2 unpack2<fp16>(uint32_t packed) {
    float2 y;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(y.x), "=f"(y.y)
        : "r"(packed));
    return y;
}

// Sums of both halves, each rounded once.
template <class T>
DEVICE uint32_t add2(uint32_t a, uint32_t b);

template <>
DEVICE uint32_t add2<bf16>(uint32_t a, uint32_t b) {
#if __CUDA_ARCH__ >= 800
    uint32_t sum;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80), "r"(b));  // a 1 + b
    return sum;
#else
    float2 x = unpack2<bf16>(a), y = unpack2<bf16>(b);
    return pack2<bf16>(x.x + y.x, x.y + y.y);
#endif
}
template <>
DEVICE uint32_t add2<fp16>(uint32_t a, uint32_t b) {
    uint32_t sum;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
    return sum;
}

template <class T>
DEVICE T from_float(float x) {
    if constexpr (sizeof(T) == 4) return x;
    else return T{(uint16_t)pack2<T>(x, 0.0f)};
}

// The nearest number of tf32 (10 bits of mantissa, halves away from zero), as a float's bits.
DEVICE uint32_t to_tf32(float x) {
    uint32_t y = 0;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
#else
    __trap();
#endif
    return y;
}

// 2^x, log2 x, 1/x and 1/sqrt(x) within 2 ulp of fp32 (log2: 2^-22 absolutely near 1); denormal numbers count as 0.
DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float rcp_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float rsqrt_approx(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Whether the architecture that is compiled for has products of T; launchers refuse the others, whose kernels are
// empty.
template <class T>
constexpr bool HAS_MMA = ARCH >= 80 || std::is_same_v<T, fp16>;

// acc += a b, a 16x16 (rows), b 16x8 (columns), acc 16x8, over a warp. With g = lane / 4 and t = lane % 4:
//   a[0..3]  the two elements from column 2t on of (row g), (row g + 8), and from 2t + 8 on of (row g), (row g + 8)
//   b0, b1   the two elements of column g from row 2t on, and from 2t + 8 on
//   acc      (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
template <class T>
DEVICE void mma_m16n8k16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

// The same with k = 8. fp16: a[0], a[1] and b as above without the second half. tf32: a[i] is one element, of
// (row g, column t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b0, b1 those of column g in rows t and t + 4.
DEVICE void mma_m16n8k8(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a0), "r"(a1), "r"(b));
}

DEVICE void mma_m16n8k8_tf32(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    __trap();
#endif
}

template <>
DEVICE void mma_m16n8k16<bf16>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    __trap();  // the launcher refuses bfloat16 products there
#endif
}

template <>
DEVICE void mma_m16n8k16<fp16>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    mma_m16n8k8(acc, a[0], a[1], b0);
    mma_m16n8k8(acc, a[2], a[3], b1);
#endif
}

}  // namespace gptkernels
