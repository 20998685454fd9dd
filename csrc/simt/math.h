// Conversions and approximations: the nearest number where the device gives one within its documented error.
#pragma once

#include <bit>
#include <cmath>

#include "common/number.cuh"
#include "simt/engine.h"

// CUDA's names for a float's bits.
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }

namespace gptkernels {
namespace simt {

// As the device does: NaN is 0x7fff whatever it was.
inline uint32_t bf16_bits(float x) {
    uint32_t u = std::bit_cast<uint32_t>(x);
    return x == x ? (u + 0x7fff + ((u >> 16) & 1)) >> 16 : 0x7fff;
}
uint32_t fp16_bits(float x);
float fp16_value(uint32_t bits);

// A denormal number as the device's .ftz instructions read and write it: 0.
inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

}  // namespace simt

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return __uint_as_float((uint32_t)x.bits << 16); }
DEVICE float to_float(fp16 x) { return simt::fp16_value(x.bits); }

template <class T>
DEVICE uint32_t pack2(float low, float high) {
    if constexpr (std::is_same_v<T, bf16>) return simt::bf16_bits(low) | simt::bf16_bits(high) << 16;
    else return simt::fp16_bits(low) | simt::fp16_bits(high) << 16;
}

template <class T>
DEVICE float2 unpack2(uint32_t packed) {
    return {to_float(T{(uint16_t)packed}), to_float(T{(uint16_t)(packed >> 16)})};
}

// The sum of two such numbers is exact in fp32 where its rounding to 16 bits depends on it.
template <class T>
DEVICE uint32_t add2(uint32_t a, uint32_t b) {
    float2 x = unpack2<T>(a), y = unpack2<T>(b);
    return pack2<T>(x.x + y.x, x.y + y.y);
}

template <class T>
DEVICE T from_float(float x) {
    if constexpr (sizeof(T) == 4) return x;
    else return T{(uint16_t)pack2<T>(x, 0.0f)};
}

DEVICE uint32_t to_tf32(float x) {
    uint32_t u = __float_as_uint(x);
    return std::isfinite(x) ? (u + 0x1000) & ~0x1fffu : x == x ? u : 0x7fffffff;
}

DEVICE float exp2_approx(float x) {
    simt::count(simt::Class::APPROXIMATION);
    return simt::flush(std::exp2(simt::flush(x)));
}
DEVICE float log2_approx(float x) {
    simt::count(simt::Class::APPROXIMATION);
    return std::log2(simt::flush(x));
}
DEVICE float rcp_approx(float x) {
    simt::count(simt::Class::APPROXIMATION);
    return simt::flush(1.0f / simt::flush(x));
}
DEVICE float rsqrt_approx(float x) {
    simt::count(simt::Class::APPROXIMATION);
    return (float)(1.0 / std::sqrt((double)simt::flush(x)));
}

}  // namespace gptkernels
