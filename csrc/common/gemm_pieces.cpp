// bf16 products by another library, handed to the epilogue piece by piece: for CPUs whose AMX tiles multiply bf16
// several times as fast as the dot products of gemm.cpp, since torch's library (oneDNN) has kernels for them.
//
// That library rounds C to bf16 before an epilogue sees it, where gemm.cpp hands over fp32 sums. Factors in fp32 are
// rounded beforehand, into a workspace. The sizes here follow from those of caches, none of them was measured.
#include <algorithm>

#include "common/gemm.h"
#include "common/parallel.h"
#include "common/workspace.h"

namespace gptkernels {
namespace {

// Elements of C in a piece: 2 MiB in bf16, the L2 cache of a core with AMX; whole tiles of 16 along the cut side.
constexpr int64_t PIECE = 1 << 20;
constexpr int64_t CUT = 64;
// What an epilogue gets at a time: 16 KiB of fp32, in the L1 cache.
constexpr int64_t ROWS = 16, COLS = 256;

OutsideProduct outside = nullptr;

// A piece of C, of rows [row, row + rows) and columns [col, col + cols).
struct Piece {
    const bf16* data;
    int64_t row, rows, col, cols;
};

void hand_over(const Piece& p, Epilogue epilogue, const void* context) {
    parallel_for((p.rows + ROWS - 1) / ROWS, [&](int64_t band) {
        alignas(64) float values[ROWS * COLS];
        int64_t begin = band * ROWS, rows = std::min(ROWS, p.rows - begin);
        for (int64_t j = 0; j < p.cols; j += COLS) {
            int64_t cols = std::min(COLS, p.cols - j);
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t v = 0; v < cols; v += W)
                    store(values + i * COLS + v, load(p.data + (begin + i) * p.cols + j + v, cols - v));
            epilogue(context, {p.row + begin, p.col + j, (int)rows, (int)cols, values, (int)COLS});
        }
    });
}

// The factor from its i-th row or column on; it is in bf16.
Factor from(const Factor& f, int64_t i) {
    return {static_cast<const bf16*>(f.data) + (f.k_contiguous ? i * f.ld : i), f.ld, true, f.k_contiguous};
}

}  // namespace

void set_outside_product(OutsideProduct product) { outside = product; }

bool has_outside_product() { return outside != nullptr; }

Factor rounded(const Factor& f, int64_t count, int64_t K, Slot slot) {
    if (f.is_bf16) return f;
    int64_t rows = f.k_contiguous ? count : K, cols = f.k_contiguous ? K : count;
    const float* data = static_cast<const float*>(f.data);
    bf16* copy = workspace_of<bf16>(slot, rows * cols);
    parallel_ranges(rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            for (int64_t j = 0; j < cols; j += W)
                store(copy + i * cols + j, load(data + i * f.ld + j, cols - j), cols - j);
    });
    return {copy, cols, true, f.k_contiguous};
}

void outside_gemm(int64_t M, int64_t N, int64_t K, const Factor& a, const Factor& b, const Output& c) {
    outside(M, N, K, rounded(a, M, K, Slot::PACK_A), rounded(b, N, K, Slot::PACK_B), static_cast<bf16*>(c.data), c.ld);
}

void gemm_in_pieces(int64_t M, int64_t N, int64_t K, const Factor& a, const Factor& b, Epilogue epilogue,
                    const void* context) {
    Factor fa = rounded(a, M, K, Slot::PACK_A), fb = rounded(b, N, K, Slot::PACK_B);
    // Cut along the longer side: what every piece reads again is then the smaller factor.
    bool by_rows = M >= N;
    int64_t longer = std::max(M, N), shorter = std::min(M, N);
    int64_t most = std::max(CUT, PIECE / shorter), pieces = (longer + most - 1) / most;
    int64_t size = ((longer + pieces - 1) / pieces + CUT - 1) / CUT * CUT;
    bf16* data = workspace_of<bf16>(Slot::PARTIAL, std::min(size, longer) * shorter);
    for (int64_t begin = 0; begin < longer; begin += size) {
        int64_t n = std::min(size, longer - begin);
        Piece p = by_rows ? Piece{data, begin, n, 0, N} : Piece{data, 0, M, begin, n};
        outside(p.rows, p.cols, K, from(fa, p.row), from(fb, p.col), data, p.cols);
        hand_over(p, epilogue, context);
    }
}

}  // namespace gptkernels
