// Launches the attention backward, and its first half on 16-bit numbers (see attention_query_gradient.cuh).
#include "attention/attention_query_gradient.cuh"
#include "attention/launch.cuh"

namespace gptkernels {
namespace {

template <class Tile>
bool run(const AttentionCuda& p, const AttentionBackwardCuda& x, void* stream) {
    using T = typename Tile::T;
    constexpr int BYTES = QueryGradientMemory<Tile>::BYTES;
    if (BYTES > device().shared_bytes) return false;
    launch(
        {"attention_query_gradient", {(p.T + Tile::OWNED - 1) / Tile::OWNED, p.H, p.B}, Tile::THREADS, BYTES, stream},
        attention_query_gradient<Tile>, heads<const T>(x.dout), heads<const T>(x.q), heads<const T>(x.k),
        heads<const T>(x.v), heads<const T>(x.out), x.stats, x.terms, heads<T>(x.dq), p.seed, sizes_of(p));
    return true;
}

// At D = 128 by what shared memory a block may have: 163 KiB (sm_80, 90, 100), 99 KiB (sm_86, 89, 120), 64 KiB (sm_75).
template <class T, bool DROPOUT>
bool run_any(const AttentionCuda& p, const AttentionBackwardCuda& x, void* stream) {
    if (p.D <= 32) return run<GradientTile<T, 32, DROPOUT, 2, 4, 1, 32, 2>>(p, x, stream);
    if (p.D <= 64) return run<GradientTile<T, 64, DROPOUT, 2, 4, 1, 32, 2>>(p, x, stream);
    if (p.D > 128) return run<GradientTile<T, 256, DROPOUT, 1, 4, 1, 32, 1>>(p, x, stream);
    return run<GradientTile<T, 128, DROPOUT, 2, 4, 2, 64, 2>>(p, x, stream) ||
           run<GradientTile<T, 128, DROPOUT, 2, 4, 2, 64, 1>>(p, x, stream) ||
           (std::is_same_v<T, fp16> && run<GradientTile<fp16, 128, DROPOUT, 2, 2, 2, 32, 1>>(p, x, stream));
}

}  // namespace

void attention_backward_cuda(const AttentionCuda& p, const AttentionBackwardCuda& x, void* stream) {
    if (p.B * p.H == 0) return;
    check_size(p, {x.dout, x.q, x.k, x.v, x.out, x.dq, x.dk, x.dv});
    if (p.type == Type::FLOAT32) {
        if (x.dq_sums) throw std::runtime_error("atomics on cuda takes float16 or bfloat16, got float32: leave it off");
        return attention_float_backward_cuda(p, x, stream);
    }
    x.dq_sums ? attention_row_terms_cuda(p, x, stream) : attention_query_gradient_cuda(p, x, stream);
    attention_key_gradient_cuda(p, x, stream);
    if (x.dq_sums) attention_finish_cuda(p, x, stream);
}

void attention_query_gradient_cuda(const AttentionCuda& p, const AttentionBackwardCuda& x, void* stream) {
    if (p.T == 0) return;
    with_type(p, [&]<class T, bool DROPOUT>() {
        if (!run_any<T, DROPOUT>(p, x, stream)) refuse(p, device());
    });
}

}  // namespace gptkernels
