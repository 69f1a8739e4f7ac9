// Decode attention over pages of both formats, as far as one partial softmax state per work item.
//
// A block takes one work item, one KV head and up to 8 * HEAD_TILES of its query heads. Its warps
// take the item's tiles in turn, each with its own ring of copies under way and its own softmax
// state, and meet only at the end.
#pragma once

#include <hma/attention.cuh>
#include <hma/merge.cuh>
#include <hma/params.h>
#include <hma/tiles.cuh>
#include <hma/warp.cuh>
#include <hma/work_item.cuh>

namespace hma {

constexpr int larger(int a, int b) { return a > b ? a : b; }

template <typename Query, int DIM, int V_DIM, int HEAD_TILES, int WARPS, int STAGES>
class DecodeWarp {
  using Attention = WarpAttention<Query, DIM, V_DIM, HEAD_TILES>;
  using Merge = WarpMerge<HEAD_TILES, V_DIM, WARPS>;

  static constexpr int K_BYTES = larger(Bfp8<DIM>::BYTES, Bf16<DIM>::BYTES);
  static constexpr int V_BYTES = larger(Bfp8<V_DIM>::BYTES, Bf16<V_DIM>::BYTES);
  static constexpr int STAGE_BYTES = K_BYTES + V_BYTES + COPY_BYTES;  // and the visible tokens
  static constexpr int WARP_BYTES = larger(STAGES * STAGE_BYTES, Merge::OUT_BYTES);

 public:
  static constexpr int THREADS = Merge::THREADS;
  static constexpr int HEADS = Attention::HEADS;
  static constexpr int SHARED_BYTES = WARPS * WARP_BYTES + Merge::STATE_BYTES;

  HMA_DEVICE explicit DecodeWarp(const DecodeParams& params)
      : p(params), lane(lane_index()), warp(warp_index()), attention(params) {}

  HMA_DEVICE void run() {
    if (!work.load(p, HEADS)) return;
    ring = shared_memory() + warp * WARP_BYTES;
    attention.load_query(work);
    attention.clear();
    work.load_pages(p);
    if (work.bfp8.count > 0) stream<Bfp8<DIM>, Bfp8<V_DIM>>(p.bfp8, work.bfp8);
    if (work.bf16.count > 0) stream<Bf16<DIM>, Bf16<V_DIM>>(p.bf16, work.bf16);
    Merge::template run<WARP_BYTES>(p, work, attention, ring);
  }

 private:
  // Every WARPS-th tile of the pages, of which STAGES are fetched ahead.
  template <typename K, typename V>
  HMA_DEVICE void stream(const PagedKVParams& kv, const PageRange& pages) {
    constexpr int TILES_PER_PAGE = PAGE / K::TOKENS;
    const int tiles = pages.count * TILES_PER_PAGE;
    const int own_tiles = tiles > warp ? (tiles - warp + WARPS - 1) / WARPS : 0;
    // Lane i knows the page and the visible tokens of the i-th of the next WARP_SIZE tiles.
    int64_t lane_page = 0;
    int lane_begin = 0, lane_end = 0;

    auto fetch = [&](int n) {
      if (n % WARP_SIZE == 0) {
        const int tile = (n + lane) * WARPS + warp;
        lane_begin = lane_end = 0;
        if (tile < tiles) {
          const int64_t entry = pages.first + tile / TILES_PER_PAGE;
          const int position = int(kv.pos[entry]) + tile % TILES_PER_PAGE * K::TOKENS;
          lane_page = kv.indices[entry];
          lane_begin = work.begin > position ? work.begin - position : 0;
          lane_end = work.end - position < K::TOKENS ? work.end - position : K::TOKENS;
        }
      }
      if (n < own_tiles) {
        const int64_t page = from_lane(lane_page, n % WARP_SIZE);
        const int begin = from_lane(lane_begin, n % WARP_SIZE);
        const int end = from_lane(lane_end, n % WARP_SIZE);
        uint8_t* stage = ring + n % STAGES * STAGE_BYTES;
        if (lane == 0) {
          int* visible = reinterpret_cast<int*>(stage + K_BYTES + V_BYTES);
          visible[0] = begin;
          visible[1] = end;
        }
        if (begin < end) {
          const int first_token = (n * WARPS + warp) % TILES_PER_PAGE * K::TOKENS;
          K::copy(stage, kv.k + page * kv.k_page_bytes + int64_t(work.kv_head) * K::PAGE_BYTES,
                  first_token, begin, end);
          V::copy(stage + K_BYTES,
                  kv.v + page * kv.v_page_bytes + int64_t(work.kv_head) * V::PAGE_BYTES,
                  first_token, begin, end);
        }
      }
      commit_copies();
    };

    for (int n = 0; n < STAGES; ++n) fetch(n);
    for (int n = 0; n < own_tiles; ++n) {
      wait_for_copies<STAGES - 1>();
      sync_warp();
      const uint8_t* stage = ring + n % STAGES * STAGE_BYTES;
      const int* visible = reinterpret_cast<const int*>(stage + K_BYTES + V_BYTES);
      if (visible[0] < visible[1]) {
        attention.template attend<K, V>(stage, stage + K_BYTES, visible[0], visible[1]);
      }
      sync_warp();
      fetch(n + STAGES);
    }
  }

  const DecodeParams& p;
  const int lane, warp;
  WorkItem work;
  uint8_t* ring;
  Attention attention;
};

}  // namespace hma
