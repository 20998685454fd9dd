// Vectors as wide as the instruction set that this translation unit is compiled for, by the compiler's vector
// extensions: one source for AVX-512, AVX2 and everything else. Only the bf16 dot product and conversion use
// intrinsics.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace gptkernels {

#if defined(__AVX512F__)
constexpr int W = 16;  // floats in a vector
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;  // SSE2, NEON
#endif

// Rows of a matrix that are asked for before they are copied: often each is on a page of its own, which the CPU does
// not foresee.
constexpr int64_t AHEAD = 8;

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

struct bf16 {
    uint16_t bits;
};

template <class To, class From>
inline To bits_of(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}

inline vf all(float x) { return x - vf{}; }
inline vf vmax(vf a, vf b) { return a > b ? a : b; }
inline vf vmin(vf a, vf b) { return a < b ? a : b; }

inline vf widen(vh x) { return bits_of<vf>(__builtin_convertvector(x, vu) << 16); }

// Round to nearest even. A NaN must not be rounded: its bits could overflow into infinity.
inline vh narrow(vf x) {
#if defined(__AVX512BF16__)
    return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
    vu u = bits_of<vu>(x);
    vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    vu quiet = (u >> 16) | 0x40;
    return __builtin_convertvector((vu)(x == x ? rounded : quiet), vh);
#endif
}

inline float widen(bf16 x) { return bits_of<float>((uint32_t)x.bits << 16); }
inline bf16 narrow(float x) {
    uint32_t u = bits_of<uint32_t>(x);
    if (x != x) return {(uint16_t)((u >> 16) | 0x40)};
    return {(uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return widen(x); }

// Loads and stores of a whole vector, at any alignment.
inline vf load(const float* p) {
    vf x;
    memcpy(&x, p, sizeof x);
    return x;
}
inline vf load(const bf16* p) {
    vh x;
    memcpy(&x, p, sizeof x);
    return widen(x);
}
inline void store(float* p, vf x) { memcpy(p, &x, sizeof x); }
inline void store(bf16* p, vf x) {
    vh h = narrow(x);
    memcpy(p, &h, sizeof h);
}

// A store past the caches, for results larger than they are: the line is not read first. p must be a multiple of the
// vector's size; before another thread may read, stream_done().
inline void stream(float* p, vf x) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX2__)
    _mm256_stream_ps(p, (__m256)x);
#else
    store(p, x);
#endif
}
inline void stream_done() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

inline vi lanes() {
    vi lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    return lane;
}

// All bits set in the first n lanes.
inline vi first_lanes(int64_t n) { return lanes() < (int)n; }

// Of the first n (0 to W) elements only; the other lanes of a load are zero.
template <class T>
inline vf load(const T* p, int64_t n) {
    if (n >= W) return load(p);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    if (n <= 0) return vf{};
    uint16_t mask = (uint16_t)((1u << n) - 1);
    if constexpr (sizeof(T) == 4) return (vf)_mm512_maskz_loadu_ps(mask, p);
    else return widen((vh)_mm256_maskz_loadu_epi16(mask, p));
#else
#if defined(__AVX2__)
    if constexpr (sizeof(T) == 4) return (vf)_mm256_maskload_ps(p, (__m256i)first_lanes(n));
#endif
    T buffer[W] = {};
    for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
    return load(buffer);
#endif
}
template <class T>
inline void store(T* p, vf x, int64_t n) {
    if (n >= W) return store(p, x);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    if (n <= 0) return;
    uint16_t mask = (uint16_t)((1u << n) - 1);
    if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, mask, (__m512)x);
    else _mm256_mask_storeu_epi16(p, mask, (__m256i)narrow(x));
#else
#if defined(__AVX2__)
    if constexpr (sizeof(T) == 4) return (void)_mm256_maskstore_ps(p, (__m256i)first_lanes(n), (__m256)x);
#endif
    T buffer[W];
    store(buffer, x);
    for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
#endif
}

// Sum and maximum over the lanes, in a fixed order.
inline float sum(vf x) {
    float lanes[W];
    store(lanes, x);
    for (int width = W / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}
inline float max(vf x) {
    float lanes[W], largest;
    store(lanes, x);
    largest = lanes[0];
    for (int i = 1; i < W; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
    return largest;
}

// A W x W transpose of 32-bit lanes in log2(W) rounds: round s swaps the lanes that differ in bit s between rows that
// do.
inline void transpose(vu (&r)[W]) {
    vu lane;
    for (int j = 0; j < W; ++j) lane[j] = (uint32_t)j;
#pragma GCC unroll 4
    for (uint32_t s = 1; s < W; s *= 2) {
        vu low = (vu)((lane & s) == 0 ? lane : lane - s + W);
        vu high = (vu)((lane & s) == 0 ? lane + s : lane + W);
#pragma GCC unroll 16
        for (uint32_t i = 0; i < W; ++i) {
            if (i & s) continue;
            vu a = r[i], b = r[i + s];
            r[i] = __builtin_shuffle(a, b, low);
            r[i + s] = __builtin_shuffle(a, b, high);
        }
    }
}

}  // namespace gptkernels
