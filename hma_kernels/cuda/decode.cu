// One instance of the decode kernels behind a C interface; its shape is given by macros.
#include <hma/decode.cuh>
#include <hma/launch.cuh>
#include <hma/merge.cuh>
#include <hma/schedule.cuh>

using Decode = hma::Decode<HMA_QUERY, HMA_HEAD_DIM, HMA_V_HEAD_DIM, HMA_HEAD_TILES, HMA_WARPS,
                           HMA_STAGES>;
using Schedule = hma::Schedule<Decode::HEADS, HMA_V_HEAD_DIM, HMA_WARPS>;
template <int WARPS>
using Merge = hma::Merge<HMA_QUERY, Decode::HEADS, HMA_V_HEAD_DIM, WARPS>;

constexpr int SCHEDULE_THREADS = 128;
// Heads of all requests: where a merge has few blocks, each must be quick.
constexpr int FEW_OUTPUTS = 128, SOME_OUTPUTS = 512;

HMA_KERNEL(hma_schedule_kernel, hma::DecodeParams, SCHEDULE_THREADS) {
  const int thread = hma::warp_index() * hma::WARP_SIZE + hma::lane_index();
  Schedule(params).run(hma::block_x() * SCHEDULE_THREADS + thread,
                       hma::grid_x() * SCHEDULE_THREADS);
}

HMA_KERNEL(hma_decode_kernel, hma::DecodeParams, Decode::THREADS) { Decode(params).run(); }

HMA_KERNEL(hma_merge_16_kernel, hma::DecodeParams, Merge<16>::THREADS) {
  Merge<16>::run(params, HMA_WARPS);
}

HMA_KERNEL(hma_merge_8_kernel, hma::DecodeParams, Merge<8>::THREADS) {
  Merge<8>::run(params, HMA_WARPS);
}

HMA_KERNEL(hma_merge_2_kernel, hma::DecodeParams, Merge<2>::THREADS) {
  Merge<2>::run(params, HMA_WARPS);
}

template <int WARPS>
static const char* merge(void (*kernel)(const hma::DecodeParams), const hma::DecodeParams& params,
                         int outputs, void* stream) {
  return hma::launch(kernel, outputs, Merge<WARPS>::THREADS, Merge<WARPS>::SHARED_BYTES, stream,
                     params, true);
}

// As many as the current device runs at a time.
extern "C" const char* hma_blocks(int* blocks) {
  return hma::resident_blocks(&hma_decode_kernel, Decode::THREADS, Decode::SHARED_BYTES, blocks);
}

static int64_t units_of(const hma::DecodeParams& params) {
  const int head_blocks = (params.gqa_group_size + Decode::HEADS - 1) / Decode::HEADS;
  return int64_t(params.batch_size) * params.kv_heads * head_blocks;
}

extern "C" int64_t hma_workspace_bytes(const hma::DecodeParams* params) {
  return Decode::Space::bytes(int64_t(params->blocks) * HMA_WARPS, units_of(*params));
}

// Divides the batch anew after the contents of the page table have changed.
extern "C" const char* hma_schedule(const hma::DecodeParams* params, void* stream) {
  const int64_t warps = int64_t(params->blocks) * HMA_WARPS;
  const int64_t parts = units_of(*params) * Schedule::THREADS_A_UNIT;
  const int blocks = int(((parts > warps ? parts : warps) - 1) / SCHEDULE_THREADS + 1);
  return hma::launch(&hma_schedule_kernel, blocks, SCHEDULE_THREADS, 0, stream, *params);
}

extern "C" const char* hma_decode(const hma::DecodeParams* params, void* stream) {
  const char* failure = hma::launch(&hma_decode_kernel, params->blocks, Decode::THREADS,
                                    Decode::SHARED_BYTES, stream, *params);
  if (failure != nullptr) return failure;
  const int outputs = params->batch_size * params->kv_heads * params->gqa_group_size;
  if (outputs <= FEW_OUTPUTS) return merge<16>(&hma_merge_16_kernel, *params, outputs, stream);
  if (outputs <= SOME_OUTPUTS) return merge<8>(&hma_merge_8_kernel, *params, outputs, stream);
  return merge<2>(&hma_merge_2_kernel, *params, outputs, stream);
}

extern "C" int hma_params_bytes() { return sizeof(hma::DecodeParams); }
