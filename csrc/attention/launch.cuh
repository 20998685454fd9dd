// What the launchers of the CUDA attention share.
#pragma once

#include <stdexcept>
#include <string>

#include "attention/attention_cuda.h"
#include "attention/tile.cuh"

namespace gptkernels {

inline AttentionSizes sizes_of(const AttentionCuda& p) {
    return {(int)p.H, (int)p.T, (int)p.S, (int)p.D, p.scale, p.drop_below, p.keep_scale};
}

template <class T>
Heads<T> heads(const HeadsArray& x) {
    return {Global<T>(static_cast<T*>(x.data)), x.stride_b, x.stride_h, x.stride_t};
}

// Kernels count rows in 32 bits, and 16-byte packets of a head.
inline void check_size(const AttentionCuda& p, std::initializer_list<HeadsArray> all) {
    auto fits = [](int64_t n) { return n < (int64_t)1 << 31; };
    int64_t packet = 16 / bytes_of(p.type), rows = (p.T > p.S ? p.T : p.S) + TERM_ROWS;
    bool small = fits(p.T + p.S + TERM_ROWS) && p.B <= 65535 && p.H <= 65535;
    for (const HeadsArray& x : all) small = small && fits(x.stride_t / packet) && fits(rows * (x.stride_t / packet));
    if (!small)
        throw std::runtime_error(
            "attention on cuda takes up to 65535 batches and heads, and heads that reach over less than 32 GiB: "
            "split the batch");
}

[[noreturn]] inline void refuse(const AttentionCuda& p, const Device& device) {
    throw std::runtime_error("attention on cuda has no tile for a head dim of " + std::to_string(p.D) + " in sm_" +
                             std::to_string(device.capability) + "'s " + std::to_string(device.shared_bytes / 1024) +
                             " KiB of shared memory: use backend='triton' or 'reference'");
}

// f<T, DROPOUT>() for 16-bit numbers.
template <class F>
void with_type(const AttentionCuda& p, const F& f) {
    if (p.type == Type::BFLOAT16 && device().capability < 80)
        throw std::runtime_error("bfloat16 on cuda needs sm_80 or later, got sm_" +
                                 std::to_string(device().capability) + ": use float16");
    bool dropout = p.drop_below != 0;
    if (p.type == Type::BFLOAT16) dropout ? f.template operator()<bf16, true>() : f.template operator()<bf16, false>();
    else dropout ? f.template operator()<fp16, true>() : f.template operator()<fp16, false>();
}

}  // namespace gptkernels
