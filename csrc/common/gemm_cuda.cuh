// Matrix product on tensor cores, sums in fp32, with an epilogue (common/product.cuh) on the sums: of 16-bit numbers,
// or of fp32 rounded to tf32.
//
// Tiling: a block owns BLOCK_M x BLOCK_N of C, a warp 16 M_TILES x 64 of it in registers (mma.sync m16n8k16, m16n8k8).
// The block walks along k, 32 (fp32: 16) at a time; STAGES steps of both factors are in shared memory, all but one of
// them on their way (cp.async, 16 bytes). Fragments (ldmatrix; .trans where a factor does not lie along k) are read
// half a step ahead of the products that take them. At 64 x 64 a warp reads 8 fragments of 512 bytes for 32 mma: 1
// cycle of shared memory an mma, and its share of the copies half of one, where an mma takes 2 cycles of the tensor
// cores. Bytes: (M K N/BLOCK_N + K N M/BLOCK_M + M N) * 2 from L2, flops 2 M N K: bound by the tensor cores from about
// K = 500 up. Deterministic: a warp sums its tile in the order of k.
//
// Rows in memory must start on 16 bytes (common/product.cuh); linear_cuda.cu copies the factors that do not. That is
// one pass over them, where loads of single elements would be repeated for each tile in a row or column of C.
#pragma once

#include "common/product.cuh"

namespace gptkernels {

template <int M_TILES_, int WARPS_M_, int WARPS_N_>
struct GemmTile {
    static constexpr int M_TILES = M_TILES_, WARPS_M = WARPS_M_, WARPS_N = WARPS_N_;
    static constexpr int WARP_M = 16 * M_TILES, THREADS = WARPS_M * WARPS_N * WARP;
    static constexpr int BLOCK_M = WARP_M * WARPS_M, BLOCK_N = WARP_N * WARPS_N;
    // With three, two blocks of 48 KB and of 255 registers a thread share a processor of any kind.
    static constexpr int STAGES = 3;
    static constexpr int SHARED_BYTES = STAGES * (BLOCK_M + BLOCK_N) * 64;
};
using LargeTile = GemmTile<4, 2, 2>;  // 128 x 128
using SmallTile = GemmTile<2, 2, 1>;  // 64 x 64, for more blocks than processors

// What a lane reads of a tile for mma: 16 rows or columns by a step of k at a time, 4 registers. LEFT: in the order in
// which mma takes a left operand; the other order for right ones, two of them at a time. ldmatrix_x4 reads one packet
// of each lane's row; it does not transpose 32-bit numbers, which a lane then reads one by one.
template <class T, int WIDTH, bool ALONG_K, bool LEFT>
struct Fragments {
    using Layout = TileLayout<T, WIDTH, ALONG_K>;
    static constexpr int STEP_K = 32 / sizeof(T);

    int at[ALONG_K ? BLOCK_K<T> / STEP_K : 4];

    DEVICE explicit Fragments(int first) {
        int lane = threadIdx.x % WARP;
        if constexpr (sizeof(T) == 4 && !ALONG_K) {
            UNROLL
            for (int i = 0; i < 4; ++i) {
                int column = first + 8 * i + lane / 4;
                at[i] = Layout::at(lane % 4, column / 4) + column % 4;
            }
        } else {
            bool straight = LEFT == ALONG_K;
            int row = straight ? lane % 16 : lane % 8 + lane / 16 * 8, packet = straight ? lane / 16 : lane / 8 % 2;
            UNROLL
            for (int i = 0; i < (int)(sizeof at / sizeof at[0]); ++i)
                at[i] = ALONG_K ? Layout::at(first + row, 2 * i + packet) : Layout::at(row, first / 8 + 2 * i + packet);
        }
    }

