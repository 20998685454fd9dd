// linear: y = x W^T + b, dx = dy W, dW = dy^T x, db = the column sums of dy. The products are in common/gemm_cuda.cuh
// and gemm_fp32.cuh; here are their plain epilogue, the copy of factors whose rows do not start on 16 bytes, and the
// sums.
//
// Bytes of a copy: the factor once read and once written. Of the sums: dy once read.
#include "common/launch_product.cuh"
#include "common/reduce.cuh"
#include "linear/linear_cuda.h"

namespace gptkernels {
namespace {

// C = sums + bias.
template <class Out>
struct StoreRows {
    static constexpr int WIDTH = PACKET<Out>;
    struct Columns {
        int col;
        Vector<float, WIDTH> bias;
    };

    In<any> bias;
    Global<Out> c;
    int N;
    bool packets, bias_packets;

    DEVICE Columns begin(int col) const {
        if (!bias) return {col, {}};
        return {col, load_columns<WIDTH>(bias, 0, 0, col, N, bias_packets)};
    }
    DEVICE void row(Columns& columns, int row, Vector<float, WIDTH> v) const {
        UNROLL
        for (int j = 0; j < WIDTH; ++j) v[j] += columns.bias[j];
        store_columns(c, row, N, columns.col, N, packets, v);
    }
    DEVICE void end(Columns&, int) const {}
};

template <class Out>
StoreRows<Out> store_rows(const DeviceProduct& p, Array bias, MutableArray c) {
    return {input<any>(bias), static_cast<Out*>(c.data), (int)p.N, in_packets(c.data, p.N, sizeof(Out)),
            in_packets(bias.data, 0, 0)};
}

template <bool A_ALONG_K, bool B_ALONG_K>
void launch_plain(const DeviceProduct& p, Array bias, MutableArray c, void* stream) {
    auto same = [&]<class T>() { return store_rows<T>(p, bias, c); };
    launch_product<A_ALONG_K, B_ALONG_K>("gemm", p, same, stream);
}

constexpr int COPY_THREADS = 256;

// A thread makes one packet.
template <class T>
__global__ void __launch_bounds__(COPY_THREADS)
    copy_rows_kernel(In<any> x, Global<T> y, int64_t rows, int64_t columns, int64_t ld, bool packets) {
    constexpr int N = PACKET<T>;
    int64_t packet = (int64_t)blockIdx.x * COPY_THREADS + threadIdx.x, row = packet / (ld / N);
    int col = (int)(packet % (ld / N)) * N;
    if (row < rows) store_floats(y, row * ld + col, load_columns<N>(x, row, columns, col, (int)columns, packets));
}

constexpr int SUM_WARPS = 8, SUM_ROWS = 256;

// Row blockIdx.x of y = the sums over `rows_each` rows of x, N columns a lane: each warp adds every SUM_WARPS-th row,
// then these sums are added.
template <int N>
__global__ void __launch_bounds__(SUM_WARPS* WARP)
    column_sums_kernel(In<any> x, Out<any> y, int64_t rows, int64_t rows_each, int columns) {
    SHARED_ARRAY(float, sums, SUM_WARPS * WARP * N);
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, col = ((int)blockIdx.y * WARP + lane) * N;
    int64_t first = (int64_t)blockIdx.x * rows_each, last = first + rows_each < rows ? first + rows_each : rows;
    Vector<float, N> sum = {};
    if (col < columns)
        for (int64_t row = first + warp; row < last; row += SUM_WARPS) {
            Vector<float, N> v = load_floats<N>(x, row * columns + col);
            UNROLL
            for (int j = 0; j < N; ++j) sum[j] += v[j];
        }
    sum = sum_over_warps<SUM_WARPS>(sum, sums);
    if (warp != 0 || col >= columns) return;
    store_floats(y, (int64_t)blockIdx.x * columns + col, sum);
}

void launch_sums(Array x, int64_t rows, int64_t columns, int64_t rows_each, MutableArray y, void* stream) {
    int64_t pieces = rows == 0 ? 1 : (rows + rows_each - 1) / rows_each;
    auto launch_width = [&](int n, auto kernel) {
        launch({"column_sums", Grid(pieces, (columns + n * WARP - 1) / (n * WARP)), SUM_WARPS * WARP, 0, stream},
               kernel, input<any>(x), output<any>(y), rows, rows_each, (int)columns);
    };
    bool packets = in_packets(x.data, columns, bytes_of(x.type)) && in_packets(y.data, columns, bytes_of(y.type));
    if (packets) launch_width(4, column_sums_kernel<4>);
    else launch_width(1, column_sums_kernel<1>);
}

}  // namespace

void gemm_cuda(const DeviceProduct& p, Array bias, MutableArray c, void* stream) {
    if (p.a.along_k && p.b.along_k) {
        launch_plain<true, true>(p, bias, c, stream);
    } else if (p.a.along_k) {
        launch_plain<true, false>(p, bias, c, stream);
    } else if (c.type == p.type) {
        launch_plain<false, false>(p, bias, c, stream);
    } else {
        auto wider = [&]<class T>() { return store_rows<float>(p, bias, c); };
        launch_product<false, false>("gemm", p, wider, stream);
    }
}

void copy_rows_cuda(Array x, int64_t rows, int64_t columns, MutableArray y, void* stream) {
    int64_t ld = padded(columns, y.type), packets = rows * ld * bytes_of(y.type) / 16;
    if (packets == 0) return;
    auto launch_type = [&]<class T>(T) {
        launch({"copy_rows", Grid((packets + COPY_THREADS - 1) / COPY_THREADS), COPY_THREADS, 0, stream},
               copy_rows_kernel<T>, input<any>(x), static_cast<T*>(y.data), rows, columns, ld,
               in_packets(x.data, columns, bytes_of(x.type)));
    };
    if (y.type == Type::FLOAT32) launch_type(0.0f);
    else if (y.type == Type::BFLOAT16) launch_type(bf16());
    else launch_type(fp16());
}

int64_t column_sums_partial_rows(int64_t rows) { return rows > SUM_ROWS ? (rows + SUM_ROWS - 1) / SUM_ROWS : 0; }

void column_sums_cuda(Array x, int64_t rows, int64_t columns, float* partial, MutableArray y, void* stream) {
    if (columns == 0) return;
    int64_t pieces = column_sums_partial_rows(rows);
    if (pieces == 0) return launch_sums(x, rows, columns, SUM_ROWS, y, stream);
    launch_sums(x, rows, columns, SUM_ROWS, {partial, Type::FLOAT32}, stream);
    launch_sums({partial, Type::FLOAT32}, pieces, columns, pieces, y, stream);
}

}  // namespace gptkernels
