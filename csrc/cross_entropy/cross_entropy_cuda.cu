// Cross-entropy of rows of logits, their gradients in their place.
//
//   loss = logsumexp(x) - x[target];   x <- scale (softmax(x) - onehot(target))
//
// A block owns a row and reads it twice, in packets of 16 bytes. The first pass keeps a running maximum and a running
// sum of exponentials for each thread (Milakov and Gimelshein 2018, arXiv 1805.02867), rescaled once in GROUP packets;
// the second takes another exponential. Where only the loss is wanted there is no second pass.
// Bytes a row: V elements in, V in again (from L2) and V out. Two exponentials a logit keep the MUFU unit, 16 a clock,
// about as busy as the memory; the products around it take 10 times as long.
// The maximum is subtracted before the exponent is scaled: one FMA for both would lose digits of a float32 loss.
// Deterministic: one block a row, sums in fixed order.
#include "common/convert.cuh"
#include "common/reduce.cuh"
#include "cross_entropy/cross_entropy_cuda.h"

namespace gptkernels {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / WARP;
constexpr float LOG2E = 1.4426950408889634f;
// Below every logit, and finite: a thread that has seen none has the sum 0 x 2^0, not NaN.
constexpr float LOWEST = -3.0e38f;

template <class T>
struct Rows {
    Global<T> logits;
    Global<const int64_t> targets, counts;
    Global<float> losses;
    int V, stride;
    int64_t ignore_index;
    bool mean;
};

// Packets that are loaded together: 32 logits a thread.
template <class T>
constexpr int GROUP = 32 / PACKET<T>;

// A thread's running maximum and the sum of exponentials below it.
struct Softmax {
    float maximum, sum;
};

// COUNT packets from a column on, THREADS packets apart; with MASKED, -inf from V on.
template <int COUNT, bool MASKED, class T, int N = PACKET<T>>
DEVICE void load_logits(Global<T> row, int column, int V, Vector<float, N> (&x)[COUNT]) {
    Vector<T, N> raw[COUNT];
    UNROLL
    for (int i = 0; i < COUNT; ++i) raw[i] = load<N>(row + (column + i * THREADS * N));
    UNROLL
    for (int i = 0; i < COUNT; ++i) {
        x[i] = to_floats(raw[i]);
        UNROLL
        for (int j = 0; j < N; ++j)
            if (MASKED && column + i * THREADS * N + j >= V) x[i][j] = -INFINITY;
    }
}

template <int COUNT, bool MASKED, class T>
DEVICE void update(Softmax& s, Global<T> row, int column, int V) {
    constexpr int N = PACKET<T>;
    Vector<float, N> x[COUNT];
    load_logits<COUNT, MASKED>(row, column, V, x);
    float maximum = s.maximum, sum = 0;
    UNROLL
    for (int i = 0; i < COUNT; ++i) {
        UNROLL
        for (int j = 0; j < N; ++j) maximum = fmaxf(maximum, x[i][j]);
    }
    UNROLL
    for (int i = 0; i < COUNT; ++i) {
        UNROLL
        for (int j = 0; j < N; ++j) sum += exp2_approx((x[i][j] - maximum) * LOG2E);
    }
    s.sum = s.sum * exp2_approx((s.maximum - maximum) * LOG2E) + sum;
    s.maximum = maximum;
}

template <int COUNT, bool MASKED, class T>
DEVICE void store_gradients(Global<T> row, int column, int V, float maximum, float factor, float scale, int target) {
    constexpr int N = PACKET<T>;
    Vector<float, N> x[COUNT];
    load_logits<COUNT, MASKED>(row, column, V, x);
    UNROLL
    for (int i = 0; i < COUNT; ++i) {
        int first = column + i * THREADS * N;
        UNROLL
        for (int j = 0; j < N; ++j) x[i][j] = exp2_approx((x[i][j] - maximum) * LOG2E) * factor;
        if (target >= first && target < first + N) {
            UNROLL
            for (int j = 0; j < N; ++j)
                if (first + j == target) x[i][j] -= scale;
        }
        store_floats(row, first, x[i]);
    }
}

// The whole row's maximum and sum, from all threads'.
DEVICE Softmax row_softmax(Softmax s, Shared<float> maxima, Shared<float> sums) {
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    float maximum = warp_max(s.maximum);
    if (lane == 0) maxima[warp] = maximum;
    __syncthreads();
    maximum = warp_max(lane < WARPS ? (float)maxima[lane] : LOWEST);
    return {maximum, sum_of_warps(warp_sum(s.sum * exp2_approx((s.maximum - maximum) * LOG2E)), sums, WARPS)};
}

template <class T, bool GRADIENT>
__global__ void __launch_bounds__(THREADS) cross_entropy_kernel(Rows<T> p) {
    SHARED_ARRAY(float, maxima, WARP);
    SHARED_ARRAY(float, sums, WARP);
    constexpr int N = PACKET<T>, STEP = THREADS * N, GROUP_STEP = GROUP<T> * STEP;
    int n = (int)blockIdx.x, begin = (int)threadIdx.x * N;
    Global<T> row = p.logits + (int64_t)n * p.stride;
    int64_t target = p.targets[n];
    if (target == p.ignore_index || target < 0 || target >= p.V) {
        if (threadIdx.x == 0) p.losses[n] = 0.0f;
        if (GRADIENT)
            for (int column = begin; column < p.stride; column += STEP) store(row + column, Vector<T, N>{});
        return;
    }
    float target_logit = to_float((T)row[target]);  // before the first barrier, after which it is overwritten
    Softmax s{LOWEST, 0};
    int whole = p.V / GROUP_STEP * GROUP_STEP;
    for (int column = begin; column < whole; column += GROUP_STEP) update<GROUP<T>, false>(s, row, column, p.V);
    for (int column = whole + begin; column < p.V; column += STEP) update<1, true>(s, row, column, p.V);
    s = row_softmax(s, maxima, sums);
    if (threadIdx.x == 0) p.losses[n] = s.maximum - target_logit + logf(s.sum);
    if (!GRADIENT) return;
    float scale = p.mean ? 1.0f / (float)p.counts[0] : 1.0f, factor = scale / s.sum;
    for (int column = begin; column < whole; column += GROUP_STEP)
        store_gradients<GROUP<T>, false>(row, column, p.V, s.maximum, factor, scale, (int)target);
    for (int column = whole + begin; column < p.stride; column += STEP)
        store_gradients<1, true>(row, column, p.V, s.maximum, factor, scale, (int)target);
}

// One block counts all targets.
__global__ void __launch_bounds__(THREADS)
    cross_entropy_count_kernel(Global<const int64_t> targets, int64_t N, int64_t V, int64_t ignore_index,
                               Global<int64_t> counts) {
    SHARED_ARRAY(int, totals, 2 * WARPS);
    int used = 0, wrong = 0;
    for (int64_t n = threadIdx.x; n < N; n += THREADS) {
        int64_t target = targets[n];
        used += target != ignore_index;
        wrong += target != ignore_index && (target < 0 || target >= V);
    }
    UNROLL
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        used += __shfl_xor_sync(FULL_WARP, used, distance);
        wrong += __shfl_xor_sync(FULL_WARP, wrong, distance);
    }
    int warp = (int)threadIdx.x / WARP;
    if (threadIdx.x % WARP == 0) {
        totals[warp] = used;
        totals[WARPS + warp] = wrong;
    }
    __syncthreads();
    if (threadIdx.x >= 2) return;
    int64_t total = 0;
    for (int w = 0; w < WARPS; ++w) total += (int)totals[(int)threadIdx.x * WARPS + w];
    counts[threadIdx.x] = total;
}

template <class T>
void launch_rows(const CrossEntropyRows& p, void* stream) {
    Rows<T> rows{
        static_cast<T*>(p.logits.data), p.targets, p.counts, p.losses, (int)p.V, (int)p.stride, p.ignore_index, p.mean};
    Launch l{"cross_entropy", p.N, THREADS, 0, stream};
    if (p.gradient) launch(l, cross_entropy_kernel<T, true>, rows);
    else launch(l, cross_entropy_kernel<T, false>, rows);
}

}  // namespace

void cross_entropy_count_cuda(const int64_t* targets, int64_t N, int64_t V, int64_t ignore_index, int64_t* counts,
                              void* stream) {
    launch({"cross_entropy_count", 1, THREADS, 0, stream}, cross_entropy_count_kernel, targets, N, V, ignore_index,
           counts);
}

void cross_entropy_rows_cuda(const CrossEntropyRows& p, void* stream) {
    if (p.N == 0) return;
    switch (p.logits.type) {
        case Type::FLOAT32:
            return launch_rows<float>(p, stream);
        case Type::BFLOAT16:
            return launch_rows<bf16>(p, stream);
        case Type::FLOAT16:
            return launch_rows<fp16>(p, stream);
    }
}

}  // namespace gptkernels
