// What the matrix products share, on tensor cores (gemm_cuda.cuh) or not (gemm_fp32.cuh): factors, the order of tiles,
// the way of a factor's tile into shared memory and that of the sums out of it.
#pragma once

#include "common/convert.cuh"

namespace gptkernels {

// Rows or columns of C, i, by the summed index k: element (i, k) at data[i * ld + k] if the factor lies along k, else
// at data[k * ld + i]. Rows in memory start on 16 bytes and are padded to a multiple of 16 bytes; along k the padding
// is 0.
template <class T>
struct Operand {
    Global<const T> data;
    int64_t ld;
};

// C (M, N) = A (M, K) B (K, N).
template <class T>
struct Product {
    Operand<T> a, b;
    int M, N, K;
};

struct Place {
    int row, col;
};

// Where a block's tile begins: down a group of 8 rows of tiles, then to the right, then the next group, so that the
// tiles that run at the same time share their factors in L2.
template <int BLOCK_M, int BLOCK_N>
DEVICE Place place_of(int block, int M, int N) {
    constexpr int GROUP = 8;
    int rows = (M + BLOCK_M - 1) / BLOCK_M, columns = (N + BLOCK_N - 1) / BLOCK_N;
    int first = block / (GROUP * columns) * GROUP, within = block % (GROUP * columns);
    int height = rows - first < GROUP ? rows - first : GROUP;
    return {(first + within % height) * BLOCK_M, within / height * BLOCK_N};
}

// Tiles are 64 bytes of k deep: one or two rows of shared memory's banks, whichever way they lie.
template <class T>
constexpr int BLOCK_K = 64 / sizeof(T);

// A tile of WIDTH rows or columns in shared memory, in packets of 16 bytes whose order within a row depends on the row,
// so that eight packets side by side (cp.async) and one packet of eight rows (ldmatrix) lie in different banks.
template <class T, int WIDTH, bool ALONG_K>
struct TileLayout {
    static constexpr int ROW = ALONG_K ? BLOCK_K<T> : WIDTH, ROWS = ALONG_K ? WIDTH : BLOCK_K<T>;
    static constexpr int PACKETS = ROW / PACKET<T>;

    DEVICE static int swizzle(int row) { return ALONG_K ? row / 2 % 4 : sizeof(T) == 2 ? row % 8 : row % 4 * 2; }
    DEVICE static int at(int row, int packet) { return row * ROW + (packet ^ swizzle(row)) * PACKET<T>; }
};

// Copies one tile of a factor after another along k: a thread takes the same packet of every STEP-th row.
template <class T, int WIDTH, bool ALONG_K, int THREADS>
struct TileCopy {
    using Layout = TileLayout<T, WIDTH, ALONG_K>;
    static constexpr int STEP = THREADS / Layout::PACKETS, COUNT = Layout::ROWS / STEP;
    static_assert(STEP % (sizeof(T) == 2 ? 8 : 4) == 0 && Layout::ROWS % STEP == 0,
                  "the swizzle is the same for all rows of a thread");

    Global<const T> from;
    int64_t ld;
    uint32_t offsets[COUNT];  // in packets, from `from` on
    int at, left;             // its place in a tile, and how far K is from there

    // The tile of rows or columns `first` on, of `size`. Beyond those the last ones are repeated: what comes of them is
    // not stored.
    DEVICE TileCopy(const Operand<T>& x, int first, int size, int K) : ld(x.ld) {
        int row = threadIdx.x / Layout::PACKETS, packet = threadIdx.x % Layout::PACKETS;
        at = Layout::at(row, packet);
        if (ALONG_K) {
            from = x.data + (first * ld + packet * PACKET<T>);
            left = K - packet * PACKET<T>;
            UNROLL
            for (int i = 0; i < COUNT; ++i) {
                int other = row + i * STEP, last = size - 1 - first;
                offsets[i] = (uint32_t)(other < last ? other : last) * (uint32_t)(ld / PACKET<T>);
            }
        } else {
            int column = first + packet * PACKET<T>, last = (size - 1) / PACKET<T> * PACKET<T>;
            from = x.data + (row * ld + (column < last ? column : last));
            left = K - row;
            UNROLL
            for (int i = 0; i < COUNT; ++i) offsets[i] = (uint32_t)(i * STEP) * (uint32_t)(ld / PACKET<T>);
        }
    }

