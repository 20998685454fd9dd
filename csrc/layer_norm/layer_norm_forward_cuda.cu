// LayerNorm with an optional residual addition before it (Ba, Kiros and Hinton 2016, arXiv 1607.06450), forward.
//
//   s = x + residual;   y = (s - mean(s)) rstd weight + bias,   rstd = 1 / sqrt(mean((s - mean(s))^2) + eps)
//
// A row of up to 1024 columns is a warp's, a longer one a block's (rows.cuh). It is read once, in packets of 16 bytes,
// and stays in fp32 registers, up to 32 columns a thread; the variance is summed in a second pass over these registers.
// A row takes two reductions of 5 shuffles, and in a block one barrier each.
// Bytes a row: x, residual, y and the sum, C elements each; weight and bias come from L1. Memory binds.
// Deterministic: sums in an order that depends on C alone.
//
// Where x, residual, y and the sum have one type there is an instance for it, with weights in that type or fp32, and
// for what autocast makes: x and y of 16 bits, residual, sum and weights in fp32. Other mixtures, and rows that no
// packet fits, run an instance that looks types up as it goes.
#include "layer_norm/layer_norm_cuda.h"
#include "layer_norm/rows.cuh"

namespace gptkernels {
namespace {

// fp32 columns a thread, in registers.
constexpr int COLUMNS = 32, MOST_THREADS = 512;

template <class T, class S, class W>
struct Forward {
    In<T> x;
    In<S> residual;
    In<W> weight, bias;
    Out<T> y;
    Out<S> total;
    Global<float> mean, rstd;
    int64_t N;
    int C;
    float inverse_C, eps;
};

// A thread's packets of x, or of the sum with the residual, which is stored: the row that is normalised is rounded to
// the sum's type. All loads are under way before the first packet is used.
template <int K, class Packets, int N, class T, class S, class W>
DEVICE void load_total(const Forward<T, S, W>& p, Packets row, Vector<float, N> (&total)[K]) {
    Vector<T, N> x[K];
    Vector<S, N> residual[K];
    UNROLL
    for (int k = 0; k < K; ++k)
        if (row.exists(k)) x[k] = load_raw<N>(p.x, row.index_of(k));
    if (p.residual) {
        UNROLL
        for (int k = 0; k < K; ++k)
            if (row.exists(k)) residual[k] = load_raw<N>(p.residual, row.index_of(k));
        UNROLL
        for (int k = 0; k < K; ++k) {
            if (!row.exists(k)) continue;
            if constexpr (std::is_same_v<T, S>) residual[k] = add(x[k], residual[k]);
            else residual[k] = from_floats<S>(add(to_floats(x[k]), to_floats(residual[k])));
            store_raw(p.total, row.index_of(k), residual[k]);
            total[k] = to_floats(residual[k]);
        }
        return;
    }
    UNROLL
    for (int k = 0; k < K; ++k)
        if (row.exists(k)) total[k] = to_floats(x[k]);
}

// The same where types are looked up, packet by packet.
template <int K, class Packets, int N>
DEVICE void load_total(const Forward<any, any, any>& p, Packets row, Vector<float, N> (&total)[K]) {
    UNROLL
    for (int k = 0; k < K; ++k) {
        if (!row.exists(k)) continue;
        total[k] = load_raw<N>(p.x, row.index_of(k));
        if (!p.residual) continue;
        Vector<float, N> residual = load_raw<N>(p.residual, row.index_of(k));
        total[k] = store_floats(p.total, row.index_of(k), add(total[k], residual));
    }
}

// N numbers of weight or bias, or all of them the one that stands for a missing one, which is put into the registers
// that are loaded: half as many as floats take.
template <int N, class W>
DEVICE Vector<float, N> vector_or(float missing, const In<W>& p, int column) {
    Vector<float, N> all;
    UNROLL
    for (int j = 0; j < N; ++j) all[j] = missing;
    auto v = from_floats<std::conditional_t<std::is_same_v<W, any>, float, W>>(all);
    if (p) v = load_raw<N>(p, column);
    return to_floats(v);
}

// sum / C, rounded as a division's result is (Markstein 1990), which takes 20 instructions. With the product alone a
// constant row would be off its own mean.
DEVICE float mean_of(float sum, float C, float inverse_C) {
    float mean = sum * inverse_C;
    return fmaf(fmaf(-mean, C, sum), inverse_C, mean);
}

template <int ROW_THREADS, int N, int K, int FULL, class T, class S, class W>
__global__ void __launch_bounds__(ROW_THREADS == WARP ? BLOCK : MOST_THREADS, 1)
    layer_norm_forward_kernel(Forward<T, S, W> p) {
    SHARED_ARRAY(float, first_sums, WARP);
    SHARED_ARRAY(float, second_sums, WARP);
    int64_t n = first_row<ROW_THREADS>();
    if (n >= p.N) return;  // a warp of its own row: no barrier follows
    Packets<ROW_THREADS, N, FULL> row(n, p.C);

    Vector<float, N> x[K];
    load_total(p, row, x);
    float sum = 0, squares = 0;
    UNROLL
    for (int k = 0; k < K; ++k) {
        if (!row.exists(k)) continue;
        UNROLL
        for (int j = 0; j < N; ++j) sum += x[k][j];
    }
    float mean = mean_of(row_sum<ROW_THREADS>(sum, first_sums), (float)p.C, p.inverse_C);
    UNROLL
    for (int k = 0; k < K; ++k) {
        if (!row.exists(k)) continue;
        UNROLL
        for (int j = 0; j < N; ++j) {
            x[k][j] -= mean;
            squares += x[k][j] * x[k][j];
        }
    }
    float rstd = rsqrt_approx(row_sum<ROW_THREADS>(squares, second_sums) * p.inverse_C + p.eps);
    UNROLL
    for (int k = 0; k < K; ++k) {
        if (!row.exists(k)) continue;
        Vector<float, N> weight = vector_or<N, W>(1, p.weight, row.column_of(k));
        Vector<float, N> bias = vector_or<N, W>(0, p.bias, row.column_of(k));
        UNROLL
        for (int j = 0; j < N; ++j) x[k][j] = x[k][j] * rstd * weight[j] + bias[j];
        store_floats(p.y, row.index_of(k), x[k]);
    }
    if (row.column == 0) {
        p.mean[n] = mean;
        p.rstd[n] = rstd;
    }
}

template <int ROW_THREADS, int N, int K, int FULL, class T, class S, class W>
void launch_with(const LayerNormForwardCuda& p, Tile tile, void* stream) {
    Forward<T, S, W> f{input<T>(p.x),
                       input<S>(p.residual),
                       input<W>(p.weight),
                       input<W>(p.bias),
                       output<T>(p.y),
                       output<S>(p.total),
                       p.mean,
                       p.rstd,
                       p.N,
                       (int)p.C,
                       1 / (float)p.C,
                       p.eps};
    int64_t blocks = (p.N + rows_a_block(tile) - 1) / rows_a_block(tile);
    launch({"layer_norm_forward", blocks, block_of(tile), 0, stream},
           layer_norm_forward_kernel<ROW_THREADS, N, K, FULL, T, S, W>, f);
}

template <int N, class T, class S, class W>
void launch_tile(const LayerNormForwardCuda& p, void* stream) {
    constexpr int QUARTER = COLUMNS / N / 4;
    Tile tile = tile_of(p.C, N, COLUMNS);
    int quarters = (tile.packets + QUARTER - 1) / QUARTER;
    if constexpr (std::is_same_v<T, any>) {
        if (tile.row_threads > WARP) return launch_with<0, N, COLUMNS / N, 0, T, S, W>(p, tile, stream);
        return launch_with<WARP, N, COLUMNS / N, 0, T, S, W>(p, tile, stream);
    } else {
        // Twice as many threads are taken where half of them do not suffice, so that long rows need three quarters or
        // all.
        if (tile.row_threads > WARP && quarters == 4)
            return launch_with<0, N, 4 * QUARTER, 3 * QUARTER, T, S, W>(p, tile, stream);
        if (tile.row_threads > WARP) return launch_with<0, N, 3 * QUARTER, 2 * QUARTER, T, S, W>(p, tile, stream);
        if (quarters == 4) return launch_with<WARP, N, 4 * QUARTER, 3 * QUARTER, T, S, W>(p, tile, stream);
        if (quarters == 3) return launch_with<WARP, N, 3 * QUARTER, 2 * QUARTER, T, S, W>(p, tile, stream);
        if (quarters == 2) return launch_with<WARP, N, 2 * QUARTER, QUARTER, T, S, W>(p, tile, stream);
        return launch_with<WARP, N, QUARTER, 0, T, S, W>(p, tile, stream);
    }
}

}  // namespace

void layer_norm_forward_cuda(const LayerNormForwardCuda& p, void* stream_of_work) {
    if (p.N == 0) return;
    Type value = p.x.type, stream = p.residual.data ? p.residual.type : value;
    Type vector = p.weight.data ? p.weight.type : p.bias.data ? p.bias.type : stream;
    bool typed = p.y.type == value && (!p.residual.data || p.total.type == stream);
    with_types(value, stream, vector, typed, p.C,
               {p.x, p.residual, p.weight, p.bias, {p.y.data, p.y.type}, {p.total.data, p.total.type}},
               [&]<class T, class S, class W, int N>() { launch_tile<N, T, S, W>(p, stream_of_work); });
}

}  // namespace gptkernels
