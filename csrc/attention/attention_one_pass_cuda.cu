// Launches the kernels before and after the one-pass form of the attention backward (see one_pass.cuh).
#include "attention/launch.cuh"
#include "attention/one_pass.cuh"

namespace gptkernels {
namespace {

// f<T, D>() for the tiles' widths.
template <class F>
void with_width(const AttentionCuda& p, const F& f) {
    with_type(p, [&]<class T, bool DROPOUT>() {
        if (p.D <= 32) f.template operator()<T, 32>();
        else if (p.D <= 64) f.template operator()<T, 64>();
        else if (p.D <= 128) f.template operator()<T, 128>();
        else f.template operator()<T, 256>();
    });
}

Launch blocks_of_rows(const char* name, const AttentionCuda& p, void* stream) {
    return {name, {term_rows(p.T) / TERM_ROWS, p.H, p.B}, 256, 0, stream};
}

}  // namespace

void attention_row_terms_cuda(const AttentionCuda& p, const AttentionBackwardCuda& x, void* stream) {
    if (p.T == 0) return;
    with_width(p, [&]<class T, int D>() {
        launch(blocks_of_rows("attention_row_terms", p, stream), attention_row_terms<T, D>, heads<const T>(x.dout),
               heads<const T>(x.out), x.stats, x.terms, x.dq_sums, sizes_of(p));
    });
}

void attention_finish_cuda(const AttentionCuda& p, const AttentionBackwardCuda& x, void* stream) {
    if (p.T == 0) return;
    with_width(p, [&]<class T, int D>() {
        launch(blocks_of_rows("attention_finish", p, stream), attention_finish<T, D>, x.dq_sums, heads<T>(x.dq),
               sizes_of(p));
    });
}

}  // namespace gptkernels
