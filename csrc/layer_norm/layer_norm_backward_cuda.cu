// LayerNorm, backward. With xhat = (x - mean) rstd and wdy = dy weight:
//
//   dx = rstd (wdy - mean(wdy) - xhat mean(wdy xhat)) + dtotal;   dweight = sum of dy xhat;   dbias = sum of dy
//
// Rows belong to threads as in the forward (rows.cuh). A worker (a warp, or a block for long rows) takes every
// workers-th row and adds its dweight and dbias up in registers, where its threads own the same columns of every row;
// at the end it writes them as one fp32 row, and a second kernel adds these rows. No atomics: the same bits every time
// on devices of as many processors. Rows of more than 8192 columns (fp32: 6144) are read twice (from L2) instead of
// being kept: beside the sums they do not fit into the registers that 512 threads have. Bytes a row: dy, x, dtotal, dx,
// C elements each. Memory binds.
#include <algorithm>

#include "layer_norm/layer_norm_cuda.h"
#include "layer_norm/rows.cuh"

namespace gptkernels {
namespace {

// Workers: as many as keep a processor's memory pipes full, each with rows enough not to be all overhead.
constexpr int WARPS_A_PROCESSOR = 8, ROWS_A_WORKER = 4;

// Columns that a thread keeps, in fp32 registers beside the two sums, and the threads that have as many registers;
// those of a row that is read twice, of which there are the sums only.
template <class T>
constexpr int KEPT_COLUMNS = sizeof(T) == 2 ? 32 : 24;
constexpr int MOST_KEPT_THREADS = 256, READ_TWICE_COLUMNS = 32, MOST_THREADS = 512;

// T: of dy, S: of the stream, which x, dtotal and dx are.
template <class T, class S, class W>
struct Backward {
    In<T> dy;
    In<S> dtotal, x;
    In<W> weight;
    Global<const float> mean, rstd;
    Out<S> dx;
    Global<float> dweight, dbias;  // a row a worker
    int64_t N;
    int C;
    float inverse_C;
    int stride;  // of dweight and dbias
};

// mean(wdy) and mean(wdy xhat) of a row.
struct Means {
    float wdy, product;
};

// Both sums over a row; scratch is for 2 WARP floats that the row before did not use.
template <int ROW_THREADS>
DEVICE Means row_means(float wdy, float product, float inverse_C, Shared<float> scratch) {
    wdy = warp_sum(wdy);
    product = warp_sum(product);
    if constexpr (ROW_THREADS != WARP) {
        int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, warps = (int)blockDim.x / WARP;
        if (lane == 0) {
            scratch[warp] = wdy;
            scratch[WARP + warp] = product;
        }
        __syncthreads();
        wdy = warp_sum(lane < warps ? (float)scratch[lane] : 0.0f);
        product = warp_sum(lane < warps ? (float)scratch[WARP + lane] : 0.0f);
    }
    return {wdy * inverse_C, product * inverse_C};
}

template <int N>
struct Packet {
    Vector<float, N> xhat, wdy;
};

// xhat and wdy of a packet, from dy and x as loaded.
template <int N, class T, class S, class W>
DEVICE Packet<N> packet_of(const Backward<T, S, W>& p, const Vector<float, N>& dy, const Vector<float, N>& x,
                           int column, float mean, float rstd) {
    Packet<N> packet;
    UNROLL
    for (int j = 0; j < N; ++j) packet.xhat[j] = (x[j] - mean) * rstd;
    packet.wdy = dy;
    if (p.weight) {
        Vector<float, N> weight = load_floats<N>(p.weight, column);
        UNROLL
        for (int j = 0; j < N; ++j) packet.wdy[j] *= weight[j];
    }
    return packet;
}

template <int N, class T, class S, class W>
DEVICE void store_dx(const Backward<T, S, W>& p, int64_t i, const Packet<N>& packet, Means means, float rstd,
                     const Vector<Raw<S>, N>& dtotal) {
    float of_all = -means.wdy * rstd, of_xhat = -means.product * rstd;
    Vector<float, N> dx;
    if (p.dtotal) dx = to_floats(dtotal);
    UNROLL
    for (int j = 0; j < N; ++j)
        dx[j] = packet.wdy[j] * rstd + (packet.xhat[j] * of_xhat + (p.dtotal ? dx[j] + of_all : of_all));
    store_floats(p.dx, i, dx);
}

// One row: dx, and its part of this thread's columns of dweight and dbias.
template <int K, bool KEEP, int N, class Packets, class T, class S, class W>
DEVICE void backward_row(const Backward<T, S, W>& p, int64_t n, Packets row, Shared<float> scratch,
                         Vector<float, N> (&dweight)[K], Vector<float, N> (&dbias)[K]) {
    // A row of one number is its own mean, and has no gradient: not even the rounding errors of dx's terms.
    float mean = p.mean[n], rstd = p.C > 1 ? (float)p.rstd[n] : 0.0f, sum = 0, product = 0;
    Vector<Raw<T>, N> dy[K];
    Vector<Raw<S>, N> x[K], dtotal[K];
    Packet<N> packets[K];
    if constexpr (KEEP) {  // all loads are under way before the first is used
        UNROLL
        for (int k = 0; k < K; ++k)
            if (row.exists(k)) x[k] = load_raw<N>(p.x, row.index_of(k));
        UNROLL
        for (int k = 0; k < K; ++k)
            if (row.exists(k)) dy[k] = load_raw<N>(p.dy, row.index_of(k));
        if (p.dtotal) {
            UNROLL
            for (int k = 0; k < K; ++k)
                if (row.exists(k)) dtotal[k] = load_raw<N>(p.dtotal, row.index_of(k));
        }
    }
    auto packet = [&](int k) {
        if (!KEEP) x[k] = load_raw<N>(p.x, row.index_of(k));
        if (!KEEP) dy[k] = load_raw<N>(p.dy, row.index_of(k));
        return packet_of(p, to_floats(dy[k]), to_floats(x[k]), row.column_of(k), mean, rstd);
    };
    UNROLL
    for (int k = 0; k < K; ++k) {
        if (!row.exists(k)) continue;
        packets[k] = packet(k);
        Vector<float, N> gradient = to_floats(dy[k]);
        UNROLL
        for (int j = 0; j < N; ++j) {
            sum += packets[k].wdy[j];
            product += packets[k].wdy[j] * packets[k].xhat[j];
            dweight[k][j] += gradient[j] * packets[k].xhat[j];
            dbias[k][j] += gradient[j];
        }
    }
    Means means = row_means<Packets::ROW>(sum, product, p.inverse_C, scratch);
    if constexpr (!KEEP) row.forget();
    UNROLL
    for (int k = 0; k < K; ++k) {
        if (!row.exists(k)) continue;
        if (!KEEP && p.dtotal) dtotal[k] = load_raw<N>(p.dtotal, row.index_of(k));
        store_dx(p, row.index_of(k), KEEP ? packets[k] : packet(k), means, rstd, dtotal[k]);
    }
}

// A worker's sums as a row of `to`, in quads of columns: quad q of packet k of all threads, then the next quad, so that
// a warp's stores are contiguous. Single columns lie in their own order.
template <int K, int N, class Packets>
DEVICE void store_sums(Global<float> to, Packets row, const Vector<float, N> (&sums)[K]) {
    if constexpr (N == 1) row.forget();
    UNROLL
    for (int k = 0; k < K; ++k) {
        if (!row.exists(k)) continue;
        if constexpr (N == 1) store(to + row.column_of(k), sums[k]);
        UNROLL
        for (int q = 0; q < N / 4; ++q) {
            int quad = (k * (N / 4) + q) * Packets::threads() + row.column / N;
            store(to + 4 * quad,
                  Vector<float, 4>{sums[k][4 * q], sums[k][4 * q + 1], sums[k][4 * q + 2], sums[k][4 * q + 3]});
        }
    }
}

template <int ROW_THREADS, int N, int K, int FULL, bool KEEP, class T, class S, class W>
__global__ void __launch_bounds__(ROW_THREADS == WARP ? BLOCK
                                  : KEEP              ? MOST_KEPT_THREADS
                                                      : MOST_THREADS,
                                  1) layer_norm_backward_kernel(Backward<T, S, W> p) {
    SHARED_ARRAY(float, scratch, 4 * WARP);
    int64_t worker = first_row<ROW_THREADS>(), workers = (int64_t)gridDim.x * block_rows<ROW_THREADS>();
    using Row = Packets<ROW_THREADS, N, FULL>;
    Vector<float, N> dweight[K] = {}, dbias[K] = {};
    int parity = 0;  // one barrier a row: a warp may write the next row's sums while another still reads this one's
    for (int64_t n = worker; n < p.N; n += workers, parity ^= 1)
        backward_row<K, KEEP>(p, n, Row(n, p.C), scratch + parity * 2 * WARP, dweight, dbias);
    Row first(0, p.C);
    if (p.dweight) store_sums(p.dweight + worker * p.stride, first, dweight);
    if (p.dbias) store_sums(p.dbias + worker * p.stride, first, dbias);
}

constexpr int SUM_WARPS = 8;

struct Sums {
    Global<const float> rows[2];  // of dweight and dbias, a row a worker
    Out<any> out[2];
    int64_t workers;
    int C, stride, row_threads, quads;  // how a row lies: see store_sums; no row_threads where it lies in order
};

// The workers' rows added up, four columns a lane: each warp adds every SUM_WARPS-th row, then these sums are added.
template <int WHICH>
DEVICE void sum_rows(const Sums& p, Shared<float> sums) {
    int quad = (int)(blockIdx.x * WARP + threadIdx.x % WARP), warp = (int)threadIdx.x / WARP;
    if (!p.out[WHICH]) return;
    Vector<float, 4> sum = {};
    if (4 * quad < p.stride) {
        UNROLL_BY4
        for (int row = warp; row < (int)p.workers; row += SUM_WARPS)
            sum = add(sum, load<4>(p.rows[WHICH] + ((int64_t)row * p.stride + 4 * quad)));
    }
    sum = sum_over_warps<SUM_WARPS>(sum, sums);
    if (warp != 0) return;
    int column = 4 * quad;
    if (p.row_threads) {
        int packet = quad / p.row_threads;
        column = (packet / p.quads * p.row_threads + quad % p.row_threads) * 4 * p.quads + packet % p.quads * 4;
    }
    UNROLL
    for (int j = 0; j < 4; ++j)
        if (4 * quad < p.stride && column + j < p.C) store_floats(p.out[WHICH], column + j, Vector<float, 1>{sum[j]});
}

__global__ void __launch_bounds__(SUM_WARPS* WARP) layer_norm_sum_kernel(Sums p) {
    SHARED_ARRAY(float, sums, SUM_WARPS * WARP * 4);
    if (blockIdx.y == 0) sum_rows<0>(p, sums);
    else sum_rows<1>(p, sums);
}

int64_t workers_of(int64_t N, Tile tile) {
    int64_t most = (int64_t)device().processors * WARPS_A_PROCESSOR * WARP / tile.row_threads;
    int64_t wanted = (N + ROWS_A_WORKER - 1) / ROWS_A_WORKER, a_block = rows_a_block(tile);
    int64_t workers = wanted < most ? wanted : most;
    return (workers + a_block - 1) / a_block * a_block;
}

template <int ROW_THREADS, int N, int K, int FULL, bool KEEP, class T, class S, class W>
void launch_with(const LayerNormBackwardCuda& p, Tile tile, void* stream) {
    int64_t workers = workers_of(p.N, tile);
    int stride = N == 1 ? ((int)p.C + 3) / 4 * 4 : tile.packets * tile.row_threads * N;
    float* sums[2] = {p.dweight.data ? p.partial : nullptr,
                      p.dbias.data ? p.partial + (p.dweight.data ? workers * stride : 0) : nullptr};
    Backward<T, S, W> b{input<T>(p.dy),  input<S>(p.dtotal),
                        input<S>(p.x),   input<W>(p.weight),
                        p.mean,          p.rstd,
                        output<S>(p.dx), sums[0],
                        sums[1],         p.N,
                        (int)p.C,        1 / (float)p.C,
                        stride};
    if (workers > 0)
        launch({"layer_norm_backward", workers / rows_a_block(tile), block_of(tile), 0, stream},
               layer_norm_backward_kernel<ROW_THREADS, N, K, FULL, KEEP, T, S, W>, b);
    if (!p.dweight.data && !p.dbias.data) return;
    Sums s{{sums[0], sums[1]},
           {output<any>(p.dweight), output<any>(p.dbias)},
           workers,
           (int)p.C,
           stride,
           N == 1 ? 0 : tile.row_threads,
           N / 4};
    launch({"layer_norm_sum", Grid((stride / 4 + WARP - 1) / WARP, 2), SUM_WARPS * WARP, 0, stream},
           layer_norm_sum_kernel, s);
}

template <int N, class T, class S, class W>
void launch_kept(const LayerNormBackwardCuda& p, Tile tile, void* stream) {
    constexpr int MOST = KEPT_COLUMNS<S>;
    int columns = tile.packets * N;
    // Twice as many threads are taken where half of them do not suffice, so that long rows need more than half of MOST.
    if (tile.row_threads > WARP && columns <= MOST - 8)
        launch_with<0, N, (MOST - 8) / N, (MOST - 16) / N, true, T, S, W>(p, tile, stream);
    else if (tile.row_threads > WARP) launch_with<0, N, MOST / N, (MOST - 8) / N, true, T, S, W>(p, tile, stream);
    else if (columns <= 8) launch_with<WARP, N, 8 / N, 0 / N, true, T, S, W>(p, tile, stream);
    else if (columns <= 16) launch_with<WARP, N, 16 / N, 8 / N, true, T, S, W>(p, tile, stream);
    else if (columns <= 24) launch_with<WARP, N, 24 / N, 16 / N, true, T, S, W>(p, tile, stream);
    else if constexpr (MOST > 24) launch_with<WARP, N, 32 / N, 24 / N, true, T, S, W>(p, tile, stream);
}

template <int N, class T, class S, class W>
void launch_tile(const LayerNormBackwardCuda& p, void* stream) {
    constexpr int K = READ_TWICE_COLUMNS / N;
    if constexpr (!std::is_same_v<T, any>) {
        Tile tile = tile_of(p.C, N, KEPT_COLUMNS<S>);
        if (tile.row_threads <= MOST_KEPT_THREADS) return launch_kept<N, T, S, W>(p, tile, stream);
    } else if (p.C <= WARP * READ_TWICE_COLUMNS) {
        return launch_with<WARP, N, K, 0, false, T, S, W>(p, {WARP, K}, stream);
    }
    launch_with<MOST_THREADS, N, K, 0, false, T, S, W>(p, {MOST_THREADS, K}, stream);
}

}  // namespace

// No instance has fewer threads for a row, and so more workers, than one of two bytes an element; none pads a row by
// more than three packets a thread of a row's threads.
int64_t layer_norm_partial_floats(int64_t N, int64_t C) {
    int64_t most = 0;
    for (Tile tile : {tile_of(C, 8, KEPT_COLUMNS<bf16>), Tile{WARP, 4}, Tile{MOST_THREADS, 4}}) {
        int64_t stride = std::max((int64_t)tile.packets * tile.row_threads * 8, (C + 3) / 4 * 4);
        most = std::max(most, workers_of(N, tile) * stride);
    }
    return most;
}

void layer_norm_backward_cuda(const LayerNormBackwardCuda& p, void* stream) {
    bool typed = p.dx.type == p.x.type && (!p.dtotal.data || p.dtotal.type == p.x.type);
    with_types(p.dy.type, p.x.type, p.weight.data ? p.weight.type : p.x.type, typed, p.C,
               {p.dy, p.dtotal, p.x, p.weight, {p.dx.data, p.dx.type}},
               [&]<class T, class S, class W, int N>() { launch_tile<N, T, S, W>(p, stream); });
}

}  // namespace gptkernels
