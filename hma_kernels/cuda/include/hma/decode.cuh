// Decode attention over pages of both formats.
//
// A block takes its span (span.cuh) segment by segment. Its warps take a segment's tiles in turn,
// each with its own ring of copies under way and its own softmax state, and meet only at the
// segment's end.
#pragma once

#include <hma/attention.cuh>
#include <hma/merge.cuh>
#include <hma/params.h>
#include <hma/span.cuh>
#include <hma/tiles.cuh>
#include <hma/warp.cuh>

namespace hma {

constexpr int larger(int a, int b) { return a > b ? a : b; }

template <typename Query, int DIM, int V_DIM, int HEAD_TILES, int WARPS, int STAGES>
class Decode {
  using Attention = WarpAttention<Query, DIM, V_DIM, HEAD_TILES>;

  static constexpr int K_BYTES = larger(Bfp8<DIM>::BYTES, Bf16<DIM>::BYTES);
  static constexpr int V_BYTES = larger(Bfp8<V_DIM>::BYTES, Bf16<V_DIM>::BYTES);
  static constexpr int STAGE_BYTES = K_BYTES + V_BYTES + COPY_BYTES;  // and the visible tokens
  static constexpr int OUT_BYTES = Attention::HEADS * V_DIM * 4;
  static constexpr int WARP_BYTES = larger(STAGES * STAGE_BYTES, OUT_BYTES);
  using UnitMerge = Merge<Query, HEAD_TILES, V_DIM, WARPS, WARP_BYTES>;

 public:
  static constexpr int THREADS = UnitMerge::THREADS;
  static constexpr int HEADS = Attention::HEADS;
  static constexpr int SHARED_BYTES = WARPS * WARP_BYTES + UnitMerge::STATE_BYTES;
  static constexpr int MAX_BLOCKS = UnitMerge::MAX_BLOCKS;
  using Space = Workspace<HEADS, V_DIM>;

  HMA_DEVICE explicit Decode(const DecodeParams& params)
      : p(params), lane(lane_index()), warp(warp_index()), attention(params) {}

  HMA_DEVICE void run() {
    clear_empty();
    const int head_blocks = (p.gqa_group_size + HEADS - 1) / HEADS;
    const int units = p.kv_heads * head_blocks;  // of a request
    const Spans spans(p, units, WARPS);
    if (spans.pages == 0 || block_x() >= spans.blocks) return;
    const int64_t start = spans.start(block_x()), end = spans.start(block_x() + 1);
    ring = shared_memory() + warp * WARP_BYTES;
    work.request = find_request(start / units);
    for (int64_t page = start; page < end;) {
      while (page >= pages_before(p, work.request + 1) * units) ++work.request;
      page = work.load(p, spans, head_blocks, HEADS, page, start, end);
      attention.clear();
      query_is_loaded = false;
      if (work.bfp8.count > 0) stream<Bfp8<DIM>, Bfp8<V_DIM>>(p.bfp8, work.bfp8);
      if (work.bf16.count > 0) stream<Bf16<DIM>, Bf16<V_DIM>>(p.bf16, work.bf16);
      UnitMerge(p, work).run(attention);
      sync_block();  // shared memory is free again
    }
  }

 private:
  // The output of requests without pages: no block has a segment of them.
  HMA_DEVICE void clear_empty() {
    for (int request = block_x(); request < p.batch_size; request += p.blocks) {
      if (pages_before(p, request) != pages_before(p, request + 1)) continue;
      const int64_t values = int64_t(p.kv_heads) * p.gqa_group_size * V_DIM;
      auto* out = static_cast<Query*>(p.out) + request * values;
      for (int64_t i = warp * WARP_SIZE + lane; i < values; i += THREADS) {
        out[i] = from_float<Query>(0);
      }
    }
  }

  // The request that has the page-th page of all.
  HMA_DEVICE int find_request(int64_t page) {
    auto* found = reinterpret_cast<int*>(shared_memory());
    for (int i = warp * WARP_SIZE + lane; i < p.batch_size; i += THREADS) {
      if (pages_before(p, i) <= page && page < pages_before(p, i + 1)) *found = i;
    }
    sync_block();
    const int request = *found;
    sync_block();
    return request;
  }

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
    if (!query_is_loaded) attention.load_query(work);  // while the first pages are on their way
    query_is_loaded = true;
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
  Segment work;
  bool query_is_loaded;
  uint8_t* ring;
  Attention attention;
};

}  // namespace hma
