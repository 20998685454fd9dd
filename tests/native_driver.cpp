// The CPU kernels without torch, for the sanitizers: every buffer has its exact size on the heap, every output starts
// as NaN, and every result is compared with plain loops in double. tests/test_native.py compiles and runs it.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "attention/attention_cpu.h"
#include "common/parallel.h"
#include "common/pool.h"
#include "common/workspace.h"
#include "cross_entropy/cross_entropy_cpu.h"
#include "layer_norm/layer_norm_cpu.h"
#include "linear/linear_cpu.h"
#include "mlp/mlp_cpu.h"

namespace gptkernels {

int64_t thread_count() { return 3; }

void parallel_run(int64_t threads, void (*body)(void* context, int64_t i), void* context) {
    std::vector<std::thread> pool;
    for (int64_t i = 0; i < threads; ++i) pool.emplace_back(body, context, i);
    for (std::thread& thread : pool) thread.join();
}

// Memory of exactly its size, which the pool's is not.
void* pool_take(size_t bytes) { return ::operator new(bytes, std::align_val_t(64)); }
void pool_give(void* data) { ::operator delete(data, std::align_val_t(64)); }

}  // namespace gptkernels

using namespace gptkernels;

namespace {

using Doubles = std::vector<double>;

int failures = 0, comparisons = 0;
uint64_t state = 1;

// Uniform in [-1, 1).
double uniform() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (double)(state >> 33) / (double)(1u << 30) - 1.0;
}

// Numbers of one dtype in a heap block of exactly their size.
struct Array {
    bool is_bf16;
    int64_t size;
    std::unique_ptr<char[]> bytes;

    Array(bool is_bf16, int64_t size) : is_bf16(is_bf16), size(size), bytes(new char[size * (is_bf16 ? 2 : 4)]) {
        for (int64_t i = 0; i < size; ++i) set(i, NAN);
    }
    void set(int64_t i, double x) {
        if (is_bf16) reinterpret_cast<bf16*>(bytes.get())[i] = narrow((float)x);
        else reinterpret_cast<float*>(bytes.get())[i] = (float)x;
    }
    double operator[](int64_t i) const {
        return is_bf16 ? widen(reinterpret_cast<const bf16*>(bytes.get())[i])
                       : reinterpret_cast<const float*>(bytes.get())[i];
    }
    void* data() { return bytes.get(); }
    float* floats() { return reinterpret_cast<float*>(bytes.get()); }
};

Array random_array(bool is_bf16, int64_t size) {
    Array x(is_bf16, size);
    for (int64_t i = 0; i < size; ++i) x.set(i, uniform());
    return x;
}

void compare(const std::string& name, const Array& found, const Doubles& wanted, bool rounded) {
    double tolerance = found.is_bf16 || rounded ? 0.03 : 2e-5, largest = 1;
    for (double x : wanted) largest = std::max(largest, std::fabs(x));
    ++comparisons;
    for (int64_t i = 0; i < (int64_t)wanted.size(); ++i) {
        if (std::fabs(found[i] - wanted[i]) <= tolerance * largest) continue;
        std::printf("%s[%lld] is %g, not %g\n", name.c_str(), (long long)i, found[i], wanted[i]);
        ++failures;
        return;
    }
}

// Philox4x32-10, one counter at a time: word `word` of its four.
uint32_t philox_word(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, int word) {
    uint32_t c[4] = {c0, c1, c2, c3}, k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        uint64_t a = (uint64_t)c[0] * 0xD2511F53u, b = (uint64_t)c[2] * 0xCD9E8D57u;
        uint32_t next[4] = {(uint32_t)(b >> 32) ^ c[1] ^ k0, (uint32_t)b, (uint32_t)(a >> 32) ^ c[3] ^ k1, (uint32_t)a};
        std::copy(next, next + 4, c);
    }
    return c[word];
}

