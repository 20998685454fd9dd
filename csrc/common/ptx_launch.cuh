// Launching under nvcc (see common/device.cuh).
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace gptkernels {

inline void check_cuda(cudaError_t error, const char* what) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string("gptkernels: ") + what + " failed: " + cudaGetErrorString(error));
}

// The current device; reading an attribute costs less than a microsecond.
inline Device device() {
    int index, major, minor, processors, shared_bytes;
    check_cuda(cudaGetDevice(&index), "cudaGetDevice");
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index);
    check_cuda(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
               "cudaDeviceGetAttribute");
    return {10 * major + minor, processors, shared_bytes};
}

template <class... Parameters, class... Arguments>
void launch(const Launch& l, void (*kernel)(Parameters...), const Arguments&... arguments) {
    constexpr int WITHOUT_ASKING = 48 * 1024;
    if (l.shared_bytes > WITHOUT_ASKING)
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, l.shared_bytes), l.name);
    kernel<<<dim3(l.grid.x, l.grid.y, l.grid.z), l.threads, l.shared_bytes, (cudaStream_t)l.stream>>>(
        Parameters(arguments)...);
    check_cuda(cudaGetLastError(), l.name);
}

}  // namespace gptkernels
