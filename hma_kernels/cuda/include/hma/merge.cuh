// From the softmax states of a block's warps to the output of a unit.
//
// The warps' states are merged in the order of the warps. If the block has all of the unit, that is
// the output. Else it is a partial state in the workspace, and the last of the unit's blocks to
// arrive merges them, in the order of the blocks: the result does not depend on which one that is.
#pragma once

#include <hma/attention.cuh>
#include <hma/params.h>
#include <hma/span.cuh>

namespace hma {

// A block has at most two partial states: its span's first segment, and its last.
//
// In memory: how many blocks of a unit have arrived, counted at its first block and back at zero
// when the kernel ends; the partial states' maxima (units of log 2) and sums of weights; their
// weighted sums of V, not divided by the sum.
template <int HEADS, int V_DIM>
struct Workspace {
  int32_t* arrived;  // [blocks]
  float* states;     // [2 * blocks, HEADS, 2]
  float* out;        // [2 * blocks, HEADS, V_DIM]

  HMA_DEVICE Workspace(uint8_t* memory, int blocks)
      : arrived(reinterpret_cast<int32_t*>(memory)),
        states(reinterpret_cast<float*>(memory + arrived_bytes(blocks))),
        out(states + int64_t(4) * blocks * HEADS) {}

  HMA_HOST_DEVICE static int64_t arrived_bytes(int blocks) {
    return (int64_t(blocks) * 4 + 15) / 16 * 16;
  }

  HMA_HOST_DEVICE static int64_t bytes(int blocks) {
    return arrived_bytes(blocks) + int64_t(2) * blocks * HEADS * (V_DIM + 2) * 4;
  }
};

// Shared memory holds WARP_BYTES for each warp, of which its output takes OUT_BYTES, and behind
// them the maxima and sums of all warps, STATE_BYTES.
template <typename Query, int HEAD_TILES, int V_DIM, int WARPS, int WARP_BYTES>
class Merge {
 public:
  static constexpr int HEADS = HEADS_PER_TILE * HEAD_TILES;
  static constexpr int OUT_BYTES = HEADS * V_DIM * 4;
  static constexpr int STATE_BYTES = WARPS * HEADS * 2 * 4;
  static constexpr int THREADS = WARPS * WARP_SIZE;

  // So many blocks' shares of a unit fit into shared memory.
  static constexpr int MAX_BLOCKS = WARPS * WARP_BYTES / (HEADS * 4) - 1;

  HMA_DEVICE Merge(const DecodeParams& params, const Segment& segment)
      : p(params),
        work(segment),
        space(params.workspace, params.blocks),
        warp_states(reinterpret_cast<float*>(shared_memory() + WARPS * WARP_BYTES)),
        thread(warp_index() * WARP_SIZE + lane_index()),
        heads(params.gqa_group_size - segment.first_head < HEADS
                  ? params.gqa_group_size - segment.first_head
                  : HEADS) {}

  // Every warp has waited for all of its copies.
  template <typename Attention>
  HMA_DEVICE void run(Attention& own) {
    share_warps(own);
    if (work.whole()) {
      for (int i = thread; i < heads * V_DIM; i += THREADS) {
        store(i, warps_out(i), warps_sum(i / V_DIM, warps_max(i / V_DIM)));
      }
      return;
    }
    write_partial();
    if (!is_last()) return;
    merge_blocks();
  }