void attention(int64_t B, int64_t H, int64_t T, int64_t S, int64_t D, bool is_bf16, double p) {
    Attention problem{B, H, T, S, D, 0.3f, (uint32_t)(p * 4294967296.0), (float)(1 / (1 - p)), 0x123456789abcull};
    // Token-major with a gap after each head's row, but none after the last one: the block ends where the data does.
    int64_t row = D + 3, size_q = std::max<int64_t>(0, B * T * H * row - 3),
            size_k = std::max<int64_t>(0, B * S * H * row - 3);
    Array q = random_array(is_bf16, size_q), k = random_array(is_bf16, size_k), v = random_array(is_bf16, size_k);
    Array dout = random_array(is_bf16, size_q), out(is_bf16, size_q), dq(is_bf16, size_q), dk(is_bf16, size_k),
          dv(is_bf16, size_k);
    Array stats(false, B * H * T * 2);
    auto heads = [&](Array& x, int64_t tokens) { return Heads{x.data(), is_bf16, tokens * H * row, row, H * row}; };
    attention_forward_cpu(problem, heads(q, T), heads(k, S), heads(v, S), heads(out, T), stats.floats());
    attention_backward_cpu(problem, heads(dout, T), heads(q, T), heads(k, S), heads(v, S), heads(out, T),
                           stats.floats(), heads(dq, T), heads(dk, S), heads(dv, S));

    auto at = [&](int64_t tokens, int64_t b, int64_t h, int64_t t) { return ((b * tokens + t) * H + h) * row; };
    Array* arrays[] = {&out, &dq, &dk, &dv};
    Doubles wanted[4];
    for (int n = 0; n < 4; ++n) {
        wanted[n].assign(arrays[n]->size, 0.0);
        for (int64_t i = 0; i < arrays[n]->size; ++i)
            if (i % row >= D) arrays[n]->set(i, std::isnan((*arrays[n])[i]) ? 0 : 1e9);  // the gaps are not written
    }
    for (int64_t b = 0; b < B; ++b)
        for (int64_t h = 0; h < H; ++h)
            for (int64_t i = 0; i < T; ++i) {
                int64_t seen = std::max<int64_t>(0, i + S - T + 1), iq = at(T, b, h, i);
                Doubles weights(seen), keep(seen), dweights(seen);
                double total = 0, delta = 0;
                for (int64_t j = 0; j < seen; ++j) {
                    double score = 0;
                    for (int64_t d = 0; d < D; ++d) score += q[iq + d] * k[at(S, b, h, j) + d];
                    total += weights[j] = std::exp(problem.scale * score);
                    uint32_t word = philox_word(problem.seed, (uint32_t)j / 4, (uint32_t)(i + S - T), (uint32_t)h,
                                                (uint32_t)b, j % 4);
                    keep[j] = word >= problem.drop_below ? problem.keep_scale : 0;
                }
                for (int64_t j = 0; j < seen; ++j) {
                    weights[j] /= total;
                    int64_t jk = at(S, b, h, j);
                    for (int64_t d = 0; d < D; ++d) {
                        wanted[0][iq + d] += weights[j] * keep[j] * v[jk + d];
                        wanted[3][jk + d] += weights[j] * keep[j] * dout[iq + d];
                        dweights[j] += keep[j] * dout[iq + d] * v[jk + d];
                    }
                    delta += weights[j] * dweights[j];
                }
                for (int64_t j = 0; j < seen; ++j)
                    for (int64_t d = 0; d < D; ++d) {
                        double dscore = weights[j] * (dweights[j] - delta) * problem.scale;
                        wanted[1][iq + d] += dscore * k[at(S, b, h, j) + d];
                        wanted[2][at(S, b, h, j) + d] += dscore * q[iq + d];
                    }
            }
    const char* names[] = {"out", "dq", "dk", "dv"};
    for (int n = 0; n < 4; ++n) compare(std::string("attention ") + names[n], *arrays[n], wanted[n], is_bf16);
}

