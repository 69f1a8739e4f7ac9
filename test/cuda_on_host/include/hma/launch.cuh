// hma/launch.cuh for threads on the host: blocks run one after another.
#pragma once

#include <hma/block.h>

#include <string>

namespace hma {

// As many as HMA_BLOCKS says.
template <typename Params>
const char* resident_blocks(void (*)(const Params), int, int, int* blocks) {
  const char* wanted = std::getenv("HMA_BLOCKS");
  *blocks = wanted != nullptr ? std::atoi(wanted) : 8;
  return nullptr;
}

template <typename Params>
const char* launch(void (*kernel)(const Params), int blocks, int threads, int shared_bytes, void*,
                   const Params& params, bool = false) {
  static std::string failure;
  try {
    for (int x = 0; x < blocks; ++x) {
      on_host::Block(x, blocks, threads, shared_bytes, [&] { kernel(params); }).run();
    }
  } catch (const std::exception& error) {
    failure = error.what();
    return failure.c_str();
  }
  return nullptr;
}

}  // namespace hma
