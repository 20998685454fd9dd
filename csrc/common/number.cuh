// Number types of the kernels, in bits, and vectors of them.
#pragma once

#include <cstdint>

namespace gptkernels {

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

// N elements that are loaded and stored together, in accesses of up to 16 bytes.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Vector {
    T x[N];
    DEVICE T& operator[](int i) { return x[i]; }
    DEVICE const T& operator[](int i) const { return x[i]; }
};

// Elements in 16 bytes.
template <class T>
constexpr int PACKET = 16 / sizeof(T);

}  // namespace gptkernels
