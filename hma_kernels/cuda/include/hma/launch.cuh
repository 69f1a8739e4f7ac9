// Starts a kernel.
#pragma once

#include <cuda_runtime.h>

namespace hma {

struct Grid {
  int x, y, z;
};

// nullptr, or why it could not start.
template <typename Params>
const char* launch(void (*kernel)(const Params), Grid grid, int threads, int shared_bytes,
                   void* stream, const Params& params) {
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) {
    kernel<<<dim3(grid.x, grid.y, grid.z), threads, shared_bytes,
             static_cast<cudaStream_t>(stream)>>>(params);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace hma
