// Matrix product with an epilogue: C = A B, M x N x K, handed over tile by tile while a tile is in the L1 cache.
//
// Own, not torch's BLAS, because it was measured to be faster where this library is measured (MKL on an AMD EPYC: 70 to
// 140 GFLOP/s in fp32 at GPT shapes on 2 cores; this: see README) and because bias, GELU, softmax gradients and dtype
// conversions then cost no pass over memory of their own. But bf16 on a CPU with AMX is left to torch
// (gemm_pieces.cpp).
//
// The scheme is Goto and van de Geijn's (2008, ACM TOMS 34:3). A task owns a block of C of MC x NC. For each slice of
// KC along K it packs B's slice into panels NR wide (L2), then A MR rows at a time (L1), and multiplies them in
// registers: MR x NR accumulators. Partial sums of several slices wait in a scratch buffer. The order of every sum is
// fixed by the shape: results do not depend on the number of threads. Which thread computes what follows the rows of
// the factors and of C, since a core is slow to read what another wrote, most where they share no cache: bands of rows
// where there are many, and a weight's gradient in two pieces of K.
#pragma once

#include <cstdint>

#include "common/vec.h"
#include "common/workspace.h"

namespace gptkernels {

// A factor as it lies in memory. k_contiguous: element (i, k) at data[i * ld + k], else at data[k * ld + i], where i
// counts A's rows or B's columns.
struct Factor {
    const void* data;
    int64_t ld;
    bool is_bf16;
    bool k_contiguous;
};

// Rows of C that are multiplied together: another number of rows takes as long as the next multiple. With the vectors
// beside them they fill 27 of 32 (AVX-512) or 15 of 16 registers, see gemm.cpp.
constexpr int GEMM_ROWS = W == 16 ? 12 : 6;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows [row, row + rows) and columns [col, col + cols) of C in fp32; element (i, j) at values[i * ld + j]. Readable up
// to the next multiple of W columns.
struct Tile {
    int64_t row, col;
    int rows, cols;
    const float* values;
    int ld;
};

typedef void (*Epilogue)(const void* context, const Tile& tile);

// With `bf16_product` both factors are rounded to bf16 and multiplied with bf16 dot products where the CPU has them,
// always accumulated in fp32. Every element of C is handed over exactly once, also when K is 0.
void gemm(int64_t M, int64_t N, int64_t K, Factor a, Factor b, bool bf16_product, Epilogue epilogue,
          const void* context);

// The usual epilogue: C (M, N) = A B + bias, in C's dtype; `add` adds to what is there (fp32 C only).
struct Output {
    void* data;
    int64_t ld;
    bool is_bf16;
    const void* bias = nullptr;
    bool bias_is_bf16 = false;
    bool add = false;
};

void gemm(int64_t M, int64_t N, int64_t K, Factor a, Factor b, bool bf16_product, const Output& c);

// C (M, N) = A B by another library, all in bf16, C's rows ldc elements apart. Where there is one (null: none, as at
// the start), every bf16 product is its: straight into a C in bf16 that needs no epilogue, else in pieces of C.
typedef void (*OutsideProduct)(int64_t M, int64_t N, int64_t K, const Factor& a, const Factor& b, bf16* c, int64_t ldc);
void set_outside_product(OutsideProduct product);
bool has_outside_product();
void outside_gemm(int64_t M, int64_t N, int64_t K, const Factor& a, const Factor& b, const Output& c);
void gemm_in_pieces(int64_t M, int64_t N, int64_t K, const Factor& a, const Factor& b, Epilogue epilogue,
                    const void* context);

// A factor of `count` rows or columns in bf16: itself, or a copy in the workspace.
Factor rounded(const Factor& f, int64_t count, int64_t K, Slot slot);

}  // namespace gptkernels
