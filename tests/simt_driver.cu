// Small kernels for tests/test_simt.py, each right as it stands and wrong in one way when it is given a bug's name:
//   driver KERNEL [BUG]
// prints what the kernel computed ("right" or "wrong"), each rule it broke, and its bank conflicts and excess sectors.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "common/device.cuh"
#include "common/reduce.cuh"

using namespace gptkernels;

namespace {

template <class T>
std::vector<T> array_of(int count) {
    std::vector<T> x(count);
    simt::add_buffer(x.data(), (int64_t)(x.size() * sizeof(T)));
    return x;
}

float random_number() { return (float)(std::rand() % 2001 - 1000) / 1000; }

// Reverses 256 numbers through shared memory.
__global__ void reverse(Global<const float> x, Global<float> y, bool no_barrier, int count) {
    SHARED_ARRAY(float, tile, 256);
    int t = (int)threadIdx.x;
    for (int i = t; i < count; i += (int)blockDim.x) tile[i % 256] = x[i];
    if (!no_barrier) __syncthreads();
    for (int i = t; i < 256; i += (int)blockDim.x) y[i] = tile[255 - i];
}

bool run_reverse(const std::string& bug) {
    auto x = array_of<float>(256), y = array_of<float>(256);
    for (float& value : x) value = random_number();
    launch({"reverse", 1, 128, 0, nullptr}, reverse, x.data(), y.data(), bug == "missing barrier",
           bug == "off by one" ? 257 : 256);
    return std::equal(x.begin(), x.end(), y.rbegin());
}

// A lane's number from its neighbour, through shared memory of its warp.
__global__ void rotate(Global<float> y, bool no_barrier) {
    SHARED_ARRAY(float, numbers, WARP);
    int lane = (int)threadIdx.x;
    numbers[lane] = (float)lane;
    if (!no_barrier) __syncwarp();
    y[lane] = numbers[(lane + 1) % WARP];
}

bool run_rotate(const std::string& bug) {
    auto y = array_of<float>(WARP);
    launch({"rotate", 1, WARP, 0, nullptr}, rotate, y.data(), bug == "missing barrier");
    return y[3] == 4 && y[31] == 0;
}

// The same mistakes one at a time.
__global__ void broken(Global<const float> x, Global<float> y, int bug) {
    SHARED_ARRAY(float, numbers, 64);
    int t = (int)threadIdx.x;
    if (bug == 1) y[t] = numbers[t];                 // never written
    if (bug == 2) numbers[t + 1] = 1;                // the last thread's is past the end
    if (bug == 3 && t < 40) __syncthreads();         // not by all
    if (bug == 4 && t % 32 < 5) y[t] = warp_sum(1);  // not by the whole warp
    if (bug == 5) y[t] = load<4>(x + t)[0];          // 16 bytes from every fourth on
    if (bug == 6) y[t - 1] = 1;                      // one before the first
    if (bug == 7) numbers[0] = (float)t;             // by all threads
    if (bug == 8) {                                  // in two places
        if (t < 32) __syncthreads();
        else __syncthreads();
    }
}

const char* const BROKEN[] = {"",           "uninitialised", "past shared",   "divergent barrier", "divergent warp",
                              "misaligned", "before global", "all write one", "two barriers"};

bool run_broken(const std::string& bug) {
    auto x = array_of<float>(128), y = array_of<float>(64);
    int which = 0;
    while (bug != BROKEN[which]) ++which;
    launch({"broken", 1, 64, 0, nullptr}, broken, x.data(), y.data(), which);
    return true;
}

// c = a b^T for 64 x 64 tiles of a and b, K = 64, in two stages of 32 columns: cp.async, swizzled rows, ldmatrix, mma.
struct Product {
    Global<const uint16_t> a, b;
    Global<float> c;
    bool no_wait, wrong_fragment, unswizzled, no_last_barrier;
};

template <class T>
__global__ void __launch_bounds__(128) product(Product p) {
    constexpr int K = 32, STAGE = 64 * K;
    Shared<uint16_t> a = dynamic_shared<uint16_t>(0, 2 * STAGE), b = dynamic_shared<uint16_t>(4 * STAGE, 2 * STAGE);
    int t = (int)threadIdx.x, warp = t / WARP, lane = t % WARP;
    // Two rows share the 128 bytes of all banks, so the row's upper bits choose the packet's place.
    auto place = [&](int row, int packet) { return row * K + 8 * (p.unswizzled ? packet : packet ^ (row / 2 % 4)); };
    auto fetch = [&](int stage) {
        for (int i = t; i < 64 * 4; i += 128) {
            int row = i / 4, packet = i % 4;
            cp_async16(a + stage * STAGE + place(row, packet), p.a + row * 64 + stage * K + packet * 8);
            cp_async16(b + stage * STAGE + place(row, packet), p.b + row * 64 + stage * K + packet * 8);
        }
        cp_async_commit();
    };
    fetch(0);
    fetch(1);
    float acc[8][4] = {};
    for (int stage = 0; stage < 2; ++stage) {
        if (stage == 0) cp_async_wait<1>();
        else if (!p.no_wait) cp_async_wait<0>();
        if (stage == 0 || !p.no_last_barrier) __syncthreads();
        for (int k = 0; k < K / 16; ++k) {
            uint32_t fa[4], fb[4];
            ldmatrix_x4(fa, a + stage * STAGE + place(warp * 16 + lane % 16, 2 * k + lane / 16));
            for (int j = 0; j < 8; j += 2) {
                ldmatrix_x4(fb, b + stage * STAGE + place(j * 8 + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
                mma_m16n8k16<T>(acc[j], fa, fb[0], p.wrong_fragment ? fb[2] : fb[1]);
                mma_m16n8k16<T>(acc[j + 1], fa, p.wrong_fragment ? fb[1] : fb[2], fb[3]);
            }
        }
    }
    for (int j = 0; j < 8; ++j)
        for (int half = 0; half < 2; ++half)
            store(p.c + (warp * 16 + lane / 4 + 8 * half) * 64 + j * 8 + lane % 4 * 2,
                  Vector<float, 2>{acc[j][2 * half], acc[j][2 * half + 1]});
}

template <class T>
bool run_product(const std::string& bug) {
    auto a = array_of<uint16_t>(64 * 64), b = array_of<uint16_t>(64 * 64);
    auto c = array_of<float>(64 * 64);
    for (uint16_t& bits : a) bits = from_float<T>(random_number()).bits;
    for (uint16_t& bits : b) bits = from_float<T>(random_number()).bits;
    Product p{a.data(),
              b.data(),
              c.data(),
              bug == "missing wait",
              bug == "wrong fragment",
              bug == "unswizzled",
              bug == "missing barrier"};
    launch({"product", 1, 128, 2 * 2 * 64 * 32 * 2, nullptr}, product<T>, p);
    double worst = 0;
    for (int i = 0; i < 64; ++i)
        for (int j = 0; j < 64; ++j) {
            double sum = 0;
            for (int k = 0; k < 64; ++k) sum += (double)to_float(T{a[i * 64 + k]}) * (double)to_float(T{b[j * 64 + k]});
            worst = std::max(worst, std::abs(sum - c[i * 64 + j]));
        }
    return worst < 64 * 0x1p-23;
}

// One mma or ldmatrix with the place of every element taken from the PTX ISA's tables the other way round: from a row
// and column to the lane, the register and the half that hold it.
struct Place {
    int lane, index, half;
};
Place of_a16(int row, int k) { return {row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2}; }
Place of_b16(int k, int column) { return {column * 4 + k % 8 / 2, k / 8, k % 2}; }
Place of_a32(int row, int k) { return {row % 8 * 4 + k % 4, row / 8 + k / 4 * 2, 0}; }
Place of_b32(int k, int column) { return {column * 4 + k % 4, k / 4, 0}; }
Place of_c(int row, int column) { return {row % 8 * 4 + column / 2, row / 8 * 2 + column % 2, 0}; }

enum class Kind { BF16, FP16, FP16_K8, TF32 };

template <Kind KIND>
__global__ void one_mma(Global<const uint32_t> a, Global<const uint32_t> b, Global<float> c) {
    int lane = (int)threadIdx.x;
    uint32_t fa[4], fb[2];
    float acc[4];
    for (int i = 0; i < 4; ++i) fa[i] = a[lane * 4 + i];
    for (int i = 0; i < 4; ++i) acc[i] = c[lane * 4 + i];
    for (int i = 0; i < 2; ++i) fb[i] = b[lane * 2 + i];
    if (KIND == Kind::BF16) mma_m16n8k16<bf16>(acc, fa, fb[0], fb[1]);
    if (KIND == Kind::FP16) mma_m16n8k16<fp16>(acc, fa, fb[0], fb[1]);
    if (KIND == Kind::FP16_K8) mma_m16n8k8(acc, fa[0], fa[1], fb[0]);
    if (KIND == Kind::TF32) mma_m16n8k8_tf32(acc, fa, fb[0], fb[1]);
    for (int i = 0; i < 4; ++i) c[lane * 4 + i] = acc[i];
}

template <Kind KIND>
bool run_mma(const std::string&) {
    constexpr int K = KIND == Kind::BF16 || KIND == Kind::FP16 ? 16 : 8;
    auto a = array_of<uint32_t>(128), b = array_of<uint32_t>(64);
    auto c = array_of<float>(128);
    float a_of[16][16], b_of[16][8], c_of[16][8];
    auto put = [&](uint32_t& word, Place place, float& value) {
        value = random_number();
        uint32_t bits = KIND == Kind::TF32   ? to_tf32(value)
                        : KIND == Kind::BF16 ? from_float<bf16>(value).bits
                                             : from_float<fp16>(value).bits;
        value = KIND == Kind::TF32   ? __uint_as_float(bits)
                : KIND == Kind::BF16 ? to_float(bf16{(uint16_t)bits})
                                     : to_float(fp16{(uint16_t)bits});
        word |= bits << (16 * place.half);
    };
    for (int k = 0; k < K; ++k) {
        for (int row = 0; row < 16; ++row) {
            Place place = KIND == Kind::TF32 ? of_a32(row, k) : of_a16(row, k);
            put(a[place.lane * 4 + place.index], place, a_of[row][k]);
        }
        for (int column = 0; column < 8; ++column) {
            Place place = KIND == Kind::TF32 ? of_b32(k, column) : of_b16(k, column);
            put(b[place.lane * 2 + place.index], place, b_of[k][column]);
        }
    }
    auto c_at = [&](int row, int column) -> float& {
        Place place = of_c(row, column);
        return c[place.lane * 4 + place.index];
    };
    for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 8; ++column) c_of[row][column] = c_at(row, column) = random_number();
    launch({"one_mma", 1, WARP, 0, nullptr}, one_mma<KIND>, a.data(), b.data(), c.data());
    bool right = true;
    for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 8; ++column) {
            double sum = c_of[row][column];
            for (int k = 0; k < K; ++k) sum += (double)a_of[row][k] * b_of[k][column];
            right &= std::abs(sum - c_at(row, column)) <= 0x1p-23 * std::abs(sum);
        }
    return right;
}

// Four 8x8 matrices, row r of matrix m at row 8 m + r of a 32 x 8 array.
template <bool TRANSPOSED>
__global__ void load_matrices(Global<const uint16_t> x, Global<uint32_t> y) {
    SHARED_ARRAY(uint16_t, tile, 256);
    int lane = (int)threadIdx.x;
    store(tile + lane * 8, load<8>(x + lane * 8));
    __syncwarp();
    uint32_t r[4], two[2], one;
    if constexpr (TRANSPOSED) {
        ldmatrix_x4_trans(r, tile + lane * 8);
        ldmatrix_x2_trans(two, tile + lane % 16 * 8);
        ldmatrix_x1_trans(one, tile + lane % 8 * 8);
    } else {
        ldmatrix_x4(r, tile + lane * 8);
        ldmatrix_x2(two, tile + lane % 16 * 8);
        ldmatrix_x1(one, tile + lane % 8 * 8);
    }
    for (int m = 0; m < 4; ++m) y[lane * 7 + m] = r[m];
    for (int m = 0; m < 2; ++m) y[lane * 7 + 4 + m] = two[m];
    y[lane * 7 + 6] = one;
}

template <bool TRANSPOSED>
bool run_ldmatrix(const std::string&) {
    auto x = array_of<uint16_t>(256);
    auto y = array_of<uint32_t>(32 * 7);
    for (int i = 0; i < 256; ++i) x[i] = (uint16_t)(i * 257 + 3);
    launch({"load_matrices", 1, WARP, 0, nullptr}, load_matrices<TRANSPOSED>, x.data(), y.data());
    bool right = true;
    for (int m = 0; m < 4; ++m)
        for (int row = 0; row < 8; ++row)
            for (int column = 0; column < 8; ++column) {
                int major = TRANSPOSED ? column : row, minor = TRANSPOSED ? row : column;
                auto found = [&](int at) {
                    return (uint16_t)(y[(major * 4 + minor / 2) * 7 + at] >> (minor % 2 * 16));
                };
                uint16_t wanted = x[(8 * m + row) * 8 + column];
                right &= found(m) == wanted && (m >= 2 || found(4 + m) == wanted) && (m >= 1 || found(6) == wanted);
            }
    return right;
}

// Votes, shuffles, atomics and a copy that is zero beyond its first bytes.
__global__ void warp_functions(Global<const float> x, Global<float> y) {
    SHARED_ARRAY(float, tile, 128);
    int lane = (int)threadIdx.x;
    cp_async16(tile + lane * 4, x + lane * 4, lane < 8 ? 16 : lane == 8 ? 4 : 0);
    cp_async_commit();
    cp_async_wait<0>();
    Vector<float, 4> packet = load<4>(tile + lane * 4);
    y[lane] = packet[0] + packet[1] + packet[2] + packet[3];
    y[32 + lane] = __shfl_sync(FULL_WARP, (float)lane, 5);
    y[64 + lane] = __shfl_down_sync(FULL_WARP, (float)lane, 3);
    y[96 + lane] = (float)__ballot_sync(FULL_WARP, lane % 8 == 0);
    y[128 + lane] = __any_sync(FULL_WARP, lane == 40) + 2 * __all_sync(FULL_WARP, lane < 32);
    y[160 + lane] = warp_max((float)(lane ^ 21)) + warp_sum((float)lane);
    atomicAdd(y + 192, (float)lane);
}

bool run_warp_functions(const std::string&) {
    auto x = array_of<float>(128), y = array_of<float>(193);
    for (float& value : x) value = random_number();
    launch({"warp_functions", 1, WARP, 0, nullptr}, warp_functions, x.data(), y.data());
    bool right = y[192] == 496;
    for (int lane = 0; lane < 32; ++lane) {
        float* v = &x[lane * 4];
        float sum = lane < 8 ? v[0] + v[1] + v[2] + v[3] : lane == 8 ? v[0] : 0;
        right &= y[lane] == sum && y[32 + lane] == 5 && y[64 + lane] == (lane < 29 ? lane + 3 : lane);
        right &= y[96 + lane] == (float)0x01010101 && y[128 + lane] == 2 && y[160 + lane] == 31 + 496;
    }
    return right;
}

}  // namespace

