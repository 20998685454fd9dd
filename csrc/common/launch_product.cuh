// From a product of a dtype known when the program runs to the kernel for it.
#pragma once

#include <stdexcept>

#include "common/gemm_cuda.cuh"
#include "common/gemm_fp32.cuh"
#include "linear/linear_cuda.h"

namespace gptkernels {

template <class T>
Product<T> product_of(const DeviceProduct& p) {
    constexpr int64_t MOST = INT32_MAX - 256, LONGEST = 1 << 28;
    if (p.M > MOST || p.N > MOST || p.K > MOST || p.a.ld >= LONGEST || p.b.ld >= LONGEST)
        throw std::runtime_error(
            "gptkernels: a matrix product on cuda takes fewer than 2^31 - 256 rows and rows of "
            "fewer than 2^28 elements: use backend='reference'");
    return {{static_cast<const T*>(p.a.data), p.a.ld},
            {static_cast<const T*>(p.b.data), p.b.ld},
            (int)p.M,
            (int)p.N,
            (int)p.K};
}

// Launches make.operator()<T>(), an epilogue, on the product. Returns how many rows of C make a piece.
template <bool A_ALONG_K, bool B_ALONG_K, class Make>
int launch_product(const char* name, const DeviceProduct& p, const Make& make, void* stream) {
    if (p.M == 0 || p.N == 0) return 1;
    bool tf32 = p.type == Type::FLOAT32 && p.tf32 && device().capability >= 80;
    if (tf32)
        return launch_gemm<float, A_ALONG_K, B_ALONG_K>(name, product_of<float>(p), make.template operator()<float>(),
                                                        stream);
    if (p.type == Type::FLOAT32)
        return launch_gemm_fp32<A_ALONG_K, B_ALONG_K>(name, product_of<float>(p), make.template operator()<float>(),
                                                      stream);
    if (p.type == Type::FLOAT16)
        return launch_gemm<fp16, A_ALONG_K, B_ALONG_K>(name, product_of<fp16>(p), make.template operator()<fp16>(),
                                                       stream);
    if (device().capability < 80)
        throw std::runtime_error(
            "gptkernels: bfloat16 products need a GPU of compute capability 8.0 or more: use float16");
    return launch_gemm<bf16, A_ALONG_K, B_ALONG_K>(name, product_of<bf16>(p), make.template operator()<bf16>(), stream);
}

// Rows of `columns` elements from `data` on start on 16 bytes.
inline bool in_packets(const void* data, int64_t columns, int element) {
    return (uintptr_t)data % 16 == 0 && columns * element % 16 == 0;
}

}  // namespace gptkernels
