// The output of a unit, from the softmax states of the warps that share it.
#pragma once

#include <hma/params.h>
#include <hma/schedule.cuh>
#include <hma/warp.cuh>

namespace hma {

constexpr float MINUS_INFINITY = -__builtin_inff();
constexpr float LOG2E = 1.4426950408889634f;

// What a state counts for beside a larger maximum; -inf - -inf must not become NaN.
HMA_DEVICE float share_of(float own_max, float largest) {
  return own_max == MINUS_INFINITY ? 0 : exp2_fast(own_max - largest);
}

// The weight of a query head's sink, a logit that weighs no value, beside weights relative to a
// maximum; infinite where it is far above them all.
HMA_DEVICE float sink_weight(const DecodeParams& p, int head, float max) {
  return p.sinks == nullptr || max == MINUS_INFINITY ? 0 : exp2_fast(p.sinks[head] * LOG2E - max);
}

template <typename Query>
HMA_DEVICE void store(Query* to, float total, float sum) {
  *to = from_float<Query>(sum == 0 ? 0 : total / sum);
}

// A block merges the states of one query head of one request, warp after warp in a fixed order: each
// of its warps takes every WARPS-th state, and the last step adds what the warps have found.
template <typename Query, int HEADS, int V_DIM, int WARPS>
class Merge {
  static constexpr int VALUES = (V_DIM + WARP_SIZE - 1) / WARP_SIZE;  // of a lane

 public:
  static constexpr int THREADS = WARPS * WARP_SIZE;
  static constexpr int SHARED_BYTES = WARPS * (V_DIM + 2) * 4;

  HMA_DEVICE static void run(const DecodeParams& p, int warps_per_block) {
    const Workspace<HEADS, V_DIM> space(p, warps_per_block);
    const int heads = p.kv_heads * p.gqa_group_size;
    const int request = block_x() / heads, head = block_x() % heads;
    const int kv_head = head / p.gqa_group_size, in_group = head % p.gqa_group_size;
    const int unit =
        (request * p.kv_heads + kv_head) * space.head_blocks + in_group / HEADS;
    const UnitWarps shared = space.unit_warps()[unit];
    const int lane = lane_index(), warp = warp_index(), row = in_group % HEADS;
    auto* out = static_cast<Query*>(p.out) + (int64_t(request) * heads + head) * V_DIM;
    if (shared.count == 1) return;
    wait_for_previous_kernel();
    if (shared.count == 0) {
      for (int i = warp * WARP_SIZE + lane; i < V_DIM; i += THREADS) out[i] = from_float<Query>(0);
      return;
    }
    auto row_of = [&](int n) {
      const int slot = n == 0 ? shared.first_partial : 2 * (shared.first_warp + n);
      return int64_t(slot) * HEADS + row;
    };

    float largest = MINUS_INFINITY;
    for (int n = warp * WARP_SIZE + lane; n < shared.count; n += THREADS) {
      largest = fmaxf(largest, space.states()[row_of(n) * 2]);
    }
    largest = largest_of_block(largest);
    float sum = 0, total[VALUES] = {};
#pragma unroll 4
    for (int n = warp; n < shared.count; n += WARPS) {
      const float* state = space.states() + row_of(n) * 2;
      const float* from = space.out() + row_of(n) * V_DIM;
      const float share = share_of(state[0], largest);
      sum += state[1] * share;
#pragma unroll
      for (int i = 0; i < VALUES; ++i) {
        const int at = i * WARP_SIZE + lane;
        if (at < V_DIM) total[i] += from[at] * share;
      }
    }
    auto* found = reinterpret_cast<float*>(shared_memory());
    float* own = found + warp * (V_DIM + 1);
#pragma unroll
    for (int i = 0; i < VALUES; ++i) {
      const int at = i * WARP_SIZE + lane;
      if (at < V_DIM) own[at] = total[i];
    }
    if (lane == 0) own[V_DIM] = sum;
    const float sink = sink_weight(p, head, largest);
    sync_block();
    for (int i = warp * WARP_SIZE + lane; i < V_DIM; i += THREADS) {
      float all = 0, weights = sink;
      for (int w = 0; w < WARPS; ++w) {
        all += found[w * (V_DIM + 1) + i];
        weights += found[w * (V_DIM + 1) + V_DIM];
      }
      store(out + i, all, weights);
    }
  }

 private:
  HMA_DEVICE static float largest_of_block(float x) {
    auto* each = reinterpret_cast<float*>(shared_memory()) + WARPS * (V_DIM + 1);
    for (int mask = 1; mask < WARP_SIZE; mask *= 2) x = fmaxf(x, from_lane_xor(x, mask));
    if (lane_index() == 0) each[warp_index()] = x;
    sync_block();
    for (int w = 0; w < WARPS; ++w) x = fmaxf(x, each[w]);
    return x;
  }
};

}  // namespace hma