int main(int count, char** arguments) {
    std::string name = arguments[1], bug = count > 2 ? arguments[2] : "";
    if (count > 3) simt::set_schedule((uint64_t)std::atoi(arguments[3]));
    struct {
        const char* name;
        bool (*run)(const std::string&);
    } const kernels[] = {{"reverse", run_reverse},
                         {"rotate", run_rotate},
                         {"broken", run_broken},
                         {"product bf16", run_product<bf16>},
                         {"product fp16", run_product<fp16>},
                         {"mma bf16", run_mma<Kind::BF16>},
                         {"mma fp16", run_mma<Kind::FP16>},
                         {"mma fp16 k8", run_mma<Kind::FP16_K8>},
                         {"mma tf32", run_mma<Kind::TF32>},
                         {"ldmatrix", run_ldmatrix<false>},
                         {"ldmatrix trans", run_ldmatrix<true>},
                         {"warp functions", run_warp_functions}};
    bool right = false;
    try {
        for (auto& kernel : kernels)
            if (name == kernel.name) right = kernel.run(bug);
    } catch (const std::runtime_error& error) {
        std::printf("raised: %s\n", error.what());
    }
    std::printf("%s\n", right ? "right" : "wrong");
    for (int kind = 0; kind < simt::VIOLATIONS; ++kind)
        if (simt::report().violations[kind]) std::printf("broken: %s\n", simt::name_of((simt::Violation)kind));
    for (auto& [_, kernel] : simt::report().kernels)
        for (const simt::Counter& c : kernel.counters)
            if (c.wavefronts > c.ideal_wavefronts) std::printf("bank conflicts\n");
}
