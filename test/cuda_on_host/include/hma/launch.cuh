// hma/launch.cuh for threads on the host: blocks run one after another.
#pragma once

#include <hma/block.h>

#include <string>

namespace hma {

struct Grid {
  int x, y, z;
};

template <typename Params>
const char* launch(void (*kernel)(const Params), Grid grid, int threads, int shared_bytes, void*,
                   const Params& params) {
  static std::string failure;
  try {
    for (int z = 0; z < grid.z; ++z) {
      for (int y = 0; y < grid.y; ++y) {
        for (int x = 0; x < grid.x; ++x) {
          on_host::Block(x, y, z, threads, shared_bytes, [&] { kernel(params); }).run();
        }
      }
    }
  } catch (const std::exception& error) {
    failure = error.what();
    return failure.c_str();
  }
  return nullptr;
}

}  // namespace hma
