// One instance of the decode kernel behind a C interface; its shape is given by macros.
#include <hma/decode.cuh>
#include <hma/launch.cuh>

using Decode = hma::Decode<HMA_QUERY, HMA_HEAD_DIM, HMA_V_HEAD_DIM, HMA_HEAD_TILES, HMA_WARPS,
                           HMA_STAGES>;

HMA_KERNEL(hma_decode_kernel, hma::DecodeParams, Decode::THREADS) { Decode(params).run(); }

// As many as the current device runs at a time.
extern "C" const char* hma_blocks(int* blocks) {
  const char* failure =
      hma::resident_blocks(&hma_decode_kernel, Decode::THREADS, Decode::SHARED_BYTES, blocks);
  if (*blocks > Decode::MAX_BLOCKS) *blocks = Decode::MAX_BLOCKS;
  return failure;
}

extern "C" int64_t hma_workspace_bytes(int blocks) { return Decode::Space::bytes(blocks); }

extern "C" const char* hma_decode(const hma::DecodeParams* params, void* stream) {
  return hma::launch(&hma_decode_kernel, params->blocks, Decode::THREADS, Decode::SHARED_BYTES,
                     stream, *params);
}

extern "C" int hma_params_bytes() { return sizeof(hma::DecodeParams); }
