// Matrix product of fp32 numbers in full precision, on the FMA units, with an epilogue (common/product.cuh) on the
// sums.
//
// Three tf32 products a product would be faster on an A100, slower on an RTX; and they lose infinity (inf - inf where
// it is split) and, past a K of some hundreds, fp32's precision, since tensor cores cut sums off instead of rounding
// them.
//
// Tiling: a block of 4 warps owns 64 x 128 of C, a warp 32 x 64, a thread 8 x 8 in registers. Steps of k and stages as
// in gemm_cuda.cuh. A thread reads four k of its 8 rows and 8 columns (16 accesses of 16 bytes), then does 256 FMA.
// Sums are of 64 terms each, and then of these sums, both in the order of k: deterministic, and a rounding error that
// grows slower with K than one long sum's.
#pragma once

#include "common/product.cuh"

namespace gptkernels {

struct Fp32Tile {
    static constexpr int WARPS_M = 2, WARPS_N = 2, WARP_M = 32, THREADS = WARPS_M * WARPS_N * WARP;
    static constexpr int BLOCK_M = WARPS_M * WARP_M, BLOCK_N = WARPS_N * WARP_N;
    static constexpr int BLOCKS_A_SUM = 4;  // 64 terms
    static constexpr int STAGES = 3, SUMS = WARP_M * SumsLayout<4>::ROW;
    static constexpr int STAGE_BYTES = STAGES * (BLOCK_M + BLOCK_N) * 64, SUMS_BYTES = WARPS_M * WARPS_N * SUMS * 4;
    static constexpr int SHARED_BYTES = STAGE_BYTES > SUMS_BYTES ? STAGE_BYTES : SUMS_BYTES;
};

// Eight rows or columns of a thread, one of LANES side by side, so that each access is of whole packets without
// conflicts.
template <int WIDTH, bool ALONG_K, int LANES>
struct Eight {
    using Layout = TileLayout<float, WIDTH, ALONG_K>;

    int first, lane;

    DEVICE int item(int j) const { return ALONG_K ? lane + LANES * j : 4 * (lane + LANES * (j / 4)) + j % 4; }