void layer_norm(int64_t N, int64_t C, bool x_bf16, bool residual_bf16, bool y_bf16, bool has_residual,
                bool has_vectors) {
    bool total_bf16 = x_bf16 && (!has_residual || residual_bf16);
    Array x = random_array(x_bf16, N * C), residual = random_array(residual_bf16, N * C), total(total_bf16, N * C);
    Array weight = random_array(x_bf16, C), bias = random_array(x_bf16, C), y(y_bf16, N * C);
    Array mean(false, N), rstd(false, N), dy = random_array(y_bf16, N * C), dtotal = random_array(total_bf16, N * C);
    Array dx(total_bf16, N * C), dweight(x_bf16, C), dbias(x_bf16, C);
    auto numbers = [](Array& a, bool exists) { return Numbers{exists ? a.data() : nullptr, a.is_bf16}; };
    auto results = [](Array& a, bool exists) { return MutableNumbers{exists ? a.data() : nullptr, a.is_bf16}; };
    Numbers no_residual{nullptr, x_bf16};
    layer_norm_forward_cpu({N, C, 1e-3f, numbers(x, true), has_residual ? numbers(residual, true) : no_residual,
                            numbers(weight, has_vectors), numbers(bias, has_vectors), results(y, true),
                            has_residual ? results(total, true) : MutableNumbers{nullptr, x_bf16}, mean.floats(),
                            rstd.floats()});
    Array& sum = has_residual ? total : x;
    layer_norm_backward_cpu({N, C, numbers(dy, true), numbers(dtotal, has_residual), numbers(sum, true),
                             numbers(weight, has_vectors), mean.floats(), rstd.floats(), results(dx, true),
                             results(dweight, has_vectors), results(dbias, has_vectors)});

    Doubles wanted_y(N * C), wanted_dx(N * C), wanted_dweight(C), wanted_dbias(C);
    for (int64_t n = 0; n < N; ++n) {
        double m = 0, variance = 0, a = 0, b = 0;
        for (int64_t c = 0; c < C; ++c) m += sum[n * C + c] / (double)C;
        for (int64_t c = 0; c < C; ++c) variance += std::pow(sum[n * C + c] - m, 2) / (double)C;
        double r = 1 / std::sqrt(variance + 1e-3);
        for (int64_t c = 0; c < C; ++c) {
            double xhat = (sum[n * C + c] - m) * r, w = has_vectors ? weight[c] : 1;
            wanted_y[n * C + c] = xhat * w + (has_vectors ? bias[c] : 0);
            a += dy[n * C + c] * w / (double)C;
            b += dy[n * C + c] * w * xhat / (double)C;
            wanted_dweight[c] += dy[n * C + c] * xhat;
            wanted_dbias[c] += dy[n * C + c];
        }
        for (int64_t c = 0; c < C; ++c) {
            double xhat = (sum[n * C + c] - m) * r, w = has_vectors ? weight[c] : 1;
            wanted_dx[n * C + c] = r * (dy[n * C + c] * w - a - xhat * b) + (has_residual ? dtotal[n * C + c] : 0);
        }
    }
    compare("layer_norm y", y, wanted_y, x_bf16);
    compare("layer_norm dx", dx, wanted_dx, x_bf16);
    if (!has_vectors) return;
    compare("layer_norm dweight", dweight, wanted_dweight, x_bf16);
    compare("layer_norm dbias", dbias, wanted_dbias, x_bf16);
}

// Element (i, k) of a factor of `count` rows or columns, as Factor describes it.
double element(const Array& x, const Factor& f, int64_t i, int64_t k) {
    return x[f.k_contiguous ? i * f.ld + k : k * f.ld + i];
}

Doubles product(int64_t M, int64_t N, int64_t K, const Array& a, const Factor& fa, const Array& b, const Factor& fb,
                const Array* bias) {
    Doubles c(M * N);
    for (int64_t i = 0; i < M; ++i)
        for (int64_t j = 0; j < N; ++j) {
            for (int64_t k = 0; k < K; ++k) c[i * N + j] += element(a, fa, i, k) * element(b, fb, j, k);
            if (bias) c[i * N + j] += (*bias)[j];
        }
    return c;
}

Factor factor(Array& x, int64_t count, int64_t K, bool k_contiguous) {
    return {x.data(), k_contiguous ? K : count, x.is_bf16, k_contiguous};
}

