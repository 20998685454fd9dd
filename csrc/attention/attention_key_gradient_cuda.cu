// Launches the second half of the attention backward on 16-bit numbers (see attention_key_gradient.cuh).
#include "attention/attention_key_gradient.cuh"
#include "attention/launch.cuh"

namespace gptkernels {
namespace {

template <class Tile>
bool run(const AttentionCuda& p, const AttentionBackwardCuda& x, void* stream) {
    using T = typename Tile::T;
    constexpr int BYTES = KeyGradientMemory<Tile>::BYTES;
    if (BYTES > device().shared_bytes) return false;
    launch({"attention_key_gradient", {(p.S + Tile::OWNED - 1) / Tile::OWNED, p.H, p.B}, Tile::THREADS, BYTES, stream},
           attention_key_gradient<Tile>, heads<const T>(x.dout), heads<const T>(x.q), heads<const T>(x.k),
           heads<const T>(x.v), x.terms, heads<T>(x.dk), heads<T>(x.dv), x.dq_sums, p.seed, sizes_of(p));
    return true;
}

// At D = 128 by what shared memory a block may have: 163 KiB (sm_80, 90, 100), 99 KiB (sm_86, 89, 120), 64 KiB (sm_75).
template <class T, bool DROPOUT, bool ONE_PASS>
bool run_any(const AttentionCuda& p, const AttentionBackwardCuda& x, void* stream) {
    if (p.D <= 32) return run<GradientTile<T, 32, DROPOUT, 2, 4, 1, 32, 2, ONE_PASS>>(p, x, stream);
    if (p.D <= 64) return run<GradientTile<T, 64, DROPOUT, 2, 4, 1, 32, 2, ONE_PASS>>(p, x, stream);
    if (p.D > 128) return run<GradientTile<T, 256, DROPOUT, 1, 2, 2, 32, 1, ONE_PASS>>(p, x, stream);
    return run<GradientTile<T, 128, DROPOUT, 2, 4, 2, 64, 2, ONE_PASS>>(p, x, stream) ||
           run<GradientTile<T, 128, DROPOUT, 2, 2, 2, 64, 1, ONE_PASS>>(p, x, stream) ||
           (std::is_same_v<T, fp16> && run<GradientTile<fp16, 128, DROPOUT, 2, 2, 2, 32, 1, ONE_PASS>>(p, x, stream));
}

}  // namespace

void attention_key_gradient_cuda(const AttentionCuda& p, const AttentionBackwardCuda& x, void* stream) {
    if (p.S == 0) return;
    with_type(p, [&]<class T, bool DROPOUT>() {
        bool done = x.dq_sums ? run_any<T, DROPOUT, true>(p, x, stream) : run_any<T, DROPOUT, false>(p, x, stream);
        if (!done) refuse(p, device());
    });
}

}  // namespace gptkernels
