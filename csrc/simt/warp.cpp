// Functions of a whole warp, from the PTX ISA's definitions of what each lane brings and gets.
#include "common/device.cuh"

namespace gptkernels::simt {

uint32_t fp16_bits(float x) {
    uint32_t u = std::bit_cast<uint32_t>(x), sign = u >> 16 & 0x8000, size = u & 0x7fffffff;
    if (size > 0x7f800000) return 0x7fff;          // NaN
    if (size >= 0x477ff000) return sign | 0x7c00;  // 65520 and more round to infinity
    if (size < 0x38800000) {                       // below 2^-14: a multiple of 2^-24, which adding 0.5 rounds to
        float shifted = std::bit_cast<float>(size) + 0.5f;
        return sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000);
    }
    return sign | (((size + 0xfff + (size >> 13 & 1)) >> 13) - (112 << 10));
}

float fp16_value(uint32_t bits) {
    uint32_t sign = (bits & 0x8000) << 16, size = bits & 0x7fff;
    if (size >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | size << 13);
    // As a float's exponent and mantissa the number is 2^-112 times what it should be, denormal ones too.
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(std::bit_cast<float>(size << 13) * 0x1p112f));
}

void check_mask(unsigned mask, int line) {
    if (mask != FULL_WARP)
        violation(Violation::DIVERGENT_WARP, "the mask in line %d is %08x: only a whole warp is emulated", line, mask);
}

uint32_t shuffle(uint32_t value, int source, unsigned mask, int line) {
    check_mask(mask, line);
    struct Operands {
        uint32_t value, result;
        int source;
    } mine{value, 0, source};
    warp_collective(
        Class::SHUFFLE,
        [](void* const(&lanes)[LANES]) {
            auto of = [&](int lane) { return static_cast<Operands*>(lanes[lane]); };
            for (int lane = 0; lane < LANES; ++lane) of(lane)->result = of(of(lane)->source & 31)->value;
        },
        &mine, line);
    return mine.result;
}

uint32_t ballot(bool vote, unsigned mask, int line) {
    check_mask(mask, line);
    struct Operands {
        bool vote;
        uint32_t result;
    } mine{vote, 0};
    warp_collective(
        Class::SHUFFLE,
        [](void* const(&lanes)[LANES]) {
            uint32_t votes = 0;
            for (int lane = 0; lane < LANES; ++lane)
                votes |= (uint32_t)static_cast<Operands*>(lanes[lane])->vote << lane;
            for (void* lane : lanes) static_cast<Operands*>(lane)->result = votes;
        },
        &mine, line);
    return mine.result;
}

