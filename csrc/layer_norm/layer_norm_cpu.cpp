// LayerNorm with an optional residual addition before it (Ba, Kiros and Hinton 2016, arXiv 1607.06450).
//
// A row is read from memory once and kept in fp32 in the L1 cache; mean, then variance of the centred row (never
// E[x^2] - E[x]^2), then the result. Bytes: x, residual in, y, total out; nothing else is touched, so memory binds.
// Backward: one pass a row for both of its sums, one for dx; the rows of a chunk add their dweight and dbias into one
// fp32 row, and the chunks' rows are added in order. Chunks depend on N alone: the same bits on any number of threads.
#include "layer_norm/layer_norm_cpu.h"

#include <algorithm>
#include <cmath>

#include "common/columns.h"
#include "common/parallel.h"
#include "common/vec.h"
#include "common/workspace.h"

namespace gptkernels {
namespace {

// Call f with the numbers as a typed pointer.
template <class F>
void with_type(const Numbers& x, const F& f) {
    x.is_bf16 ? f(static_cast<const bf16*>(x.data)) : f(static_cast<const float*>(x.data));
}
template <class F>
void with_type(const MutableNumbers& x, const F& f) {
    x.is_bf16 ? f(static_cast<bf16*>(x.data)) : f(static_cast<float*>(x.data));
}

// f(c, n) for each vector of a row: n elements from column c on. n is the constant W for all but a last, shorter one.
template <class F>
[[gnu::always_inline]] inline void for_vectors(int64_t C, const F& f) {
    int64_t c = 0;
    for (; c + W <= C; c += W) f(c, std::integral_constant<int64_t, W>());
    if (c < C) f(c, C - c);
}

// Results from this size on are stored past the caches, which they would not fit beside the inputs.
constexpr int64_t STREAMED = 4 << 20;

bool streams(const MutableNumbers& x, int64_t N, int64_t C) {
    return !x.is_bf16 && N * C * 4 >= STREAMED && C % W == 0 && (uintptr_t)x.data % sizeof(vf) == 0;
}

// n elements of a result; n is for_vectors'.
template <class T, class Count>
[[gnu::always_inline]] inline void put(T* p, vf x, Count n, bool streamed) {
    if constexpr (sizeof(T) == 4 && !std::is_same_v<Count, int64_t>)
        if (streamed) return stream(p, x);
    store(p, x, n);
}

int64_t padded_width(int64_t C) { return (C + W - 1) / W * W; }

// A vector in fp32, `missing` where there is none; zero beyond C, since even a zero times what lies there may be a NaN.
void to_fp32(const Numbers& vector, float missing, int64_t C, float* out) {
    std::fill(out + C, out + padded_width(C), 0.0f);
    if (!vector.data) return (void)std::fill(out, out + C, missing);
    with_type(vector, [&](auto* p) { std::transform(p, p + C, out, [](auto x) { return to_float(x); }); });
}

template <class TX, class TR, class TY>
struct Forward {
    // The sum's dtype: fp32 if either is.
    using TS = std::conditional_t<sizeof(TX) == 4, TX, TR>;

    // row = x (+ residual, rounded as it is stored); returns its mean.
    static float read_row(const TX* x, const TR* residual, TS* total, int64_t C, float* row, bool streamed) {
        vf acc{};
        for_vectors(C, [&](int64_t c, auto n) {
            vf s = load(x + c, n);
            if (residual) {
                s += load(residual + c, n);
                put(total + c, s, n, streamed);
                if constexpr (sizeof(TS) == 2) s = widen(narrow(s));
            }
            store(row + c, s);
            acc += s;
        });
        return sum(acc) / (float)C;
    }

    // row -= mean. The mean is rounded, by a lot where it is large beside the deviation: what is left of it, the mean
    // of the centred row, is taken out of the variance here, and out of the row by whoever reads it. Returns 1 /
    // sqrt(variance + eps).
    static float centre_row(float* row, float mean, float eps, int64_t C, float* rest) {
        vf acc{}, squares{};
        for_vectors(C, [&](int64_t c, auto n) {
            vf centred = load(row + c) - mean;
            store(row + c, centred);
            if (n < W) centred = load(row + c, n);  // padding must not leak into the variance
            acc += centred;
            squares += centred * centred;
        });
        *rest = sum(acc) / (float)C;
        float variance = sum(squares) / (float)C - *rest * *rest;
        return 1.0f / std::sqrt(std::max(variance, 0.0f) + eps);
    }

    static void run(const LayerNormForward& p, const float* weight, const float* bias, int64_t padded) {
        int64_t C = p.C;
        bool stream_y = streams(p.y, p.N, C), stream_total = streams(p.total, p.N, C);
        parallel_ranges(p.N, 8, [&](int64_t begin, int64_t end) {
            float* row = workspace_of<float>(Slot::OPERATOR_THREAD, padded);
            for (int64_t n = begin; n < end; ++n) {
                const TR* residual = p.residual.data ? static_cast<const TR*>(p.residual.data) + n * C : nullptr;
                float mean = read_row(static_cast<const TX*>(p.x.data) + n * C, residual,
                                      static_cast<TS*>(p.total.data) + n * C, C, row, stream_total);
                float rest, rstd = centre_row(row, mean, p.eps, C, &rest);
                TY* y = static_cast<TY*>(p.y.data) + n * C;
                for_vectors(C, [&](int64_t c, auto count) {
                    put(y + c, (load(row + c) - rest) * rstd * load(weight + c) + load(bias + c), count, stream_y);
                });
                p.mean[n] = mean + rest;
                p.rstd[n] = rstd;
            }
            stream_done();
        });
    }
};

template <class TDY, class TX>
struct Backward {
    const LayerNormBackward& p;
    const float* weight;
    bool streamed;

