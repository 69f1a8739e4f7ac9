// One warp's queries and softmax state, and what a tile of K and V adds to it.
//
// Logits are K times Q^T and outputs V^T times weights^T, so that query heads are the short side of
// the tensor cores' tiles. A lane holds heads 2c and 2c+1 of each tile of heads.
#pragma once

#include <hma/merge.cuh>
#include <hma/params.h>
#include <hma/tiles.cuh>
#include <hma/schedule.cuh>

#include <type_traits>

namespace hma {

constexpr int HEADS_PER_TILE = 8;

template <typename Query, int DIM, int V_DIM, int HEAD_TILES>
class WarpAttention {
  static constexpr bool SPLIT_Q = std::is_same_v<Query, __half>;

 public:
  static constexpr int HEADS = HEADS_PER_TILE * HEAD_TILES;

  HMA_DEVICE explicit WarpAttention(const DecodeParams& params)
      : p(params), r(lane_index() / 4), c(lane_index() % 4) {}

  HMA_DEVICE void load_query(const Segment& work) {
    const Query* from = static_cast<const Query*>(p.query) + work.request * p.query_stride;
    for (int tile = 0; tile < HEAD_TILES; ++tile) {
      const int head = work.first_head + tile * HEADS_PER_TILE + r;
      const Query* row =
          from + (int64_t(work.kv_head) * p.gqa_group_size + head) * p.query_head_stride + 4 * c;
#pragma unroll
      for (int group = 0; group < DIM / GROUP; ++group) {
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          x[i] = head < p.gqa_group_size ? to_float(row[group * GROUP + i]) * QUERY_LIFT : 0.0f;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float even = x[2 * half], odd = x[2 * half + 1];
          const uint32_t pair = pack_bf16(even, odd);
          q[tile][group][half] = pair;
          // float16 has 11 significant bits, bfloat16 8: what is left is a second summand.
          if constexpr (SPLIT_Q) {
            q_low[tile][group][half] = pack_bf16(even - float_from_bits(pair << 16),
                                                 odd - float_from_bits(pair & 0xFFFF0000u));
          }
        }
      }
    }
  }

  HMA_DEVICE void clear() {
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        state_max[tile][i] = MINUS_INFINITY;
        state_sum[tile][i] = 0;
      }
#pragma unroll
      for (int group = 0; group < V_DIM / GROUP; ++group) {
#pragma unroll
        for (int i = 0; i < 4; ++i) state_out[tile][group][i] = 0;
      }
    }
  }

  // Tokens begin..end-1 of the tile are visible.
  template <typename K, typename V>
  HMA_DEVICE void attend(Shared keys, Shared values, int begin, int end) {
    if (begin > 0 || end < K::TOKENS) {
      attend<K, V, true>(keys, values, begin, end);
    } else {
      attend<K, V, false>(keys, values, begin, end);
    }
  }

  // Writes the unit's output, or its partial state.
  HMA_DEVICE void finish(const Segment& work, const Workspace<HEADS, V_DIM>& space) {
    const int heads = p.gqa_group_size - work.first_head;
    const int64_t first =
        (int64_t(work.request) * p.kv_heads + work.kv_head) * p.gqa_group_size + work.first_head;
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = state_sum[tile][i];
        for (int mask = 4; mask < WARP_SIZE; mask *= 2) sum += from_lane_xor(sum, mask);
        const int head = tile * HEADS_PER_TILE + 2 * c + i;
        if (head >= heads) continue;
        if (work.partial < 0) {
          const int of = work.kv_head * p.gqa_group_size + work.first_head + head;
          sum += sink_weight(p, of, state_max[tile][i]);
          Query* to = static_cast<Query*>(p.out) + (first + head) * V_DIM;
          each_value(tile, i, [&](int at, float value) { store(to + at, value, sum); });
        } else {
          const int64_t row = int64_t(work.partial) * HEADS + head;
          float* to = space.out() + row * V_DIM;
          each_value(tile, i, [&](int at, float value) { to[at] = value; });
          if (r == 0) {
            space.states()[2 * row] = state_max[tile][i];
            space.states()[2 * row + 1] = sum;
          }
        }
      }
    }
  }

 private:
  template <typename Use>
  HMA_DEVICE void each_value(int tile, int i, const Use& use) const {
#pragma unroll
    for (int group = 0; group < V_DIM / GROUP; ++group) {
      use(group * GROUP + 2 * r, state_out[tile][group][i] * OUT_UNIT);
      use(group * GROUP + 2 * r + 1, state_out[tile][group][i + 2] * OUT_UNIT);
    }
  }

  // The softmax state of heads 2c and 2c+1 of each tile: maximum logit in units of log 2, sum of
  // weights of this lane's tokens only, and weighted sum of V divided by OUT_UNIT.
  float state_max[HEAD_TILES][2], state_sum[HEAD_TILES][2];
  float state_out[HEAD_TILES][V_DIM / GROUP][4];

  template <typename K, typename V, bool RAGGED>
  HMA_DEVICE void attend(Shared keys, Shared values, int begin, int end) {
    constexpr int BLOCKS = K::TOKENS / BLOCK;
    float logits[HEAD_TILES][BLOCKS][4];
    multiply_keys<K>(keys, logits);
    uint32_t weights[HEAD_TILES][BLOCKS][2];
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile) {
      to_log2<BLOCKS>(logits[tile], p.scale * K::LOGIT_UNIT);
      if constexpr (RAGGED) hide<K, BLOCKS>(logits[tile], begin, end);
      update_max<BLOCKS>(tile, logits[tile]);
      float base[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // Where no logit is finite, all weights are to be zero, not NaN.
        base[i] = state_max[tile][i] == MINUS_INFINITY ? 0 : K::WEIGHT_LIFT_LOG2 - state_max[tile][i];
      }
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
        float weight[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          weight[i] = exp2_fast(logits[tile][block][i] + base[i % 2]);
          state_sum[tile][i % 2] += weight[i] * K::WEIGHT_UNIT;
        }
        weights[tile][block][0] = transpose_8x8(pack_bf16(weight[0], weight[1]));
        weights[tile][block][1] = transpose_8x8(pack_bf16(weight[2], weight[3]));
      }
    }
    add_values<V, BLOCKS, RAGGED>(values, weights, begin, end);
  }

  template <typename K, int BLOCKS>
  HMA_DEVICE void multiply_keys(Shared keys, float (&logits)[HEAD_TILES][BLOCKS][4]) {
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile) {
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
        for (int i = 0; i < 4; ++i) logits[tile][block][i] = 0;
      }
    }