namespace {

struct MmaOperands {
    Product product;
    float* acc;
    const uint32_t* a;
    uint32_t b[2];
};

// A quarter of a row of b or of the product, as wide as every 64-bit CPU's registers are.
typedef double Quarter __attribute__((vector_size(16), may_alias));

float half_of(Product product, uint32_t packed, int high) {
    uint32_t bits = high ? packed >> 16 : packed & 0xffff;
    return product == Product::BF16_K16 ? std::bit_cast<float>(bits << 16) : fp16_value(bits);
}

float tf32_value(uint32_t bits) { return std::bit_cast<float>(bits & ~0x1fffu); }

// Fragments of 16-bit elements. Lane 4g + t holds pairs: register r of a in row g (+ 8 for odd r), columns 2t, 2t + 1
// (+ 8 from r = 2 on); register r of b in column g, rows 2t, 2t + 1 (+ 8 for r = 1).
void gather16(void* const (&lanes)[LANES], Product product, int K, double (&a)[16][16], double (&b)[16][8]) {
    for (int lane = 0; lane < LANES; ++lane) {
        auto& o = *static_cast<MmaOperands*>(lanes[lane]);
        int g = lane / 4, t = lane % 4;
        for (int r = 0; r < K / 4; ++r)
            for (int i = 0; i < 2; ++i) a[g + 8 * (r % 2)][2 * t + i + 8 * (r / 2)] = half_of(product, o.a[r], i);
        for (int r = 0; r < K / 8; ++r)
            for (int i = 0; i < 2; ++i) b[2 * t + i + 8 * r][g] = half_of(product, o.b[r], i);
    }
}

// Fragments of tf32: register r of a is row g (+ 8 for odd r), column t (+ 4 from r = 2 on); of b row t (+ 4 for r =
// 1), column g.
void gather_tf32(void* const (&lanes)[LANES], double (&a)[16][16], double (&b)[16][8]) {
    for (int lane = 0; lane < LANES; ++lane) {
        auto& o = *static_cast<MmaOperands*>(lanes[lane]);
        int g = lane / 4, t = lane % 4;
        for (int r = 0; r < 4; ++r) a[g + 8 * (r % 2)][t + 4 * (r / 2)] = tf32_value(o.a[r]);
        for (int r = 0; r < 2; ++r) b[t + 4 * r][g] = tf32_value(o.b[r]);
    }
}

void run_mma(void* const (&lanes)[LANES]) {
    Product product = static_cast<MmaOperands*>(lanes[0])->product;
    int K = product == Product::BF16_K16 || product == Product::FP16_K16 ? 16 : 8;
    double a[16][16], sum[16][8];
    alignas(Quarter) double b[16][8];
    if (product == Product::TF32_K8) gather_tf32(lanes, a, b);
    else gather16(lanes, product, K, a, b);
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 8; j += 4) {
            Quarter total[2] = {};
            for (int k = 0; k < K; ++k)
                for (int h = 0; h < 2; ++h) total[h] += a[i][k] * *reinterpret_cast<const Quarter*>(&b[k][j + 2 * h]);
            memcpy(&sum[i][j], total, sizeof total);
        }
    for (int lane = 0; lane < LANES; ++lane) {
        float* acc = static_cast<MmaOperands*>(lanes[lane])->acc;
        for (int i = 0; i < 4; ++i)
            acc[i] = (float)((double)acc[i] + sum[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2]);
    }
}

struct LdmatrixOperands {
    uint32_t* registers;
    int matrices;
    bool transposed;
    uint32_t address, begin, end;
};

void run_ldmatrix(void* const (&lanes)[LANES]) {
    auto of = [&](int lane) -> LdmatrixOperands& { return *static_cast<LdmatrixOperands*>(lanes[lane]); };
    uint32_t addresses[LANES], begins[LANES], ends[LANES];
    for (int lane = 0; lane < LANES; ++lane) {
        addresses[lane] = of(lane).address;
        begins[lane] = of(lane).begin;
        ends[lane] = of(lane).end;
    }
    int matrices = of(0).matrices;
    if (!ldmatrix_access(addresses, begins, ends, matrices)) return;
    for (int m = 0; m < matrices; ++m) {
        uint16_t element[8][8];
        for (int row = 0; row < 8; ++row) memcpy(element[row], shared_memory() + addresses[8 * m + row], 16);
        for (int lane = 0; lane < LANES; ++lane) {
            int g = lane / 4, t = lane % 4;
            bool by_column = of(lane).transposed;
            uint32_t low = by_column ? element[2 * t][g] : element[g][2 * t];
            uint32_t high = by_column ? element[2 * t + 1][g] : element[g][2 * t + 1];
            of(lane).registers[m] = low | high << 16;
        }
    }
}

}  // namespace

void mma(Product product, float* acc, const uint32_t* a, uint32_t b0, uint32_t b1, int line) {
    MmaOperands mine{product, acc, a, {b0, b1}};
    warp_collective(Class::MMA, run_mma, &mine, line);
}

void ldmatrix(uint32_t* registers, int matrices, bool transposed, uint32_t address, uint32_t begin, uint32_t end,
              int line) {
    LdmatrixOperands mine{registers, matrices, transposed, address, begin, end};
    warp_collective(Class::LDMATRIX, run_ldmatrix, &mine, line);
}

}  // namespace gptkernels::simt
