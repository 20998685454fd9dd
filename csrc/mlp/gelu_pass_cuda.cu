// GELU beside a product that another library makes: a pass over h, element by element.
//
// Forward: g = gelu(h). Backward: dh = dg * gelu'(h) in dg's place, g again from the same exponential, and the sums of
// dh's columns, which are db_fc. A warp takes every WARPS-th row of a block's; lane by lane 16 bytes of neighbouring
// columns. Bytes: h in and g out; backward h and dg in, dh and g out.
#include "common/launch_product.cuh"
#include "common/reduce.cuh"
#include "mlp/gelu.cuh"
#include "mlp/mlp_cuda.h"

namespace gptkernels {
namespace {

constexpr int WARPS = 8, THREADS = WARPS * WARP;
constexpr int ROWS = 128;  // whose sums are one row of partial sums

template <class T, bool TANH, int N>
__global__ void __launch_bounds__(THREADS) gelu_kernel(Global<const T> h, Global<T> g, int64_t packets) {
    int64_t packet = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (packet >= packets) return;
    Vector<float, N> v = to_floats(load<N>(h + packet * N));
    UNROLL
    for (int j = 0; j < N; ++j) v[j] = gelu<TANH, false>(v[j]).value;
    store_floats(g, packet * N, v);
}

// 2 blocks a multiprocessor at least: for 4, which ptxas aims at by itself, the unrolled loop spills.
template <class T, bool TANH, int N>
__global__ void __launch_bounds__(THREADS, 2) gelu_backward_kernel(Global<const T> h, Global<T> dh, Global<T> g,
                                                                   Global<float> partial, int64_t rows, int columns) {
    SHARED_ARRAY(float, sums, THREADS* N);
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, col = ((int)blockIdx.y * WARP + lane) * N;
    int64_t first = (int64_t)blockIdx.x * ROWS, last = first + ROWS < rows ? first + ROWS : rows;
    Vector<float, N> sum = {};
    if (col < columns) {
        UNROLL_BY4
        for (int64_t row = first + warp; row < last; row += WARPS) {
            int64_t i = row * columns + col;
            Vector<float, N> at = to_floats(load<N>(h + i)), d = to_floats(load<N>(dh + i));
            UNROLL
            for (int j = 0; j < N; ++j) {
                GeluAt gelu_at = gelu<TANH, true>(at[j]);
                at[j] = gelu_at.value;
                d[j] *= gelu_at.slope;
                sum[j] += d[j];
            }
            store_floats(dh, i, d);
            store_floats(g, i, at);
        }
    }
    if (!partial) return;
    sum = sum_over_warps<WARPS>(sum, sums);
    if (warp != 0 || col >= columns) return;
    store(partial + (int64_t)blockIdx.x * columns + col, sum);
}

// make.operator()<T, TANH, N>() where h has rows of `columns` elements: whole packets where they fill 16 bytes.
template <class Make>
void with_types(Type type, bool tanh, bool packets, const Make& make) {
    auto with_gelu = [&]<class T, int N>() {
        tanh ? make.template operator()<T, true, N>() : make.template operator()<T, false, N>();
    };
    auto with_width = [&]<class T>() {
        packets ? with_gelu.template operator()<T, PACKET<T>>() : with_gelu.template operator()<T, 1>();
    };
    if (type == Type::FLOAT32) with_width.template operator()<float>();
    else if (type == Type::BFLOAT16) with_width.template operator()<bf16>();
    else with_width.template operator()<fp16>();
}

}  // namespace

void gelu_cuda(Array h, int64_t size, bool tanh, void* g, void* stream) {
    if (size == 0) return;
    with_types(h.type, tanh, in_packets(h.data, size, bytes_of(h.type)), [&]<class T, bool TANH, int N>() {
        int64_t packets = size / N;
        launch({"gelu", Grid((packets + THREADS - 1) / THREADS), THREADS, 0, stream}, gelu_kernel<T, TANH, N>,
               static_cast<const T*>(h.data), static_cast<T*>(g), packets);
    });
}

int64_t gelu_pass_partial_rows(int64_t rows) {
    int64_t pieces = (rows + ROWS - 1) / ROWS;
    return pieces + column_sums_partial_rows(pieces);
}

void gelu_backward_cuda(Array h, int64_t rows, int64_t columns, bool tanh, void* dh, void* g, float* partial,
                        MutableArray db, void* stream) {
    if (columns == 0) return;
    int64_t pieces = (rows + ROWS - 1) / ROWS;
    bool packets = in_packets(h.data, columns, bytes_of(h.type)) && in_packets(dh, columns, bytes_of(h.type));
    if (pieces)
        with_types(h.type, tanh, packets, [&]<class T, bool TANH, int N>() {
            launch({"gelu_backward", Grid(pieces, (columns + N * WARP - 1) / (N * WARP)), THREADS, 0, stream},
                   gelu_backward_kernel<T, TANH, N>, static_cast<const T*>(h.data), static_cast<T*>(dh),
                   static_cast<T*>(g), db.data ? partial : nullptr, rows, (int)columns);
        });
    if (db.data) column_sums_cuda({partial, Type::FLOAT32}, pieces, columns, partial + pieces * columns, db, stream);
}

}  // namespace gptkernels
