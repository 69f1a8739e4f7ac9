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

// nullptr, or why it could not start. resident_blocks has been asked on this device. An early kernel
// may be started before the one ahead of it in the stream has ended, and waits for that itself.
template <typename Params>
const char* launch(void (*kernel)(const Params), int blocks, int threads, int shared_bytes,
                   void* stream, const Params& params, bool early = false) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = early && HMA_ARCHITECTURE >= 90 ? 1 : 0;
  return failure_of(cudaLaunchKernelEx(&config, kernel, params));
}

}  // namespace hma
