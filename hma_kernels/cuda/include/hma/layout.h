// The constants of hma_kernels/layout.py; test/gpu/test_compiles.py compares the two.
#pragma once

namespace hma {

constexpr int TILE = 32;
constexpr int GROUP = 16;
constexpr int FACE = 16;
constexpr int PAGE = 32;
constexpr int EXPONENT_BYTES = TILE * TILE / GROUP;
constexpr int TILE_BYTES = EXPONENT_BYTES + TILE * TILE;

}  // namespace hma
