// One instance of the decode kernel behind a C interface; its shape is given by macros.
#include <hma/decode.cuh>
#include <hma/launch.cuh>

using Warp = hma::DecodeWarp<HMA_QUERY, HMA_HEAD_DIM, HMA_V_HEAD_DIM, HMA_HEAD_TILES, HMA_WARPS,
                             HMA_STAGES>;

HMA_KERNEL(hma_decode_kernel, hma::DecodeParams, Warp::THREADS) { Warp(params).run(); }

extern "C" const char* hma_decode(const hma::DecodeParams* params, int items, void* stream) {
  const int head_blocks = (params->gqa_group_size + Warp::HEADS - 1) / Warp::HEADS;
  const hma::Grid grid{items, params->kv_heads, head_blocks};
  return hma::launch(&hma_decode_kernel, grid, Warp::THREADS, Warp::SHARED_BYTES, stream, *params);
}

extern "C" int hma_params_bytes() { return sizeof(hma::DecodeParams); }
