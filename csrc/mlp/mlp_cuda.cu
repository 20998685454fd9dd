// GELU-MLP on products of our own: both GELU passes live in the epilogues beside them, on fp32 sums in registers. What
// goes beside other libraries' products is in gelu_pass_cuda.cu.
//
// Forward: the product x W_fc^T leaves h = (.) + b_fc (for the backward) and g = gelu(h); the one on g is plain.
// Backward: the product dy W_proj leaves dh = (.) * gelu'(h), g again from the same exponential (so that g need not be
// kept from the forward), and the sums of dh over each warp's rows, whose sums are db_fc. The other products are plain.
// Bytes beside a plain product's: M N elements more written forward; backward as many more read and more written.
// g and dh are factors of the next products: their rows are padded with zeros to whole packets.
#include "common/launch_product.cuh"
#include "common/reduce.cuh"
#include "mlp/gelu.cuh"
#include "mlp/mlp_cuda.h"

namespace gptkernels {
namespace {

constexpr int LEAST_PIECE = 32;  // rows of which a warp makes one row of partial sums, at least

template <class T, bool TANH>
struct StoreGelu {
    static constexpr int WIDTH = PACKET<T>;
    struct Columns {
        int col;
        Vector<float, WIDTH> bias;
    };

    In<any> bias;
    Global<T> h, g;
    int N, ld;
    bool packets, bias_packets;

    DEVICE Columns begin(int col) const {
        if (!bias) return {col, {}};
        return {col, load_columns<WIDTH>(bias, 0, 0, col, N, bias_packets)};
    }
    DEVICE void row(Columns& columns, int row, Vector<float, WIDTH> v) const {
        UNROLL
        for (int j = 0; j < WIDTH; ++j) v[j] += columns.bias[j];
        store_columns(h, row, N, columns.col, N, packets, v);
        UNROLL
        for (int j = 0; j < WIDTH; ++j) v[j] = gelu<TANH, false>(v[j]).value;
        store_factor(g, row, ld, columns.col, N, v);
    }
    DEVICE void end(Columns&, int) const {}
};

template <class T, bool TANH>
struct StoreGeluGradient {
    static constexpr int WIDTH = PACKET<T>;
    struct Columns {
        int col;
        Vector<float, WIDTH> sums;
    };

    Global<const T> h;
    Global<T> dh, g;
    Global<float> partial;
    int N, ld;
    bool packets;

    DEVICE Columns begin(int col) const { return {col, {}}; }
    DEVICE void row(Columns& columns, int row, Vector<float, WIDTH> v) const {
        Vector<float, WIDTH> at = load_columns<WIDTH>(h, row, N, columns.col, N, packets);
        UNROLL
        for (int j = 0; j < WIDTH; ++j) {
            GeluAt gelu_at = gelu<TANH, true>(at[j]);
            at[j] = gelu_at.value;
            v[j] *= gelu_at.slope;
            columns.sums[j] += v[j];
        }
        store_factor(dh, row, ld, columns.col, N, v);
        store_factor(g, row, ld, columns.col, N, at);
    }
    // Lanes 8 and 16 apart have the same columns of other rows.
    DEVICE void end(Columns& columns, int piece) const {
        if (!partial) return;
        UNROLL
        for (int j = 0; j < WIDTH; ++j) {
            columns.sums[j] += __shfl_xor_sync(FULL_WARP, columns.sums[j], 8);
            columns.sums[j] += __shfl_xor_sync(FULL_WARP, columns.sums[j], 16);
        }
        // Two lanes share eight columns, so that each access is of whole sectors.
        int lane = threadIdx.x % WARP, half = lane / 8 * 4;
        if (half >= WIDTH) return;
        Vector<float, 4> four;
        UNROLL
        for (int j = 0; j < 4; ++j) four[j] = half == 0 ? columns.sums[j] : columns.sums[j + WIDTH - 4];
        store_columns(partial, piece, N, columns.col + half, N, N % 4 == 0, four);
    }
};

}  // namespace

void gemm_gelu_cuda(const DeviceProduct& p, Array bias, bool tanh, void* h, void* g, void* stream) {
    auto launch_gelu = [&]<bool TANH>() {
        auto make = [&]<class T>() {
            return StoreGelu<T, TANH>{input<any>(bias),           static_cast<T*>(h),
                                      static_cast<T*>(g),         (int)p.N,
                                      (int)padded(p.N, p.type),   in_packets(h, p.N, sizeof(T)),
                                      in_packets(bias.data, 0, 0)};
        };
        launch_product<true, true>("gemm_gelu", p, make, stream);
    };
    tanh ? launch_gelu.operator()<true>() : launch_gelu.operator()<false>();
}

int64_t gelu_partial_rows(int64_t M) {
    int64_t pieces = (M + LEAST_PIECE - 1) / LEAST_PIECE;
    return pieces + column_sums_partial_rows(pieces);
}

void gemm_gelu_backward_cuda(const DeviceProduct& p, const void* h, bool tanh, void* dh, void* g, float* partial,
                             MutableArray db, void* stream) {
    auto launch_gradient = [&]<bool TANH>() {
        auto make = [&]<class T>() {
            return StoreGeluGradient<T, TANH>{static_cast<const T*>(h),
                                              static_cast<T*>(dh),
                                              static_cast<T*>(g),
                                              db.data ? partial : nullptr,
                                              (int)p.N,
                                              (int)padded(p.N, p.type),
                                              in_packets(h, p.N, sizeof(T))};
        };
        return launch_product<true, false>("gemm_gelu_backward", p, make, stream);
    };
    int piece = tanh ? launch_gradient.operator()<true>() : launch_gradient.operator()<false>();
    if (!db.data) return;
    int64_t pieces = (p.M + piece - 1) / piece;
    column_sums_cuda({partial, Type::FLOAT32}, pieces, p.N, partial + pieces * p.N, db, stream);
}

}  // namespace gptkernels
