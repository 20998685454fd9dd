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

// The newest architecture that code was compiled for, which is what later devices run.
constexpr int NEWEST = [](auto... all) {
    int newest = 0;
    for (int arch : {all...}) newest = arch > newest ? arch : newest;
    return newest / 10;
}(__CUDA_ARCH_LIST__);

// The current device, but no newer than its code; reading an attribute costs less than a microsecond.
inline Device device() {
    int index, major, minor, processors, shared_bytes;
    check_cuda(cudaGetDevice(&index), "cudaGetDevice");
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index);
    check_cuda(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
               "cudaDeviceGetAttribute");
    int capability = 10 * major + minor < NEWEST ? 10 * major + minor : NEWEST;
    if (capability < 80 && shared_bytes > 64 * 1024) shared_bytes = 64 * 1024;  // as MOST_SHARED
    return {capability, processors, shared_bytes};
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