// What stands for another library's product (common/gemm.h): plain loops.
void loops(int64_t M, int64_t N, int64_t K, const Factor& a, const Factor& b, bf16* c, int64_t ldc) {
    auto element = [](const Factor& f, int64_t i, int64_t k) {
        return widen(static_cast<const bf16*>(f.data)[f.k_contiguous ? i * f.ld + k : k * f.ld + i]);
    };
    for (int64_t i = 0; i < M; ++i)
        for (int64_t j = 0; j < N; ++j) {
            float sum = 0;
            for (int64_t k = 0; k < K; ++k) sum += element(a, i, k) * element(b, j, k);
            c[i * ldc + j] = narrow(sum);
        }
}

void matmul(int64_t M, int64_t N, int64_t K, int kinds) {
    bool a_bf16 = kinds & 1, b_bf16 = kinds & 2, a_along = kinds & 4, b_along = kinds & 8;
    Array a = random_array(a_bf16, M * K), b = random_array(b_bf16, N * K), bias = random_array(b_bf16, N),
          c(a_bf16, M * N);
    Factor fa = factor(a, M, K, a_along), fb = factor(b, N, K, b_along);
    gemm(M, N, K, fa, fb, a_bf16, Output{c.data(), N, a_bf16, bias.data(), b_bf16});
    compare("gemm", c, product(M, N, K, a, fa, b, fb, &bias), a_bf16);
    Array sums(b_bf16, K);
    linear_bias_gradient(a.data(), a_bf16, M, K, sums.data(), b_bf16);
    Doubles wanted(K);
    for (int64_t i = 0; i < M * K; ++i) wanted[i % K] += a[i];
    compare("bias gradient", sums, wanted, a_bf16);
}

void mlp(int64_t N, int64_t F, int64_t K, bool is_bf16, bool tanh) {
    Array a = random_array(is_bf16, N * K), b = random_array(is_bf16, F * K), bias = random_array(is_bf16, F);
    Array h(is_bf16, N * F), g(is_bf16, N * F), dh(is_bf16, N * F), again(is_bf16, N * F);
    Factor fa = factor(a, N, K, true), fb = factor(b, F, K, true);
    gemm_gelu(N, F, K, fa, fb, is_bf16, tanh, bias.data(), is_bf16, {h.data(), F, is_bf16}, {g.data(), F, is_bf16});
    gemm_gelu_backward(N, F, K, fa, fb, is_bf16, tanh, {h.data(), F, is_bf16}, {dh.data(), F, is_bf16},
                       {again.data(), F, is_bf16});
    Doubles wanted_h = product(N, F, K, a, fa, b, fb, &bias), wanted_dh = product(N, F, K, a, fa, b, fb, nullptr),
            wanted_g = wanted_h;
    auto gelu = [&](double x) {
        if (!tanh) return x / 2 * (1 + std::erf(x / std::sqrt(2.0)));
        return x / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    };
    for (int64_t i = 0; i < N * F; ++i) {
        wanted_g[i] = gelu(wanted_h[i]);
        wanted_dh[i] *= (gelu(h[i] + 1e-5) - gelu(h[i] - 1e-5)) / 2e-5;
    }
    compare("mlp h", h, wanted_h, is_bf16);
    compare("mlp g", g, wanted_g, is_bf16);
    compare("mlp dh", dh, wanted_dh, is_bf16);
    compare("mlp g again", again, wanted_g, is_bf16);
}