    // Start copying the next tile; beyond K nothing is read and it becomes zero.
    DEVICE void start(Shared<T> tile) {
        UNROLL
        for (int i = 0; i < COUNT; ++i) {
            int further = ALONG_K ? 0 : i * STEP;
            cp_async16(tile + (at + i * STEP * Layout::ROW), from + (int64_t)offsets[i] * PACKET<T>,
                       left > further ? 16 : 0);
        }
        from = from + (ALONG_K ? BLOCK_K<T> : BLOCK_K<T> * ld);
        left -= BLOCK_K<T>;
    }
};

// Sums on their way from wherever the product left them to packets of a row: a warp's WARP_N columns by some rows.
constexpr int WARP_N = 64;

// WIDTH is the numbers in a packet of the output. Eight are two packets of floats: these lie in two halves, even and
// odd ones, so that eight lanes read 128 bytes side by side. The 8 floats between rows keep pairs of four rows apart.
template <int WIDTH>
struct SumsLayout {
    static constexpr int ROW = WARP_N + 8, EIGHT_COLUMNS = WIDTH == 8 ? 4 : 8;
    DEVICE static int at(int row, int col) {
        return row * ROW + (WIDTH == 8 ? col / 4 % 2 * (ROW / 2) + col / 8 * 4 + col % 4 : col);
    }
};

// An epilogue is, for WIDTH columns at a time,
//   struct Columns;                                 what a thread keeps from row to row
//   Columns begin(int col) const;
//   void row(Columns&, int row, Vector<float, WIDTH> sums) const;
//   void end(Columns&, int piece) const;            by all lanes; the warp's is the piece-th piece of C's rows
//
// Hands ROWS rows of sums, stored by the warp before, to the epilogue in packets. A thread gets the same columns of
// all.
template <int ROWS, class Epilogue>
DEVICE void finish_rows(const Epilogue& epilogue, typename Epilogue::Columns (&columns)[8 / Epilogue::WIDTH],
                        Shared<float> sums, int row, int M) {
    constexpr int WIDTH = Epilogue::WIDTH;
    int lane = threadIdx.x % WARP;
    __syncwarp();
    for (int r = lane / 8; r < ROWS;
         r += 4) {  // not unrolled: it is in the kernel once for each of these calls already
        UNROLL
        for (int part = 0; part < 8 / WIDTH; ++part) {
            Vector<float, WIDTH> v;
            UNROLL
            for (int j = 0; j < WIDTH; j += 4) {
                auto four = load<4>(sums + SumsLayout<WIDTH>::at(r, (part * 8 + lane % 8) * WIDTH + j));
                UNROLL
                for (int e = 0; e < 4; ++e) v[j + e] = four[e];
            }
            if (row + r < M) epilogue.row(columns[part], row + r, v);
        }
    }
    __syncwarp();
}

// The columns of a thread, before the first row and after the last one.
template <class Epilogue>
DEVICE void begin_columns(const Epilogue& epilogue, typename Epilogue::Columns (&columns)[8 / Epilogue::WIDTH],
                          int col) {
    UNROLL
    for (int part = 0; part < 8 / Epilogue::WIDTH; ++part)
        columns[part] = epilogue.begin(col + (part * 8 + threadIdx.x % 8) * Epilogue::WIDTH);
}
template <class Epilogue>
DEVICE void end_columns(const Epilogue& epilogue, typename Epilogue::Columns (&columns)[8 / Epilogue::WIDTH],
                        int piece) {
    UNROLL
    for (int part = 0; part < 8 / Epilogue::WIDTH; ++part) epilogue.end(columns[part], piece);
}

// N numbers of a row from column `col` on, of which the row may have fewer; whole packets where rows start on 16 bytes.
template <int N, class Pointer>
DEVICE Vector<float, N> load_columns(const Pointer& p, int64_t row, int64_t ld, int col, int columns, bool packets) {
    int64_t i = row * ld + col;
    if (packets && col + N <= columns) return load_floats<N>(p, i);
    Vector<float, N> v = {};
    UNROLL
    for (int j = 0; j < N; ++j)
        if (col + j < columns) v[j] = load_floats<1>(p, i + j)[0];
    return v;
}
template <class Pointer, int N>
DEVICE void store_columns(const Pointer& p, int64_t row, int64_t ld, int col, int columns, bool packets,
                          const Vector<float, N>& v) {
    int64_t i = row * ld + col;
    if (packets && col + N <= columns) {
        store_floats(p, i, v);
        return;
    }
    UNROLL
    for (int j = 0; j < N; ++j)
        if (col + j < columns) store_floats(p, i + j, Vector<float, 1>{v[j]});
}

// N numbers of a row of a factor: beyond its columns, up to `ld`, zeros.
template <class T, int N>
DEVICE void store_factor(Global<T> p, int64_t row, int64_t ld, int col, int columns, Vector<float, N> v) {
    if (col >= ld) return;
    if (col + N > columns) {
        UNROLL
        for (int j = 0; j < N; ++j)
            if (col + j >= columns) v[j] = 0.0f;
    }
    store_floats(p, row * ld + col, v);
}

}  // namespace gptkernels