    // The i-th 16 rows or columns of the warp in a step.
    DEVICE void load(uint32_t (&r)[4], Shared<const T> tile, int i, int step) const {
        if constexpr (ALONG_K) {
            ldmatrix_x4(r, tile + (at[step] + i * 16 * Layout::ROW));
        } else if constexpr (sizeof(T) == 2) {
            ldmatrix_x4_trans(r, tile + (at[i] + step * STEP_K * Layout::ROW));
        } else {
            UNROLL
            for (int n = 0; n < 4; ++n) {
                int eight = LEFT ? n % 2 : n / 2, four_k = LEFT ? n / 2 : n % 2;
                int place = at[i % 2 * 2 + eight] + i / 2 * 32 + (step * STEP_K + 4 * four_k) * Layout::ROW;
                r[n] = __float_as_uint(tile[place]);
            }
        }
        if constexpr (sizeof(T) == 4) {
            UNROLL
            for (int n = 0; n < 4; ++n) r[n] = to_tf32(__uint_as_float(r[n]));
        }
    }
};

// acc += a b for one step of k.
template <class T>
DEVICE void multiply(float (&acc)[4], const uint32_t (&a)[4], const uint32_t* b) {
    if constexpr (sizeof(T) == 4) mma_m16n8k8_tf32(acc, a, b[0], b[1]);
    else mma_m16n8k16<T>(acc, a, b[0], b[1]);
}

// The sums of a warp: acc[i][j] are 16 x 8, laid out as mma has them.
template <class T, class Tile, bool A_ALONG_K, bool B_ALONG_K>
DEVICE void accumulate(float (&acc)[Tile::M_TILES][8][4], const Product<T>& p, Place tile) {
    constexpr int STAGES = Tile::STAGES, STEPS = 2;
    constexpr int A_SIZE = Tile::BLOCK_M * BLOCK_K<T>, B_SIZE = Tile::BLOCK_N * BLOCK_K<T>;
    Shared<T> a_stages = dynamic_shared<T>(0, STAGES * A_SIZE);
    Shared<T> b_stages = dynamic_shared<T>(STAGES * A_SIZE * (int)sizeof(T), STAGES * B_SIZE);
    TileCopy<T, Tile::BLOCK_M, A_ALONG_K, Tile::THREADS> copy_a(p.a, tile.row, p.M, p.K);
    TileCopy<T, Tile::BLOCK_N, B_ALONG_K, Tile::THREADS> copy_b(p.b, tile.col, p.N, p.K);
    int warp = threadIdx.x / WARP, blocks = (p.K + BLOCK_K<T> - 1) / BLOCK_K<T>;
    Fragments<T, Tile::BLOCK_M, A_ALONG_K, true> from_a(warp % Tile::WARPS_M * Tile::WARP_M);
    Fragments<T, Tile::BLOCK_N, B_ALONG_K, false> from_b(warp / Tile::WARPS_M * WARP_N);

    uint32_t a[2][Tile::M_TILES][4], b[2][4][4];  // of the step at hand and of the next one
    auto load_step = [&](int stage, int step) {
        UNROLL
        for (int i = 0; i < Tile::M_TILES; ++i) from_a.load(a[step % 2][i], a_stages + stage * A_SIZE, i, step);
        UNROLL
        for (int j = 0; j < 4; ++j) from_b.load(b[step % 2][j], b_stages + stage * B_SIZE, j, step);
    };
    auto copy_stage = [&](int stage) {
        copy_a.start(a_stages + stage * A_SIZE);
        copy_b.start(b_stages + stage * B_SIZE);
    };

    UNROLL
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        if (stage < blocks) copy_stage(stage);
        cp_async_commit();
    }
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    if (blocks > 0) load_step(0, 0);
    int reading = 0, writing = STAGES - 1;
    for (int block = 0; block < blocks; ++block) {
        int next = reading + 1 < STAGES ? reading + 1 : 0;
        UNROLL
        for (int step = 0; step < STEPS; ++step) {
            if (step + 1 < STEPS) {
                load_step(reading, step + 1);
            } else if (block + 1 < blocks) {
                cp_async_wait<STAGES - 2>();
                __syncthreads();
                load_step(next, 0);
            }
            if (step == 0) {  // into the stage that was read before the last barrier
                if (block + STAGES - 1 < blocks) copy_stage(writing);
                cp_async_commit();
            }
            UNROLL
            for (int i = 0; i < Tile::M_TILES; ++i) {
                UNROLL
                for (int j = 0; j < 8; ++j) multiply<T>(acc[i][j], a[step % 2][i], b[step % 2][j / 2] + j % 2 * 2);
            }
        }
        writing = reading;
        reading = next;
    }
}

template <class T, class Tile, bool A_ALONG_K, bool B_ALONG_K, class Epilogue>
__global__ void __launch_bounds__(Tile::THREADS) gemm_kernel(Product<T> p, Epilogue epilogue) {
    using Layout = SumsLayout<Epilogue::WIDTH>;
    constexpr int SUMS = 16 * Layout::ROW;
    if constexpr (!HAS_MMA<T>) return;
    Place place = place_of<Tile::BLOCK_M, Tile::BLOCK_N>((int)blockIdx.x, p.M, p.N);
    float acc[Tile::M_TILES][8][4] = {};
    accumulate<T, Tile, A_ALONG_K, B_ALONG_K>(acc, p, place);
    __syncthreads();  // all have read the last step: its memory is now the warps' own

    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int row = place.row + warp % Tile::WARPS_M * Tile::WARP_M, col = place.col + warp / Tile::WARPS_M * WARP_N;
    Shared<float> sums = dynamic_shared<float>(warp * SUMS * (int)sizeof(float), SUMS);
    Shared<float> place_of_pair = sums + Layout::at(lane / 4, lane % 4 * 2);
    typename Epilogue::Columns columns[8 / Epilogue::WIDTH];
    begin_columns(epilogue, columns, col);
    UNROLL
    for (int i = 0; i < Tile::M_TILES; ++i) {
        UNROLL
        for (int j = 0; j < 8; ++j) {
            Shared<float> pair = place_of_pair + j * Layout::EIGHT_COLUMNS;
            store(pair, Vector<float, 2>{acc[i][j][0], acc[i][j][1]});
            store(pair + 8 * Layout::ROW, Vector<float, 2>{acc[i][j][2], acc[i][j][3]});
        }
        finish_rows<16>(epilogue, columns, sums, row + 16 * i, p.M);
    }
    if (row < p.M) end_columns(epilogue, columns, row / Tile::WARP_M);
}

// The larger tile that still gives every processor one, and that is not wider than the matrix. Returns the rows of a
// piece.
template <class T, bool A_ALONG_K, bool B_ALONG_K, class Epilogue>
int launch_gemm(const char* name, const Product<T>& p, const Epilogue& epilogue, void* stream) {
    auto tiles = [&](int block_m, int block_n) {
        return ((int64_t)p.M + block_m - 1) / block_m * (((int64_t)p.N + block_n - 1) / block_n);
    };
    auto launch_tile = [&]<class Tile>(Tile) {
        launch({name, Grid(tiles(Tile::BLOCK_M, Tile::BLOCK_N)), Tile::THREADS, Tile::SHARED_BYTES, stream},
               gemm_kernel<T, Tile, A_ALONG_K, B_ALONG_K, Epilogue>, p, epilogue);
        return Tile::WARP_M;
    };
    bool wide = p.M > SmallTile::BLOCK_M && p.N > SmallTile::BLOCK_N;
    bool many = tiles(LargeTile::BLOCK_M, LargeTile::BLOCK_N) >= device().processors;
    return wide && many ? launch_tile(LargeTile()) : launch_tile(SmallTile());
}

}  // namespace gptkernels
