// Launches the attention forward (see attention_forward.cuh).
#include "attention/attention_forward.cuh"
#include "attention/launch.cuh"

namespace gptkernels {
namespace {

// Tiles follow the 255 registers of a thread: accumulators of 32 x D and scores of 32 x BLOCK_N, and dropout's words.
template <class T, int D, bool DROPOUT>
using Tile =
    ForwardTile<T, D, DROPOUT, D <= 128 ? 2 : 1, D <= 128 ? 4 : 8, D <= 64 || (D == 128 && !DROPOUT) ? 64 : 32>;

template <class Tile>
void run(const AttentionCuda& p, HeadsArray q, HeadsArray k, HeadsArray v, HeadsArray out, float* stats, void* stream) {
    using T = typename Tile::T;
    if (Tile::SHARED_BYTES > device().shared_bytes) refuse(p, device());
    launch({"attention_forward",
            {(p.T + Tile::BLOCK_M - 1) / Tile::BLOCK_M, p.H, p.B},
            Tile::THREADS,
            Tile::SHARED_BYTES,
            stream},
           attention_forward<Tile>, heads<const T>(q), heads<const T>(k), heads<const T>(v), heads<T>(out), stats,
           p.seed, sizes_of(p));
}

}  // namespace

void attention_forward_cuda(const AttentionCuda& p, HeadsArray q, HeadsArray k, HeadsArray v, HeadsArray out,
                            float* stats, void* stream) {
    if (p.B * p.H * p.T == 0) return;
    check_size(p, {q, k, v, out});
    if (p.type == Type::FLOAT32) return attention_float_forward_cuda(p, q, k, v, out, stats, stream);
    with_type(p, [&]<class T, bool DROPOUT>() {
        if (p.D <= 32) run<Tile<T, 32, DROPOUT>>(p, q, k, v, out, stats, stream);
        else if (p.D <= 64) run<Tile<T, 64, DROPOUT>>(p, q, k, v, out, stats, stream);
        else if (p.D <= 128) run<Tile<T, 128, DROPOUT>>(p, q, k, v, out, stats, stream);
        else run<Tile<T, 256, DROPOUT>>(p, q, k, v, out, stats, stream);
    });
}

}  // namespace gptkernels