#pragma unroll
    for (int group = 0; group < DIM / GROUP; ++group) {
      uint32_t a[BLOCKS][4];
      K::k_operands(keys, group, a);
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
        if constexpr (K::SCALED) {
          const float upper = K::k_scale(keys, block, group, r, 0);
          const float lower = K::k_scale(keys, block, group, r, 1);
#pragma unroll
          for (int tile = 0; tile < HEAD_TILES; ++tile) {
            float dot[4] = {0, 0, 0, 0};
            multiply_query(dot, a[block], tile, group);
            logits[tile][block][0] += dot[0] * upper;
            logits[tile][block][1] += dot[1] * upper;
            logits[tile][block][2] += dot[2] * lower;
            logits[tile][block][3] += dot[3] * lower;
          }
        } else {
#pragma unroll
          for (int tile = 0; tile < HEAD_TILES; ++tile) {
            multiply_query(logits[tile][block], a[block], tile, group);
          }
        }
      }
    }
  }

  HMA_DEVICE void multiply_query(float (&dot)[4], const uint32_t (&a)[4], int tile, int group) {
    multiply_add(dot, a, q[tile][group]);
    if constexpr (SPLIT_Q) multiply_add(dot, a, q_low[tile][group]);
  }

  // From products to logits in units of log 2.
  template <int BLOCKS>
  HMA_DEVICE void to_log2(float (&logits)[BLOCKS][4], float factor) {
    if (p.logit_cap > 0) {
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          // tanh(x) = 1 - 2 / (exp(2x) + 1)
          const float power =
              exp2_fast(logits[block][i] * factor * (2 * LOG2E / p.logit_cap));
          logits[block][i] = p.logit_cap * LOG2E * (1 - 2 * reciprocal_fast(power + 1));
        }
      }
    } else {
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
        for (int i = 0; i < 4; ++i) logits[block][i] *= factor * LOG2E;
      }
    }
  }

  // Selected, not multiplied away: a hidden token's logit may be anything.
  template <typename K, int BLOCKS>
  HMA_DEVICE void hide(float (&logits)[BLOCKS][4], int begin, int end) {
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = block * BLOCK + K::token(r + i / 2 * 8);
        if (token < begin || token >= end) logits[block][i] = MINUS_INFINITY;
      }
    }
  }

  // A new maximum, the same in all lanes of a column, scales down what has been added up so far.
  template <int BLOCKS>
  HMA_DEVICE void update_max(int tile, const float (&logits)[BLOCKS][4]) {
    float new_max[2] = {state_max[tile][0], state_max[tile][1]};
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) new_max[i % 2] = fmaxf(new_max[i % 2], logits[block][i]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      for (int mask = 4; mask < WARP_SIZE; mask *= 2) {
        new_max[i] = fmaxf(new_max[i], from_lane_xor(new_max[i], mask));
      }
    }
    if (!any_lane(new_max[0] != state_max[tile][0] || new_max[1] != state_max[tile][1])) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float decay =
          state_max[tile][i] == new_max[i] ? 1 : exp2_fast(state_max[tile][i] - new_max[i]);
      state_max[tile][i] = new_max[i];
      state_sum[tile][i] *= decay;
#pragma unroll
      for (int group = 0; group < V_DIM / GROUP; ++group) {
        state_out[tile][group][i] *= decay;
        state_out[tile][group][i + 2] *= decay;
      }
    }
  }

  template <typename V, int BLOCKS, bool RAGGED>
  HMA_DEVICE void add_values(Shared values,
                             const uint32_t (&weights)[HEAD_TILES][BLOCKS][2], int begin,
                             int end) {
    uint32_t visible[BLOCKS][2];
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = block * BLOCK + V::token(half * 8 + 2 * c);
        visible[block][half] = !RAGGED ? ~0u
                                       : (token >= begin && token < end ? 0xFFFFu : 0u) |
                                             (token + 1 >= begin && token + 1 < end ? 0xFFFF0000u
                                                                                    : 0u);
      }
    }
#pragma unroll
    for (int group = 0; group < V_DIM / GROUP; ++group) {
      uint32_t a[BLOCKS][4];
      V::v_operands(values, group, a);
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
        for (int tile = 0; tile < HEAD_TILES; ++tile) {
          if constexpr (V::SCALED) {
            uint32_t b[2];
            V::scale_weights(values, block, group, weights[tile][block], visible[block], b);
            multiply_add(state_out[tile][group], a[block], b);
          } else {
            multiply_add(state_out[tile][group], a[block], weights[tile][block]);
          }
        }
      }
    }
  }

  const DecodeParams& p;
  const int r, c;
  uint32_t q[HEAD_TILES][DIM / GROUP][2];
  uint32_t q_low[SPLIT_Q ? HEAD_TILES : 1][SPLIT_Q ? DIM / GROUP : 1][2];
};

}  // namespace hma