 private:
  template <typename Attention>
  HMA_DEVICE void share_warps(Attention& own) {
    const int lane = lane_index(), warp = warp_index(), r = lane / 4, c = lane % 4;
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        for (int mask = 4; mask < WARP_SIZE; mask *= 2) {
          own.state_sum[tile][i] += from_lane_xor(own.state_sum[tile][i], mask);
        }
        const int head = tile * HEADS_PER_TILE + 2 * c + i;
        if (r == 0) {
          warp_states[(warp * HEADS + head) * 2] = own.state_max[tile][i];
          warp_states[(warp * HEADS + head) * 2 + 1] = own.state_sum[tile][i];
        }
      }
    }
    sync_block();
    auto* out = reinterpret_cast<float*>(shared_memory() + warp * WARP_BYTES);
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int head = tile * HEADS_PER_TILE + 2 * c + i;
        const float share = share_of(own.state_max[tile][i], warps_max(head)) * OUT_UNIT;
#pragma unroll
        for (int group = 0; group < V_DIM / GROUP; ++group) {
          float* to = out + head * V_DIM + group * GROUP + 2 * r;
          to[0] = own.state_out[tile][group][i] * share;
          to[1] = own.state_out[tile][group][i + 2] * share;
        }
      }
    }
    sync_block();
  }

  HMA_DEVICE float warps_max(int head) const {
    float found = MINUS_INFINITY;
    for (int from = 0; from < WARPS; ++from) {
      found = fmaxf(found, warp_states[(from * HEADS + head) * 2]);
    }
    return found;
  }

  HMA_DEVICE float warps_sum(int head, float largest) const {
    float total = 0;
    for (int from = 0; from < WARPS; ++from) {
      const float* state = warp_states + (from * HEADS + head) * 2;
      total += state[1] * share_of(state[0], largest);
    }
    return total;
  }

  HMA_DEVICE float warps_out(int i) const {
    float total = 0;
    for (int from = 0; from < WARPS; ++from) {
      total += reinterpret_cast<const float*>(shared_memory() + from * WARP_BYTES)[i];
    }
    return total;
  }

  // What a state counts for beside a larger maximum; -inf - -inf must not become NaN.
  HMA_DEVICE static float share_of(float own_max, float largest) {
    return own_max == MINUS_INFINITY ? 0 : exp2_fast(own_max - largest);
  }

  // Element i of the block's heads: a weighted sum of V, and the sum of the weights.
  HMA_DEVICE void store(int i, float total, float sum) const {
    const int64_t head = int64_t(work.kv_head) * p.gqa_group_size + work.first_head;
    const int64_t row = int64_t(work.request) * p.kv_heads * p.gqa_group_size + head;
    static_cast<Query*>(p.out)[row * V_DIM + i] = from_float<Query>(sum == 0 ? 0 : total / sum);
  }

  HMA_DEVICE void write_partial() const {
    const int64_t slot = 2 * block_x() + (work.opens_span ? 0 : 1);
    for (int i = thread; i < heads * V_DIM; i += THREADS) {
      space.out[slot * HEADS * V_DIM + i] = warps_out(i);
    }
    for (int head = thread; head < heads; head += THREADS) {
      const float largest = warps_max(head);
      space.states[(slot * HEADS + head) * 2] = largest;
      space.states[(slot * HEADS + head) * 2 + 1] = warps_sum(head, largest);
    }
  }

  // Whether all other blocks of the unit have written their partial states.
  HMA_DEVICE bool is_last() const {
    release_writes();
    sync_block();
    auto* last = reinterpret_cast<int*>(warp_states);
    if (thread == 0) {
      const int blocks = work.last_block - work.first_block + 1;
      *last = atomic_add(space.arrived + work.first_block, 1) == blocks - 1;
      if (*last) space.arrived[work.first_block] = 0;
    }
    sync_block();
    acquire_writes();
    return *last;
  }

  HMA_DEVICE void merge_blocks() const {
    const int blocks = work.last_block - work.first_block + 1;
    auto* sums = reinterpret_cast<float*>(shared_memory());  // [heads]
    auto* shares = sums + heads;                             // [blocks, heads]
    const int lane = lane_index();
    for (int head = warp_index(); head < heads; head += WARPS) {
      float largest = MINUS_INFINITY;
      for (int n = lane; n < blocks; n += WARP_SIZE) {
        largest = fmaxf(largest, load_written(state(n, head)));
      }
      for (int mask = 1; mask < WARP_SIZE; mask *= 2) {
        largest = fmaxf(largest, from_lane_xor(largest, mask));
      }
      float total = 0;
      for (int n = lane; n < blocks; n += WARP_SIZE) {
        const float share = share_of(load_written(state(n, head)), largest);
        shares[n * heads + head] = share;
        total += load_written(state(n, head) + 1) * share;
      }
      for (int mask = 1; mask < WARP_SIZE; mask *= 2) total += from_lane_xor(total, mask);
      if (lane == 0) sums[head] = total;
    }
    sync_block();
    for (int i = thread; i < heads * V_DIM; i += THREADS) {
      float total = 0;
#pragma unroll 8
      for (int n = 0; n < blocks; ++n) {
        const float* from = space.out + slot_of(work.first_block + n) * HEADS * V_DIM;
        total += load_written(from + i) * shares[n * heads + i / V_DIM];
      }
      store(i, total, sums[i / V_DIM]);
    }
  }

  // The first block has the unit in its span's last segment, unless that is the first one too.
  HMA_DEVICE int64_t slot_of(int block) const {
    return 2 * block + (block > work.first_block || work.unit_opens_span ? 0 : 1);
  }

  HMA_DEVICE const float* state(int n, int head) const {
    return space.states + (slot_of(work.first_block + n) * HEADS + head) * 2;
  }

  const DecodeParams& p;
  const Segment& work;
  const Workspace<HEADS, V_DIM> space;
  float* warp_states;
  const int thread, heads;
};

}  // namespace hma