    // x[j][e] is item j at k = 4 packet + e.
    DEVICE void load(float (&x)[8][4], Shared<const float> tile, int packet) const {
        UNROLL
        for (int i = 0; i < 8; ++i) {
            auto four =
                gptkernels::load<4>(tile + (ALONG_K ? Layout::at(first + item(i), packet)
                                                    : Layout::at(4 * packet + i / 2, (first + item(i % 2 * 4)) / 4)));
            UNROLL
            for (int e = 0; e < 4; ++e) (ALONG_K ? x[i][e] : x[i % 2 * 4 + e][i / 2]) = four[e];
        }
    }
};

// acc[i][j] += the sum over e of a[i][e] b[j][e].
DEVICE void add_products(float (&acc)[8][8], const float (&a)[8][4], const float (&b)[8][4]) {
    UNROLL
    for (int e = 0; e < 4; ++e) {
        UNROLL
        for (int i = 0; i < 8; ++i) {
            UNROLL
            for (int j = 0; j < 8; ++j) acc[i][j] += a[i][e] * b[j][e];
        }
    }
}

// total += acc; acc = 0.
DEVICE void add_up(float (&total)[8][8], float (&acc)[8][8]) {
    UNROLL
    for (int i = 0; i < 8; ++i) {
        UNROLL
        for (int j = 0; j < 8; ++j) {
            total[i][j] += acc[i][j];
            acc[i][j] = 0.0f;
        }
    }
}

template <bool A_ALONG_K, bool B_ALONG_K, class Epilogue>
__global__ void __launch_bounds__(Fp32Tile::THREADS) gemm_fp32_kernel(Product<float> p, Epilogue epilogue) {
    using Tile = Fp32Tile;
    constexpr int STAGES = Tile::STAGES, DEPTH = BLOCK_K<float>;
    constexpr int A_SIZE = Tile::BLOCK_M * DEPTH, B_SIZE = Tile::BLOCK_N * DEPTH;
    Shared<float> a_stages = dynamic_shared<float>(0, STAGES * A_SIZE);
    Shared<float> b_stages = dynamic_shared<float>(STAGES * A_SIZE * 4, STAGES * B_SIZE);
    Place place = place_of<Tile::BLOCK_M, Tile::BLOCK_N>((int)blockIdx.x, p.M, p.N);
    TileCopy<float, Tile::BLOCK_M, A_ALONG_K, Tile::THREADS> copy_a(p.a, place.row, p.M, p.K);
    TileCopy<float, Tile::BLOCK_N, B_ALONG_K, Tile::THREADS> copy_b(p.b, place.col, p.N, p.K);
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, blocks = (p.K + DEPTH - 1) / DEPTH;
    int warp_row = warp % Tile::WARPS_M * Tile::WARP_M, warp_col = warp / Tile::WARPS_M * WARP_N;
    Eight<Tile::BLOCK_M, A_ALONG_K, 4> rows{warp_row, lane / 8};
    Eight<Tile::BLOCK_N, B_ALONG_K, 8> cols{warp_col, lane % 8};
    float total[8][8] = {}, acc[8][8] = {};
    auto copy_stage = [&](int stage) {
        copy_a.start(a_stages + stage * A_SIZE);
        copy_b.start(b_stages + stage * B_SIZE);
    };
    UNROLL
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        if (stage < blocks) copy_stage(stage);
        cp_async_commit();
    }
    int reading = 0, writing = STAGES - 1;
    for (int block = 0; block < blocks; ++block) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();  // also: all have read the stage that is written next
        if (block + STAGES - 1 < blocks) copy_stage(writing);
        cp_async_commit();
        for (int packet = 0; packet < DEPTH / 4; ++packet) {
            float a[8][4], b[8][4];
            rows.load(a, a_stages + reading * A_SIZE, packet);
            cols.load(b, b_stages + reading * B_SIZE, packet);
            add_products(acc, a, b);
        }
        writing = reading;
        reading = reading + 1 < STAGES ? reading + 1 : 0;
        if (block % Tile::BLOCKS_A_SUM == Tile::BLOCKS_A_SUM - 1) add_up(total, acc);
    }
    add_up(total, acc);

    __syncthreads();
    Shared<float> sums = dynamic_shared<float>(warp * Tile::SUMS * 4, Tile::SUMS);
    UNROLL
    for (int i = 0; i < 8; ++i) {
        UNROLL
        for (int j = 0; j < 8; j += B_ALONG_K ? 1 : 4) {
            Shared<float> to = sums + SumsLayout<4>::at(rows.item(i), cols.item(j));
            if constexpr (B_ALONG_K) to[0] = total[i][j];
            else store(to, Vector<float, 4>{total[i][j], total[i][j + 1], total[i][j + 2], total[i][j + 3]});
        }
    }
    typename Epilogue::Columns columns[2];
    begin_columns(epilogue, columns, place.col + warp_col);
    finish_rows<Tile::WARP_M>(epilogue, columns, sums, place.row + warp_row, p.M);
    if (place.row + warp_row < p.M) end_columns(epilogue, columns, (place.row + warp_row) / Tile::WARP_M);
}

// Returns the rows of a piece.
template <bool A_ALONG_K, bool B_ALONG_K, class Epilogue>
int launch_gemm_fp32(const char* name, const Product<float>& p, const Epilogue& epilogue, void* stream) {
    using Tile = Fp32Tile;
    int64_t rows = ((int64_t)p.M + Tile::BLOCK_M - 1) / Tile::BLOCK_M;
    int64_t columns = ((int64_t)p.N + Tile::BLOCK_N - 1) / Tile::BLOCK_N;
    launch({name, Grid(rows * columns), Tile::THREADS, Tile::SHARED_BYTES, stream},
           gemm_fp32_kernel<A_ALONG_K, B_ALONG_K, Epilogue>, p, epilogue);
    return Tile::WARP_M;
}

}  // namespace gptkernels
