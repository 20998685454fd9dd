// Tiles of heads in shared memory, and the fragments of 16-bit matrix products on them, for the CUDA attention kernels.
//
// mma.sync's layouts make the two products of attention meet without a shuffle: the accumulators of a score tile,
// rounded and packed in pairs, are the left operand of the product after it. With g = lane / 4 and t = lane % 4,
// accumulators [i][j][0..3] of a tile are its elements (16 i + g, 8 j + 2 t), the one right of it, and the same two 8
// rows below.
#pragma once

#include <type_traits>

#include "common/device.cuh"

namespace gptkernels {

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// What a kernel is told of the problem (see AttentionCuda).
struct AttentionSizes {
    int H, T, S, D;
    float scale;
    uint32_t drop_below;
    float keep_scale;
};

// (batch, head, token, D) numbers anywhere in memory; D is contiguous, rows start on 16 bytes. Strides in elements.
template <class T>
struct Heads {
    Global<T> data;
    int64_t stride_b, stride_h, stride_t;

    DEVICE Global<T> head(int b, int h) const { return data + (b * stride_b + h * stride_h); }
};

// Rows of D elements of 16 bits in shared memory. The 16-byte packets of a row change places within groups, by the
// row's number, so that one packet of eight rows in turn (ldmatrix) and all packets of a row (cp.async) lie in
// different banks.
template <int D>
struct Swizzle {
    static constexpr int GROUP = D % 64 == 0 ? 8 : 4;

    DEVICE static int offset(int row, int packet) { return row * D + (packet ^ row / (8 / GROUP) % GROUP) * 8; }
    // A pointer to packet 0 or 1 of a group, an even number of packets further on; its tile starts on 128 bytes.
    template <class T>
    DEVICE static Shared<T> step(Shared<T> p, int packets) {
        p.address ^= packets % GROUP * 16;
        return p + packets / GROUP * GROUP * 8;
    }
};

// Copies a head's rows into one tile after another: a thread takes packet `packet` of each group of row `row` and of
// every STEP-th row on.
template <class T, int D, int ROWS, int THREADS>
struct Copy {
    static constexpr int GROUP = Swizzle<D>::GROUP, STEP = THREADS / GROUP;
    static_assert(STEP % 8 == 0 && ROWS % STEP == 0, "the swizzle is the same for all rows of a thread");

    Global<const T> head;
    int stride, from;       // in packets, of which 2^31 are 32 GiB: a launcher checks that no head is as long
    int at, rows, columns;  // its place in a tile, and how many rows and columns there are from its own on

    DEVICE Copy(const Heads<const T>& x, int b, int h, int first, int end, int D_in_memory,
                unsigned thread = threadIdx.x)
        : head(x.head(b, h)), stride((int)(x.stride_t / 8)) {
        int row = thread / GROUP, packet = thread % GROUP;
        from = (first + row) * stride + packet;
        at = Swizzle<D>::offset(row, packet);
        rows = end - row;
        columns = D_in_memory - packet * 8;
    }

    // Start copying the next ROWS rows, those from `first` on; zero beyond the last one and D, where nothing is read.
    DEVICE void start(Shared<T> tile, int first) {
        UNROLL
        for (int i = 0; i < ROWS / STEP; ++i) UNROLL
        for (int c = 0; c < D / 8; c += GROUP)
            cp_async16(tile + (at + i * STEP * D + c * 8), head + (int64_t)(from + i * STEP * stride) * 8 + c * 8,
                       i * STEP < rows - first && c * 8 < columns ? 16 : 0);
        from += ROWS * stride;
    }

