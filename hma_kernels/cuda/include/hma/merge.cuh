// The softmax states of a block's warps, merged in the order of the warps into the partial state of
// the block's work item.
#pragma once

#include <hma/attention.cuh>
#include <hma/params.h>
#include <hma/work_item.cuh>

namespace hma {

// Shared memory holds WARP_BYTES for each warp, of which its output takes OUT_BYTES, and behind
// them the maxima and sums of all warps, STATE_BYTES.
template <int HEAD_TILES, int V_DIM, int WARPS>
struct WarpMerge {
  static constexpr int HEADS = HEADS_PER_TILE * HEAD_TILES;
  static constexpr int OUT_BYTES = HEADS * V_DIM * 4;
  static constexpr int STATE_BYTES = WARPS * HEADS * 2 * 4;
  static constexpr int THREADS = WARPS * WARP_SIZE;

  template <int WARP_BYTES, typename Attention>
  HMA_DEVICE static void run(const DecodeParams& p, const WorkItem& work, Attention& own,
                             uint8_t* own_memory) {
    const int lane = lane_index(), warp = warp_index(), r = lane / 4, c = lane % 4;
    auto* states = reinterpret_cast<float*>(shared_memory() + WARPS * WARP_BYTES);
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        for (int mask = 4; mask < WARP_SIZE; mask *= 2) {
          own.state_sum[tile][i] += from_lane_xor(own.state_sum[tile][i], mask);
        }
        const int head = tile * HEADS_PER_TILE + 2 * c + i;
        if (r == 0) {
          states[(warp * HEADS + head) * 2] = own.state_max[tile][i];
          states[(warp * HEADS + head) * 2 + 1] = own.state_sum[tile][i];
        }
      }
    }
    sync_block();
    auto* out = reinterpret_cast<float*>(own_memory);
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int head = tile * HEADS_PER_TILE + 2 * c + i;
        const float share = share_of(own.state_max[tile][i], max_of(states, head)) * OUT_UNIT;
#pragma unroll
        for (int group = 0; group < V_DIM / GROUP; ++group) {
          float* to = out + head * V_DIM + group * GROUP + 2 * r;
          to[0] = own.state_out[tile][group][i] * share;
          to[1] = own.state_out[tile][group][i + 2] * share;
        }
      }
    }
    sync_block();
    const int left = p.gqa_group_size - work.first_head, heads = left < HEADS ? left : HEADS;
    const int64_t slot =
        (int64_t(work.item) * p.kv_heads + work.kv_head) * p.gqa_group_size + work.first_head;
    const int thread = warp * WARP_SIZE + lane;
    for (int i = thread; i < heads * V_DIM; i += THREADS) {
      float total = 0;
      for (int from = 0; from < WARPS; ++from) {
        total += reinterpret_cast<const float*>(shared_memory() + from * WARP_BYTES)[i];
      }
      p.partial_out[slot * V_DIM + i] = total;
    }
    for (int head = thread; head < heads; head += THREADS) {
      const float item_max = max_of(states, head);
      float total = 0;
      for (int from = 0; from < WARPS; ++from) {
        const float* state = states + (from * HEADS + head) * 2;
        total += state[1] * share_of(state[0], item_max);
      }
      p.partial_max[slot + head] = item_max;
      p.partial_sum[slot + head] = total;
    }
  }

 private:
  HMA_DEVICE static float max_of(const float* states, int head) {
    float found = MINUS_INFINITY;
    for (int from = 0; from < WARPS; ++from) {
      found = fmaxf(found, states[(from * HEADS + head) * 2]);
    }
    return found;
  }

  // What a state counts for beside a larger maximum; -inf - -inf must not become NaN.
  HMA_DEVICE static float share_of(float own_max, float item_max) {
    return own_max == MINUS_INFINITY ? 0 : exp2_fast(own_max - item_max);
  }
};

}  // namespace hma
