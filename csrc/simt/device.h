// What CUDA C++ and common/device.cuh name, for g++: kernels are then executed and checked on the CPU.
#pragma once

#include <cmath>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define DEVICE __forceinline__  // also so that every access in a kernel has an address of its own
#define UNROLL
#define UNROLL_BY4

#include "common/number.cuh"
//
#include "simt/engine.h"
#include "simt/math.h"
#include "simt/memory.h"
#include "simt/warp.h"

#define threadIdx (::gptkernels::simt::coordinates->thread)
#define blockIdx (::gptkernels::simt::coordinates->block)
#define blockDim (::gptkernels::simt::coordinates->block_size)
#define gridDim (::gptkernels::simt::coordinates->grid)

namespace gptkernels {

inline Device device() { return simt::emulated_device(); }

// A kernel's pointers become Global<T> here, once, and take the buffers that they point into along.
template <class... Parameters, class... Arguments>
void launch(const Launch& l, void (*kernel)(Parameters...), const Arguments&... arguments) {
    std::tuple<Parameters...> parameters{Parameters(arguments)...};
    simt::run(l, [&] { std::apply(kernel, parameters); });
}

}  // namespace gptkernels
