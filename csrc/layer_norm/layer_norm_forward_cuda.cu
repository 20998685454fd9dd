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
// Where x, residual, y and the sum have one type there is an instance for it, with weights in that type or fp32; other
// mixtures (autocast), and rows that no packet fits, run an instance that looks types up as it goes.
#include "layer_norm/layer_norm_cuda.h"
#include "layer_norm/rows.cuh"

namespace gptkernels {
namespace {

// fp32 columns a thread, in registers.
constexpr int COLUMNS = 32, MOST_THREADS = 512;

template <class T, class W>
struct Forward {
    In<T> x, residual;
    In<W> weight, bias;
    Out<T> y, total;
    Global<float> mean, rstd;
    int64_t N;
    int C;
    float eps;
};

// A thread's packets of x, or of the sum with the residual, which is stored: the row that is normalised is rounded to
// the sum's type. All loads are under way before the first packet is used, unless looking types up separates them
// anyway.
template <int ROW_THREADS, int N, int K, class T, class W>
DEVICE void load_total(const Forward<T, W>& p, int64_t row, Vector<float, N> (&total)[K]) {
    Vector<Raw<T>, N> x[K], residual[K];
    UNROLL
    for (int k = 0; k < K; ++k) {
        int column = column_of<ROW_THREADS, N>(k);
        if (column < p.C) x[k] = load_raw<N>(p.x, row * p.C + column);
    }
    constexpr bool AHEAD = !std::is_same_v<T, any>;
    if (AHEAD && p.residual) {
        UNROLL
        for (int k = 0; k < K; ++k) {
            int column = column_of<ROW_THREADS, N>(k);
            if (column < p.C) residual[k] = load_raw<N>(p.residual, row * p.C + column);
        }
    }
    UNROLL
    for (int k = 0; k < K; ++k) {
        int column = column_of<ROW_THREADS, N>(k);
        if (column >= p.C) continue;
        total[k] = to_floats(x[k]);
        if (!p.residual) continue;
        if (!AHEAD) residual[k] = load_raw<N>(p.residual, row * p.C + column);
        Vector<float, N> more = to_floats(residual[k]);
        UNROLL
        for (int j = 0; j < N; ++j) total[k][j] += more[j];
        total[k] = store_floats(p.total, row * p.C + column, total[k]);
    }
}

template <int N, class T, class W>
DEVICE void store_normalised(const Forward<T, W>& p, int64_t i, int column, Vector<float, N> x, float rstd) {
    UNROLL
    for (int j = 0; j < N; ++j) x[j] *= rstd;
    if (p.weight) {
        Vector<float, N> weight = load_floats<N>(p.weight, column);
        UNROLL
        for (int j = 0; j < N; ++j) x[j] *= weight[j];
    }
    if (p.bias) {
        Vector<float, N> bias = load_floats<N>(p.bias, column);
        UNROLL
        for (int j = 0; j < N; ++j) x[j] += bias[j];
    }
    store_floats(p.y, i, x);
}

template <int ROW_THREADS, int N, int K, class T, class W>
__global__ void __launch_bounds__(ROW_THREADS == WARP ? BLOCK : MOST_THREADS, 1)
    layer_norm_forward_kernel(Forward<T, W> p) {
    SHARED_ARRAY(float, first_sums, WARP);
    SHARED_ARRAY(float, second_sums, WARP);
    int64_t row = first_row<ROW_THREADS>();
    if (row >= p.N) return;  // a warp of its own row: no barrier follows

    Vector<float, N> x[K];
    load_total<ROW_THREADS>(p, row, x);
    float sum = 0, squares = 0;
    UNROLL
    for (int k = 0; k < K; ++k) {
        if (column_of<ROW_THREADS, N>(k) < p.C) {
            UNROLL
            for (int j = 0; j < N; ++j) sum += x[k][j];
        }
    }
    float mean = row_sum<ROW_THREADS>(sum, first_sums) / (float)p.C;
    UNROLL
    for (int k = 0; k < K; ++k) {
        if (column_of<ROW_THREADS, N>(k) < p.C) {
            UNROLL
            for (int j = 0; j < N; ++j) {
                x[k][j] -= mean;
                squares += x[k][j] * x[k][j];
            }
        }
    }
    float rstd = rsqrt_approx(row_sum<ROW_THREADS>(squares, second_sums) / (float)p.C + p.eps);
    UNROLL
    for (int k = 0; k < K; ++k) {
        int column = column_of<ROW_THREADS, N>(k);
        if (column < p.C) store_normalised(p, row * p.C + column, column, x[k], rstd);
    }
    if (column_of<ROW_THREADS, N>(0) == 0) {
        p.mean[row] = mean;
        p.rstd[row] = rstd;
    }
}

template <int ROW_THREADS, int N, int K, class T, class W>
void launch_with(const LayerNormForwardCuda& p, Tile tile, void* stream) {
    Forward<T, W> f{input<T>(p.x),
                    input<T>(p.residual),
                    input<W>(p.weight),
                    input<W>(p.bias),
                    output<T>(p.y),
                    output<T>(p.total),
                    p.mean,
                    p.rstd,
                    p.N,
                    (int)p.C,
                    p.eps};
    int64_t blocks = (p.N + rows_a_block(tile) - 1) / rows_a_block(tile);
    launch({"layer_norm_forward", blocks, block_of(tile), 0, stream},
           layer_norm_forward_kernel<ROW_THREADS, N, K, T, W>, f);
}

template <int N, class T, class W>
void launch_tile(const LayerNormForwardCuda& p, void* stream) {
    constexpr int QUARTER = COLUMNS / N / 4;
    Tile tile = tile_of(p.C, N, COLUMNS);
    int quarters = (tile.packets + QUARTER - 1) / QUARTER;
    if constexpr (std::is_same_v<T, any>) {
        if (tile.row_threads > WARP) return launch_with<0, N, COLUMNS / N, T, W>(p, tile, stream);
        return launch_with<WARP, N, COLUMNS / N, T, W>(p, tile, stream);
    } else {
        // Twice as many threads are taken where half of them do not suffice, so that long rows need three quarters or
        // all.
        if (tile.row_threads > WARP && quarters == 4) return launch_with<0, N, 4 * QUARTER, T, W>(p, tile, stream);
        if (tile.row_threads > WARP) return launch_with<0, N, 3 * QUARTER, T, W>(p, tile, stream);
        if (quarters == 4) return launch_with<WARP, N, 4 * QUARTER, T, W>(p, tile, stream);
        if (quarters == 3) return launch_with<WARP, N, 3 * QUARTER, T, W>(p, tile, stream);
        if (quarters == 2) return launch_with<WARP, N, 2 * QUARTER, T, W>(p, tile, stream);
        return launch_with<WARP, N, QUARTER, T, W>(p, tile, stream);
    }
}

}  // namespace

void layer_norm_forward_cuda(const LayerNormForwardCuda& p, void* stream) {
    if (p.N == 0) return;
    Type type = p.x.type, vector = p.weight.data ? p.weight.type : p.bias.data ? p.bias.type : type;
    bool one_type = p.y.type == type && (!p.residual.data || (p.residual.type == type && p.total.type == type));
    with_types(type, vector, one_type, p.C,
               {p.x, p.residual, p.weight, p.bias, {p.y.data, p.y.type}, {p.total.data, p.total.type}},
               [&]<class T, class W, int N>() { launch_tile<N, T, W>(p, stream); });
}

}  // namespace gptkernels