    // Change the sign of what this thread copied to a tile of 16-bit numbers.
    DEVICE void negate(Shared<T> tile) const {
        UNROLL
        for (int i = 0; i < ROWS / STEP; ++i) UNROLL
        for (int c = 0; c < D / 8; c += GROUP) {
            auto packet = (tile + (at + i * STEP * D + c * 8)).template as<uint32_t>();
            auto pairs = load<4>(packet);
            UNROLL
            for (int e = 0; e < 4; ++e) pairs[e] ^= 0x80008000u;
            store(packet, pairs);
        }
    }
};

// Where a lane points in a tile for ldmatrix_x4: of left operands (and, with _trans, of right operands whose rows are
// summed over), and of right operands whose columns are summed over.
template <int D, class T>
DEVICE Shared<T> left_place(Shared<T> tile, int lane) {
    return tile + Swizzle<D>::offset(lane % 16, lane / 16);
}
template <int D, class T>
DEVICE Shared<T> right_place(Shared<T> tile, int lane) {
    return tile + Swizzle<D>::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

// The left operand of step k: rows of the tile from `row` on, columns from 16 k on.
template <int D, class T>
DEVICE void load_left(uint32_t (&a)[4], Shared<T> place, int row, int k) {
    ldmatrix_x4(a, Swizzle<D>::step(place, 2 * k) + row * D);
}

// sums (16 M_TILES x N) += left rows^T, with `right` in an N x D tile; left(a, i, k) gives operand a of step k.
template <int D, class T, int M_TILES, int N_TILES, class Left>
DEVICE void inner_product(float (&sums)[M_TILES][N_TILES][4], const Left& left, Shared<T> right) {
    UNROLL
    for (int k = 0; k < D / 16; ++k) {
        uint32_t a[M_TILES][4];
        UNROLL
        for (int i = 0; i < M_TILES; ++i) left(a[i], i, k);
        UNROLL
        for (int j = 0; j < N_TILES; j += 2) {
            uint32_t b[4];
            ldmatrix_x4(b, Swizzle<D>::step(right, 2 * k) + j * 8 * D);
            UNROLL
            for (int i = 0; i < M_TILES; ++i) {
                mma_m16n8k16<T>(sums[i][j], a[i], b[0], b[1]);
                mma_m16n8k16<T>(sums[i][j + 1], a[i], b[2], b[3]);
            }
        }
    }
}

// Columns [16 k, 16 k + 16) of a tile of accumulators as the left operand of a product over them.
template <class T, int N_TILES>
DEVICE void pack_left(uint32_t (&a)[4], const float (&tile)[N_TILES][4], int k) {
    a[0] = pack2<T>(tile[2 * k][0], tile[2 * k][1]);
    a[1] = pack2<T>(tile[2 * k][2], tile[2 * k][3]);
    a[2] = pack2<T>(tile[2 * k + 1][0], tile[2 * k + 1][1]);
    a[3] = pack2<T>(tile[2 * k + 1][2], tile[2 * k + 1][3]);
}

// sums += a rows, for 16 rows of a D wide tile from `row` on, its columns from 8 `packet` on.
template <int D, class T, int M_TILES, int N_TILES>
DEVICE void add_product(float (&sums)[M_TILES][N_TILES][4], const uint32_t (&a)[M_TILES][4], Shared<T> right, int row,
                        int packet) {
    UNROLL
    for (int j = 0; j < N_TILES; j += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, Swizzle<D>::step(right, packet + j) + row * D);
        UNROLL
        for (int i = 0; i < M_TILES; ++i) {
            mma_m16n8k16<T>(sums[i][j], a[i], b[0], b[1]);
            mma_m16n8k16<T>(sums[i][j + 1], a[i], b[2], b[3]);
        }
    }
}

// Accumulators, each row times its factor, rounded into 16 rows of a tile from column 8 `packet` on.
template <int D, class T, int N_TILES>
DEVICE void store_rows(const float (&sums)[N_TILES][4], float upper, float lower, Shared<T> tile, int row, int packet,
                       int lane) {
    UNROLL
    for (int j = 0; j < N_TILES; ++j) {
        int r = row + lane / 4, t = lane % 4 * 2;
        (tile + (Swizzle<D>::offset(r, packet + j) + t)).template as<uint32_t>()[0] =
            pack2<T>(upper * sums[j][0], upper * sums[j][1]);
        (tile + (Swizzle<D>::offset(r + 8, packet + j) + t)).template as<uint32_t>()[0] =
            pack2<T>(lower * sums[j][2], lower * sums[j][3]);
    }
}

// The inverse of Copy, at once: rows [first, first + ROWS) of a head from a tile.
template <class T, int D, int ROWS, int THREADS>
DEVICE void copy_out(Shared<T> tile, const Heads<T>& x, int b, int h, int first, int rows, int D_in_memory,
                     unsigned thread = threadIdx.x) {
    constexpr int GROUP = Swizzle<D>::GROUP, STEP = THREADS / GROUP;
    int packet = thread % GROUP;
    Global<T> to = x.head(b, h);
    UNROLL
    for (int i = 0; i < ROWS / STEP; ++i) {
        int row = thread / GROUP + i * STEP;
        UNROLL
        for (int c = packet; c < D / 8; c += GROUP)
            if (first + row < rows && c * 8 < D_in_memory)
                store(to + ((first + row) * x.stride_t + c * 8), load<8>(tile + Swizzle<D>::offset(row, c)));
    }
}

}  // namespace gptkernels