void cross_entropy(int64_t N, int64_t C, int64_t V, bool is_bf16, bool with_gradients) {
    Array x = random_array(is_bf16, N * C), weight = random_array(is_bf16, V * C), dx(is_bf16, N * C),
          dweight(false, V * C);
    std::unique_ptr<int64_t[]> targets(new int64_t[N]);
    for (int64_t n = 0; n < N; ++n) targets[n] = n % 4 == 1 ? -100 : n * 7 % V;
    CrossEntropy p{N, C, V, factor(x, N, C, true), factor(weight, V, C, true), is_bf16, targets.get(), -100, false};
    CrossEntropyGradients gradients{Output{dx.data(), C, is_bf16}, dweight.floats()};
    if (first_bad_target(p) != -1) std::printf("a good target is called bad\n"), ++failures;
    Array loss(false, 1);
    loss.set(0, cross_entropy_cpu(p, with_gradients ? &gradients : nullptr));
    Doubles wanted_loss(1), wanted_dx(N * C), wanted_dweight(V * C);
    for (int64_t n = 0; n < N; ++n) {
        if (targets[n] < 0) continue;
        Doubles e(V);
        double total = 0;
        for (int64_t v = 0; v < V; ++v) {
            for (int64_t c = 0; c < C; ++c) e[v] += x[n * C + c] * weight[v * C + c];
            if (v == targets[n]) wanted_loss[0] -= e[v];
            total += e[v] = std::exp(e[v]);
        }
        wanted_loss[0] += std::log(total);
        for (int64_t v = 0; v < V; ++v)
            for (int64_t c = 0; c < C; ++c) {
                double dlogit = e[v] / total - (v == targets[n]);
                wanted_dx[n * C + c] += dlogit * weight[v * C + c];
                wanted_dweight[v * C + c] += dlogit * x[n * C + c];
            }
    }
    compare("cross_entropy loss", loss, wanted_loss, is_bf16);
    if (!with_gradients) return;
    compare("cross_entropy dx", dx, wanted_dx, is_bf16);
    compare("cross_entropy dweight", dweight, wanted_dweight, is_bf16);
}

// In a thread of its own, whose workspaces are fresh: what a larger case before it left must not hide an overrun.
void alone(const std::function<void()>& run) { std::thread(run).join(); }

}  // namespace

int main() {
    constexpr int64_t ATTENTION[][5] = {{1, 1, 1, 1, 1},   {2, 3, 5, 5, 7},    {1, 2, 65, 65, 33}, {1, 1, 64, 64, 8},
                                        {1, 1, 3, 70, 65}, {1, 1, 70, 3, 129}, {1, 1, 9, 66, 16},  {1, 1, 130, 130, 4},
                                        {1, 1, 4, 0, 5},   {0, 1, 2, 2, 4}};
    for (auto& [B, H, T, S, D] : ATTENTION)
        for (int kinds = 0; kinds < 4; ++kinds)
            alone([&] { attention(B, H, T, S, D, kinds & 1, kinds & 2 ? 0.3 : 0); });
    for (auto [N, C] : {std::pair<int64_t, int64_t>{1, 1}, {3, 7}, {70, 17}, {2, 100}, {0, 5}})
        for (int kinds = 0; kinds < 32; ++kinds)
            alone([&] { layer_norm(N, C, kinds & 1, kinds & 2, kinds & 4, kinds & 8, kinds & 16); });
    constexpr int64_t MATMUL[][3] = {{1, 1, 1},   {5, 3, 2}, {13, 33, 17}, {1, 65, 385}, {49, 2, 769},
                                     {2, 390, 5}, {3, 4, 0}, {0, 3, 4},    {130, 3, 5},  {100, 400, 800}};
    constexpr int64_t HEADS[][3] = {{1, 1, 1}, {5, 3, 7}, {9, 20, 33}, {7, 2, 65}, {0, 3, 4}};
    for (OutsideProduct product : {(OutsideProduct) nullptr, (OutsideProduct)loops}) {
        set_outside_product(product);
        for (auto& [M, N, K] : MATMUL)
            for (int kinds = 0; kinds < 16; ++kinds) alone([&] { matmul(M, N, K, kinds); });
        for (auto [N, F] : {std::pair<int64_t, int64_t>{1, 1}, {7, 19}, {13, 40}})
            for (int kinds = 0; kinds < 4; ++kinds) alone([&] { mlp(N, F, 21, kinds & 1, kinds & 2); });
        for (auto& [N, C, V] : HEADS)
            for (int kinds = 0; kinds < 4; ++kinds) alone([&] { cross_entropy(N, C, V, kinds & 1, kinds & 2); });
    }
    // More than a piece of them, cut along either side; bf16 and fp32 factors in both layouts.
    for (int kinds : {1, 7, 9, 15}) {
        alone([&] { matmul(2, 600001, 1, kinds); });
        alone([&] { matmul(600001, 2, 1, kinds); });
    }
    std::printf("%d comparisons, %d failures\n", comparisons, failures);
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
