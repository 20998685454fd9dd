// The thin layer through which .cu files reach the device. A kernel is ordinary CUDA C++ (__global__, threadIdx,
// __syncthreads, __shfl_xor_sync) that stays away from raw pointers: memory is reached through Global<T> and Shared<T>,
// which are plain addresses under nvcc. With GPTKERNELS_SIMT the same file is compiled by g++, and csrc/simt executes
// and checks it on the CPU. What there is:
//   numbers   bf16, fp16, Vector<T, N>, PACKET<T>, to_float, from_float<T>, pack2<T>, unpack2<T>, add2<T>, to_tf32
//   memory    Global<T>, Shared<T>: p[i], p + i, load<N>(p), store(p, vector), SHARED_ARRAY, dynamic_shared,
//             ldmatrix_x1/x2/x4(_trans), cp_async16, cp_async_commit, cp_async_wait<N>, atomicAdd
//   warp      FULL_WARP, __shfl_sync, __shfl_xor_sync, __shfl_down_sync, __ballot_sync, __any_sync, __all_sync, again
//   math      mma_m16n8k16<T>, mma_m16n8k8 (fp16), mma_m16n8k8_tf32, HAS_MMA<T>,
//             {exp2, log2, rcp, rsqrt}_approx
//   host      launch({name, grid, threads, shared_bytes, stream}, kernel, arguments...), device()
//
// A Global<const T> is read past the coherent cache (ld.global.nc): nothing may write there while the kernel runs.
// Shared memory is addressed by 32 bits. Warp functions take FULL_WARP and are called by all 32 lanes. Example:
//
//   template <class T>
//   __global__ void __launch_bounds__(128) reverse(Global<const T> x, Global<T> y) {     // 1024 elements a block
//       SHARED_ARRAY(T, tile, 1024);
//       int i = 8 * (int)threadIdx.x;
//       store(tile + i, load<8>(x + (int64_t)blockIdx.x * 1024 + i));
//       __syncthreads();
//       for (int j = i; j < i + 8; ++j) y[(int64_t)blockIdx.x * 1024 + j] = tile[1023 - j];
//   }
//   launch({"reverse", blocks, 128, 0, stream}, reverse<bf16>, x, y);                    // x, y: pointers
#pragma once

#include <cstdint>
#include <cstring>

namespace gptkernels {

// The architecture that is compiled for, 80 for sm_80, which csrc/simt stands for too.
#ifdef __CUDA_ARCH__
constexpr int ARCH = __CUDA_ARCH__ / 10;
#else
constexpr int ARCH = 80;
#endif
// Bytes of shared memory that a block may use. Later devices differ and may run each other's code, so that only on
// sm_75 a kernel that asks for more can be left empty: launchers refuse its tile there.
constexpr int MOST_SHARED = (ARCH < 80 ? 64 : 227) * 1024;

constexpr int WARP = 32;
constexpr unsigned FULL_WARP = 0xffffffffu;

// What a launcher chooses tiles by.
struct Device {
    int capability;    // 80 for sm_80
    int processors;    // streaming multiprocessors
    int shared_bytes;  // that one block may use
};

struct Grid {
    unsigned x, y, z;
    Grid(int64_t x, int64_t y = 1, int64_t z = 1) : x((unsigned)x), y((unsigned)y), z((unsigned)z) {}
};

struct Launch {
    const char* name;
    Grid grid;
    int threads;
    int shared_bytes;
    void* stream;  // a cudaStream_t
};

}  // namespace gptkernels

#ifdef GPTKERNELS_SIMT
#include "simt/device.h"
#else
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define UNROLL_BY4 _Pragma("unroll 4")
#include "common/number.cuh"
//
#include "common/ptx_launch.cuh"
#include "common/ptx_math.cuh"
#include "common/ptx_memory.cuh"
#endif

namespace gptkernels {

// x, from each lane to itself. Neither the compiler nor the assembler (which sees through an empty asm statement) knows
// that it is x: what is computed from it is computed anew, where registers are too few to keep it from before.
template <class T>
DEVICE T again(T x) {
    return __shfl_sync(FULL_WARP, x, (int)threadIdx.x);
}

}  // namespace gptkernels
