// Starts a kernel.
#pragma once

#include <cuda_runtime.h>

namespace hma {

inline const char* failure_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// How many of its blocks the current device can run at a time; nullptr, or why that is unknown.
template <typename Params>
const char* resident_blocks(void (*kernel)(const Params), int threads, int shared_bytes,
                            int* blocks) {
  int device = 0, processors = 0, each = 0;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared_bytes);
  }
  *blocks = processors * each;
  return error == cudaSuccess && *blocks == 0 ? "a block needs more than a multiprocessor has"
                                              : failure_of(error);
}

// nullptr, or why it could not start. resident_blocks has been asked on this device.
template <typename Params>
const char* launch(void (*kernel)(const Params), int blocks, int threads, int shared_bytes,
                   void* stream, const Params& params) {
  kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
  return failure_of(cudaGetLastError());
}

}  // namespace hma
