// Decode attention over pages of both formats, by warps that know nothing of each other.
//
// A warp takes its span (schedule.cuh) tile by tile. The copies of the next tiles are always on their
// way, those of the next segments too; so there is no pause where one request ends.
#pragma once

#include <hma/attention.cuh>
#include <hma/params.h>
#include <hma/schedule.cuh>
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

 public:
  static constexpr int THREADS = WARPS * WARP_SIZE;
  static constexpr int HEADS = Attention::HEADS;
  static constexpr int SHARED_BYTES = WARPS * STAGES * STAGE_BYTES;
  using Space = Workspace<HEADS, V_DIM>;

  HMA_DEVICE explicit Decode(const DecodeParams& params)
      : p(params),
        lane(lane_index()),
        space(params, WARPS),
        span(space.spans()[block_x() * WARPS + warp_index()]),
        ring(Shared(shared_memory()) + warp_index() * (STAGES * STAGE_BYTES)),
        attention(params) {}

  HMA_DEVICE void run() {
    allow_next_kernel();
    if (span.count == 0) return;
    copied = segment(0);
    Segment work = copied;
    int left = 0, at = -1;  // tiles of `work` that are still to be read; which segment it is
    // STAGES tiles are asked for before the first is read, and one more whenever one has been read:
    // into the stage where that one was.
    Shared stage = ring;
    int ahead = 0;
#pragma unroll 1
    while (true) {
      if (ahead == STAGES) {
        if (left == 0) {
          while (++at < span.count && segment(at).tiles == 0) continue;
          if (at >= span.count) return;
          work = segment(at);
          left = work.tiles;
          attention.load_query(work);
          attention.clear();
        }
        wait_for_copies<STAGES - 1>();
        sync_warp();
        read(stage, work.tiles - left < work.bfp8_tiles);
        if (--left == 0) attention.finish(work, space);
        sync_warp();
      } else {
        ++ahead;
      }
      copy(stage);
      commit_copies();
      stage = stage + STAGE_BYTES;
      if (stage == ring + STAGES * STAGE_BYTES) stage = ring;
    }
  }

 private:
  HMA_DEVICE const Segment& segment(int i) const { return space.segments()[span.first + i]; }

  HMA_DEVICE void read(Shared stage, bool bfp8) {
    const uint2 visible = (stage + (K_BYTES + V_BYTES)).load_8();
    const int begin = int(visible.x), end = int(visible.y);
    if (begin >= end) return;
    if (bfp8) {
      attention.template attend<Bfp8<DIM>, Bfp8<V_DIM>>(stage, stage + K_BYTES, begin, end);
    } else {
      attention.template attend<Bf16<DIM>, Bf16<V_DIM>>(stage, stage + K_BYTES, begin, end);
    }
  }

  // Asks for the span's next tile, if there is one.
  HMA_DEVICE void copy(Shared stage) {
    while (copied_tiles == copied.tiles) {
      if (copied_at + 1 >= span.count) return;
      copied = segment(++copied_at);
      copied_tiles = 0;
    }
    const int in_cache = copied_tiles % WARP_SIZE;
    if (in_cache == 0) look_up(copied_tiles + lane);
    const bool bfp8 = copied_tiles < copied.bfp8_tiles;
    const int64_t page = from_lane(lane_page, in_cache);
    const int begin = from_lane(lane_begin, in_cache), end = from_lane(lane_end, in_cache);
    if (lane == 0) (stage + (K_BYTES + V_BYTES)).store_8(begin, end);
    if (begin < end) {
      if (bfp8) {
        copy_tile<Bfp8<DIM>, Bfp8<V_DIM>>(p.bfp8, stage, page, 0, begin, end);
      } else {
        const int half = (copied_tiles - copied.bfp8_tiles + copied.bf16_half) % 2;
        copy_tile<Bf16<DIM>, Bf16<V_DIM>>(p.bf16, stage, page, half * Bf16<DIM>::TOKENS, begin,
                                          end);
      }
    }
    ++copied_tiles;
  }

  template <typename K, typename V>
  HMA_DEVICE void copy_tile(const PagedKVParams& kv, Shared stage, int64_t page, int first_token,
                            int begin, int end) {
    K::copy(stage, kv.k + page * kv.k_page_bytes + int64_t(copied.kv_head) * K::PAGE_BYTES,
            first_token, begin, end);
    V::copy(stage + K_BYTES,
            kv.v + page * kv.v_page_bytes + int64_t(copied.kv_head) * V::PAGE_BYTES, first_token,
            begin, end);
  }

  // The page of one of the segment's tiles, and which of the tile's tokens are visible.
  HMA_DEVICE void look_up(int tile) {
    lane_begin = lane_end = 0;
    if (tile >= copied.tiles) return;
    int position, tokens;
    if (tile < copied.bfp8_tiles) {
      const int64_t entry = copied.bfp8_entry + tile;
      lane_page = p.bfp8.indices[entry];
      position = int(p.bfp8.pos[entry]);
      tokens = Bfp8<DIM>::TOKENS;
    } else {
      const int half = tile - copied.bfp8_tiles + copied.bf16_half;
      const int64_t entry = copied.bf16_entry + half / 2;
      lane_page = p.bf16.indices[entry];
      position = int(p.bf16.pos[entry]) + half % 2 * Bf16<DIM>::TOKENS;
      tokens = Bf16<DIM>::TOKENS;
    }
    lane_begin = copied.begin > position ? copied.begin - position : 0;
    lane_end = copied.end - position < tokens ? copied.end - position : tokens;
  }

  const DecodeParams& p;
  const int lane;
  const Space space;
  const Span span;
  const Shared ring;
  Attention attention;

  // The copying side: its segment, and how many of that one's tiles have been asked for. Lane i
  // knows the page and the visible tokens of the i-th of the next WARP_SIZE tiles.
  Segment copied;
  int copied_at = 0, copied_tiles = 0;
  int64_t lane_page = 0;
  int lane_begin = 0, lane_end = 0;
};

}  // namespace hma