    // Keeps wdy, by the rounding that its mean is taken of; sums wdy and wdy * xhat over the row; adds dy * xhat and dy
    // to the chunk's rows.
    void sums(const TDY* dy, const TX* x, float mean, float rstd, float* wdys, float* dweight, float* dbias,
              float* sum_wdy, float* sum_wdy_xhat) const {
        vf a{}, b{};
        for_vectors(p.C, [&](int64_t c, auto n) {
            vf d = load(dy + c, n), xhat = (load(x + c, n) - mean) * rstd;
            vf wdy = d * load(weight + c);
            store(wdys + c, wdy);
            a += wdy;
            b += wdy * xhat;
            store(dweight + c, load(dweight + c) + d * xhat);
            store(dbias + c, load(dbias + c) + d);
        });
        *sum_wdy = sum(a);
        *sum_wdy_xhat = sum(b);
    }

    void row(int64_t n, float* dweight, float* dbias) const {
        const TDY* dy = static_cast<const TDY*>(p.dy.data) + n * p.C;
        const TX* x = static_cast<const TX*>(p.x.data) + n * p.C;
        const TX* dtotal = p.dtotal.data ? static_cast<const TX*>(p.dtotal.data) + n * p.C : nullptr;
        TX* dx = static_cast<TX*>(p.dx.data) + n * p.C;
        float mean = p.mean[n], rstd = p.rstd[n], sum_wdy, sum_wdy_xhat;
        float* wdys = workspace_of<float>(Slot::OPERATOR_THREAD, padded_width(p.C));
        sums(dy, x, mean, rstd, wdys, dweight, dbias, &sum_wdy, &sum_wdy_xhat);
        float a = sum_wdy / (float)p.C, b = sum_wdy_xhat / (float)p.C;
        for_vectors(p.C, [&](int64_t c, auto m) {
            vf xhat = (load(x + c, m) - mean) * rstd;
            vf d = rstd * (load(wdys + c) - a - xhat * b);
            if (dtotal) d += load(dtotal + c, m);
            put(dx + c, d, m, streamed);
        });
    }
};

}  // namespace

void layer_norm_forward_cpu(const LayerNormForward& p) {
    int64_t padded = padded_width(p.C);
    float* weight = workspace_of<float>(Slot::OPERATOR, 2 * padded);
    float* bias = weight + padded;
    to_fp32(p.weight, 1.0f, p.C, weight);
    to_fp32(p.bias, 0.0f, p.C, bias);
    with_type(p.x, [&](auto* x) {
        with_type(p.residual, [&](auto* r) {
            with_type(p.y, [&](auto* y) {
                using TX = std::remove_cvref_t<decltype(*x)>;
                using TR = std::remove_cvref_t<decltype(*r)>;
                using TY = std::remove_cvref_t<decltype(*y)>;
                Forward<TX, TR, TY>::run(p, weight, bias, padded);
            });
        });
    });
}

void layer_norm_backward_cpu(const LayerNormBackward& p) {
    // At most 64 chunks: their rows stay small beside x, and few rows a chunk keep the threads even.
    int64_t rows = std::max<int64_t>(16, (p.N + 63) / 64), chunks = (p.N + rows - 1) / rows, padded = padded_width(p.C);
    float* weight = workspace_of<float>(Slot::OPERATOR, (1 + 2 * chunks) * padded);
    float *dweight = weight + padded, *dbias = dweight + chunks * padded;
    to_fp32(p.weight, 1.0f, p.C, weight);
    with_type(p.dy, [&](auto* dy) {
        with_type(p.x, [&](auto* x) {
            Backward<std::remove_cvref_t<decltype(*dy)>, std::remove_cvref_t<decltype(*x)>> backward{
                p, weight, streams(p.dx, p.N, p.C)};
            parallel_for(chunks, [&](int64_t chunk) {
                float *dw = dweight + chunk * padded, *db = dbias + chunk * padded;
                std::fill(dw, dw + padded, 0.0f);
                std::fill(db, db + padded, 0.0f);
                for (int64_t n = chunk * rows; n < std::min(p.N, (chunk + 1) * rows); ++n) backward.row(n, dw, db);
                stream_done();
            });
        });
    });
    if (p.dweight.data) with_type(p.dweight, [&](auto* out) { column_sums(dweight, chunks, p.C, padded, out); });
    if (p.dbias.data) with_type(p.dbias, [&](auto* out) { column_sums(dbias, chunks, p.C, padded, out); });
}

}  // namespace gptkernels
