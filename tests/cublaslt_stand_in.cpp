// The functions of cuBLASLt that gptkernels/ops/mlp/cublaslt.py calls, on the CPU, as NVIDIA's documentation has them:
// D = epilogue(op(A) op(B)), matrices column by column, sums exact to double. What a call may not ask for is refused.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

enum Status { SUCCESS = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum Type { FLOAT = 0, HALF = 2, BFLOAT = 14 };
enum Epilogue { BIAS_PART = 4, BGRAD_PART = 16, GELU_AUX = 160, DGELU = 192 };

struct Product {
    int32_t transposed_a = 0, transposed_b = 0, epilogue = 1;
    char* bias = nullptr;
    char* aux = nullptr;
    int64_t aux_stride = 0;
};

struct Matrix {
    int type;
    uint64_t rows, columns;
    int64_t stride;
};

struct Found {
    uint64_t algorithm[8];
    size_t workspace;
    int status;
    float waves;
    int reserved[4];
};

const uint64_t ALGORITHM = 4711;
const size_t WORKSPACE = 1 << 20;

double load(const void* at, int type, int64_t i) {
    if (type == HALF) return static_cast<double>(static_cast<const _Float16*>(at)[i]);
    uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(at)[i]) << 16;
    float number;
    std::memcpy(&number, &bits, 4);
    return number;
}

void store(void* at, int type, int64_t i, double value) {
    if (type == HALF) {
        static_cast<_Float16*>(at)[i] = static_cast<_Float16>(value);
        return;
    }
    float number = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &number, 4);
    static_cast<uint16_t*>(at)[i] = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

const double SLOPE = std::sqrt(2 / M_PI), CUBE = 0.044715;

double gelu(double x) { return 0.5 * x * (1 + std::tanh(SLOPE * (x + CUBE * x * x * x))); }

double gelu_slope(double x) {
    double t = std::tanh(SLOPE * (x + CUBE * x * x * x));
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * SLOPE * (1 + 3 * CUBE * x * x);
}

bool fits(const Matrix& m, uint64_t rows, uint64_t columns) {
    return rows && columns && m.rows == rows && m.columns == columns && m.stride >= static_cast<int64_t>(rows) &&
           (m.type == HALF || m.type == BFLOAT);
}

bool aligned(const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; }

}  // namespace

extern "C" {

const char* cublasLtGetStatusString(int status) { return status == INVALID_VALUE ? "invalid value" : "not supported"; }

int cublasLtCreate(void** handle) {
    *handle = new int;
    return SUCCESS;
}

int cublasLtMatmulDescCreate(void** made, int compute, int scale) {
    if (compute != 68 || scale != FLOAT) return NOT_SUPPORTED;
    *made = new Product;
    return SUCCESS;
}

int cublasLtMatmulDescDestroy(void* product) {
    delete static_cast<Product*>(product);
    return SUCCESS;
}

int cublasLtMatmulDescSetAttribute(void* product, int attribute, const void* value, size_t bytes) {
    Product* p = static_cast<Product*>(product);
    void* places[] = {nullptr,      nullptr,  nullptr, &p->transposed_a, &p->transposed_b, nullptr,       nullptr,
                      &p->epilogue, &p->bias, nullptr, nullptr,          &p->aux,          &p->aux_stride};
    size_t sizes[] = {0, 0, 0, 4, 4, 0, 0, 4, 8, 0, 0, 8, 8};
    if (attribute < 0 || attribute > 12 || !places[attribute] || sizes[attribute] != bytes) return INVALID_VALUE;
    std::memcpy(places[attribute], value, bytes);
    return SUCCESS;
}

int cublasLtMatrixLayoutCreate(void** made, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    *made = new Matrix{type, rows, columns, stride};
    return SUCCESS;
}

int cublasLtMatrixLayoutDestroy(void* matrix) {
    delete static_cast<Matrix*>(matrix);
    return SUCCESS;
}

int cublasLtMatmulPreferenceCreate(void** made) {
    *made = new uint64_t(0);  // no workspace, unless asked for
    return SUCCESS;
}

int cublasLtMatmulPreferenceDestroy(void* preference) {
    delete static_cast<uint64_t*>(preference);
    return SUCCESS;
}

int cublasLtMatmulPreferenceSetAttribute(void* preference, int attribute, const void* value, size_t bytes) {
    if (attribute != 1 || bytes != 8) return INVALID_VALUE;
    std::memcpy(preference, value, bytes);
    return SUCCESS;
}

// The one algorithm, which is told by its first number, takes a mebibyte.
int cublasLtMatmulAlgoGetHeuristic(const void* handle, const void*, const void*, const void*, const void*, const void*,
                                   const void* preference, int wanted, Found* found, int* count) {
    if (!handle || wanted != 1) return INVALID_VALUE;
    *count = *static_cast<const uint64_t*>(preference) >= WORKSPACE;
    if (*count) *found = {{ALGORITHM}, WORKSPACE, SUCCESS, 1.0f, {}};
    return SUCCESS;
}

int cublasLtMatmul(const void* handle, const void* product, const float* alpha, const void* a, const void* a_layout,
                   const void* b, const void* b_layout, const float* beta, const void*, const void*, void* d,
                   const void* d_layout, const uint64_t* algorithm, const void* workspace, size_t bytes, const void*) {
    if (!handle || *algorithm != ALGORITHM || !workspace || bytes < WORKSPACE) return INVALID_VALUE;
    const Product& p = *static_cast<const Product*>(product);
    const Matrix &A = *static_cast<const Matrix*>(a_layout), &B = *static_cast<const Matrix*>(b_layout),
                 &D = *static_cast<const Matrix*>(d_layout);
    uint64_t m = D.rows, n = D.columns, k = B.rows;
    bool forward = (p.epilogue & ~BIAS_PART) == GELU_AUX, backward = (p.epilogue & ~BGRAD_PART) == DGELU;
    bool bias = p.epilogue & (forward ? BIAS_PART : BGRAD_PART);
    if ((!forward && !backward) || p.transposed_b || *alpha != 1 || *beta != 0) return NOT_SUPPORTED;
    if (!fits(A, p.transposed_a ? k : m, p.transposed_a ? m : k) || !fits(B, k, n) || !fits(D, m, n) ||
        A.type != D.type || B.type != D.type)
        return INVALID_VALUE;
    if (p.aux_stride % 8 || p.aux_stride < static_cast<int64_t>(m) || bias != (p.bias != nullptr)) return INVALID_VALUE;
    if (!aligned(a) || !aligned(b) || !aligned(d) || !aligned(p.aux) || !aligned(p.bias)) return INVALID_VALUE;

    std::vector<double> sums(m, 0.0);
    for (uint64_t j = 0; j < n; ++j) {
        for (uint64_t i = 0; i < m; ++i) {
            double x = 0;
            for (uint64_t l = 0; l < k; ++l) {
                x += load(a, A.type, p.transposed_a ? i * A.stride + l : l * A.stride + i) *
                     load(b, B.type, j * B.stride + l);
            }
            int64_t at = j * p.aux_stride + i;
            if (forward) {
                if (bias) x += load(p.bias, D.type, i);
                store(p.aux, D.type, at, x);
                x = gelu(x);
            } else {
                x *= gelu_slope(load(p.aux, D.type, at));
                sums[i] += x;
            }
            store(d, D.type, j * D.stride + i, x);
        }
    }
    for (uint64_t i = 0; backward && bias && i < m; ++i) store(p.bias, D.type, i, sums[i]);
    return SUCCESS;
}
}
