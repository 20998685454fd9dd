// GELU-MLP: both GELU passes live in the epilogues of the products beside them, on fp32 sums that are in the L1 cache.
//
// Forward: product 1 leaves h (for the backward) and g = gelu(h); product 2 is a plain one on g.
// Backward: the product dy W_proj leaves dh = (.) * gelu'(h) and, from the same exponential, g again: so g need not be
// saved from the forward to the backward, at the price of no pass over memory.
#include "mlp/mlp_cpu.h"

#include <algorithm>

#include "common/math.h"

namespace gptkernels {
namespace {

struct Gelus {
    const void* bias;
    bool bias_is_bf16;
    Matrix h, dh, g;
};

template <class T>
T* at(const Matrix& m, int64_t row, int64_t col) {
    return static_cast<T*>(m.data) + row * m.ld + col;
}

template <class T, bool TANH>
void store_gelu(const void* context, const Tile& t) {
    const Gelus& c = *static_cast<const Gelus*>(context);
    for (int j = 0; j < t.cols; j += W) {
        int n = std::min(W, t.cols - j);
        vf bias{};
        if (c.bias) {
            bias = c.bias_is_bf16 ? load(static_cast<const bf16*>(c.bias) + t.col + j, n)
                                  : load(static_cast<const float*>(c.bias) + t.col + j, n);
        }
        for (int i = 0; i < t.rows; ++i) {
            vf h = load(t.values + i * t.ld + j) + bias;
            store(at<T>(c.h, t.row + i, t.col + j), h, n);
            store(at<T>(c.g, t.row + i, t.col + j), gelu<TANH>(h).value, n);
        }
    }
}

template <class T, bool TANH>
void store_gelu_gradient(const void* context, const Tile& t) {
    const Gelus& c = *static_cast<const Gelus*>(context);
    for (int j = 0; j < t.cols; j += W) {
        int n = std::min(W, t.cols - j);
        for (int i = 0; i < t.rows; ++i) {
            Gelu g = gelu<TANH>(load(at<T>(c.h, t.row + i, t.col + j), n));
            vf dh = load(t.values + i * t.ld + j) * g.slope;
            store(at<T>(c.dh, t.row + i, t.col + j), dh, n);
            store(at<T>(c.g, t.row + i, t.col + j), g.value, n);
        }
    }
}

}  // namespace

void gemm_gelu(int64_t N, int64_t F, int64_t K, Factor a, Factor b, bool bf16_product, bool tanh, const void* bias,
               bool bias_is_bf16, Matrix h, Matrix g) {
    Gelus context{bias, bias_is_bf16, h, {}, g};
    Epilogue epilogue = h.is_bf16 ? (tanh ? store_gelu<bf16, true> : store_gelu<bf16, false>)
                                  : (tanh ? store_gelu<float, true> : store_gelu<float, false>);
    gemm(N, F, K, a, b, bf16_product, epilogue, &context);
}

void gemm_gelu_backward(int64_t N, int64_t F, int64_t K, Factor a, Factor b, bool bf16_product, bool tanh, Matrix h,
                        Matrix dh, Matrix g) {
    Gelus context{nullptr, false, h, dh, g};
    Epilogue epilogue = h.is_bf16 ? (tanh ? store_gelu_gradient<bf16, true> : store_gelu_gradient<bf16, false>)
                                  : (tanh ? store_gelu_gradient<float, true> : store_gelu_gradient<float, false>);
    gemm(N, F, K, a, b, bf16_product, epilogue, &context);
}

}  // namespace gptkernels
