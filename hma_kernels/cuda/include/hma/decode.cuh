// Decode attention over pages of both formats, as far as a partial softmax state per item.
//
// A block takes one item (a stretch of one request's pages), one KV head and up to 8 * HEAD_TILES
// of its query heads. Its warps take tiles in turn, each with its own ring of copies under way and
// its own softmax state, and meet only at the end. Scores are K times Q^T and the result is V^T
// times weights^T, so that heads are the short side of the tensor cores' tiles.
#pragma once

#include <hma/params.h>
#include <hma/tiles.cuh>
#include <hma/warp.cuh>

#include <type_traits>

namespace hma {

constexpr float LOG2E = 1.4426950408889634f;
constexpr float MINUS_INFINITY = -__builtin_inff();
constexpr int HEADS_A_TILE = 8;

constexpr int larger(int a, int b) { return a > b ? a : b; }

template <typename Query, int DIM, int V_DIM, int HEAD_TILES, int WARPS, int STAGES>
class DecodeWarp {
  static constexpr bool SPLIT = std::is_same_v<Query, __half>;
  static constexpr int K_BYTES = larger(Bfp8<DIM>::BYTES, Bf16<DIM>::BYTES);
  static constexpr int V_BYTES = larger(Bfp8<V_DIM>::BYTES, Bf16<V_DIM>::BYTES);
  static constexpr int STAGE_BYTES = K_BYTES + V_BYTES + COPY;  // and which tokens are visible
  static constexpr int HEADS = HEADS_A_TILE * HEAD_TILES;
  static constexpr int RESULT_BYTES = HEADS * V_DIM * 4;
  static constexpr int RING_BYTES = larger(STAGES * STAGE_BYTES, RESULT_BYTES);

 public:
  static constexpr int THREADS = 32 * WARPS;
  static constexpr int SHARED_BYTES = WARPS * RING_BYTES + WARPS * HEADS * 2 * 4;

  HMA_DEVICE explicit DecodeWarp(const DecodeParams& params)
      : p(params), lane(lane_index()), warp(warp_index()), r(lane / 4), c(lane % 4) {}

  HMA_DEVICE void run() {
    item = block_x();
    request = p.item_request[item];
    if (request >= p.batch) return;
    kv_head = block_y();
    first_head = block_z() * HEADS;
    ring = shared_memory() + warp * RING_BYTES;
    stop = int(p.lengths[request]);
    begin = p.window >= 0 && stop - 1 > p.window ? stop - 1 - p.window : 0;
    load_query();
    const int64_t first8 = p.bfp8.start[request], first16 = p.bf16.start[request];
    const int64_t pages8 = p.bfp8.start[request + 1] - first8;
    const int64_t pages = pages8 + p.bf16.start[request + 1] - first16;
    // A request's items are of equal size, within one page.
    const int64_t first_item = p.item_start[request];
    const int64_t items = p.item_start[request + 1] - first_item;
    const int64_t from = pages * (item - first_item) / items;
    const int64_t to = pages * (item - first_item + 1) / items;
    const int64_t to8 = to < pages8 ? to : pages8, from16 = from > pages8 ? from : pages8;
    if (from < to8) stream<Bfp8<DIM>, Bfp8<V_DIM>>(p.bfp8, first8 + from, int(to8 - from));
    if (from16 < to) {
      stream<Bf16<DIM>, Bf16<V_DIM>>(p.bf16, first16 + from16 - pages8, int(to - from16));
    }
    merge_warps();
  }

 private:
  HMA_DEVICE void load_query() {
    const Query* from = static_cast<const Query*>(p.query) + request * p.query_stride;
    for (int tile = 0; tile < HEAD_TILES; ++tile) {
      const int head = first_head + tile * HEADS_A_TILE + r;
      const Query* row = from + (int64_t(kv_head) * p.grouped + head) * p.head_stride + 4 * c;
#pragma unroll
      for (int group = 0; group < DIM / GROUP; ++group) {
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          x[i] = head < p.grouped ? to_float(row[group * GROUP + i]) * QUERY_LIFT : 0.0f;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float low = x[2 * half], high = x[2 * half + 1];
          const uint32_t pair = pack_bf16(low, high);
          query[tile][group][half] = pair;
          // float16 has 11 significant bits, bfloat16 8: the rest is a second summand.
          if constexpr (SPLIT) {
            rest[tile][group][half] = pack_bf16(low - float_from_bits(pair << 16),
                                                high - float_from_bits(pair & 0xFFFF0000u));
          }
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        top[tile][i] = MINUS_INFINITY;
        sum[tile][i] = 0;
      }
#pragma unroll
      for (int group = 0; group < V_DIM / GROUP; ++group) {
#pragma unroll
        for (int i = 0; i < 4; ++i) result[tile][group][i] = 0;
      }
    }
  }

  // Every WARPS-th tile of `pages` entries from `first`; STAGES tiles are fetched ahead.
  template <typename K, typename V>
  HMA_DEVICE void stream(const PageLists& lists, int64_t first, int pages) {
    constexpr int TILES_A_PAGE = PAGE / K::TOKENS;
    const int tiles = pages * TILES_A_PAGE;
    const int mine = tiles > warp ? (tiles - warp + WARPS - 1) / WARPS : 0;
    // Lane i knows tile i of the next 32: where it lies, and its visible tokens.
    int64_t id = 0;
    int low = 0, high = 0;

    auto fetch = [&](int n) {
      if (n % 32 == 0) {
        const int tile = (n + lane) * WARPS + warp;
        low = high = 0;
        if (tile < tiles) {
          const int64_t entry = first + tile / TILES_A_PAGE;
          const int token = int(lists.positions[entry]) + tile % TILES_A_PAGE * K::TOKENS;
          id = lists.ids[entry];
          low = begin > token ? begin - token : 0;
          high = stop - token < K::TOKENS ? stop - token : K::TOKENS;
        }
      }
      if (n < mine) {
        const int64_t page = from_lane(id, n % 32);
        const int from = from_lane(low, n % 32), to = from_lane(high, n % 32);
        uint8_t* stage = ring + n % STAGES * STAGE_BYTES;
        if (lane == 0) {
          int* tokens = reinterpret_cast<int*>(stage + K_BYTES + V_BYTES);
          tokens[0] = from;
          tokens[1] = to;
        }
        if (from < to) {
          const int within = (n * WARPS + warp) % TILES_A_PAGE * K::TOKENS;
          K::copy(stage, lists.k + page * lists.k_page_bytes + int64_t(kv_head) * K::PAGE_BYTES,
                  within, from, to);
          V::copy(stage + K_BYTES,
                  lists.v + page * lists.v_page_bytes + int64_t(kv_head) * V::PAGE_BYTES, within,
                  from, to);
        }
      }
      commit_copies();
    };

    for (int n = 0; n < STAGES; ++n) fetch(n);
    for (int n = 0; n < mine; ++n) {
      wait_for_copies<STAGES - 1>();
      sync_warp();
      const uint8_t* stage = ring + n % STAGES * STAGE_BYTES;
      const int* tokens = reinterpret_cast<const int*>(stage + K_BYTES + V_BYTES);
      if (tokens[0] < tokens[1]) attend<K, V>(stage, stage + K_BYTES, tokens[0], tokens[1]);
      sync_warp();
      fetch(n + STAGES);
    }
  }

  template <typename K, typename V>
  HMA_DEVICE void attend(const uint8_t* keys, const uint8_t* values, int low, int high) {
    constexpr int BLOCKS = K::TOKENS / BLOCK;
    float logits[HEAD_TILES][BLOCKS][4];
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
      for (int tile = 0; tile < HEAD_TILES; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) logits[tile][block][i] = 0;
      }
#pragma unroll
      for (int group = 0; group < DIM / GROUP; ++group) {
        uint32_t a[4];
        K::rows(keys, block, group, a);
        if constexpr (K::SCALED) {
          const float upper = K::row_scale(keys, block, group, r);
          const float lower = K::row_scale(keys, block, group, r + 8);
#pragma unroll
          for (int tile = 0; tile < HEAD_TILES; ++tile) {
            float dot[4] = {0, 0, 0, 0};
            multiply_query(dot, a, tile, group);
            logits[tile][block][0] += dot[0] * upper;
            logits[tile][block][1] += dot[1] * upper;
            logits[tile][block][2] += dot[2] * lower;
            logits[tile][block][3] += dot[3] * lower;
          }
        } else {
#pragma unroll
          for (int tile = 0; tile < HEAD_TILES; ++tile) {
            multiply_query(logits[tile][block], a, tile, group);
          }
        }
      }
    }

    const bool ragged = low > 0 || high < K::TOKENS;
    uint32_t weights[HEAD_TILES][BLOCKS][2];
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile) {
      to_log2<BLOCKS>(logits[tile], p.scale * K::LOGIT);
      if (ragged) hide<BLOCKS>(logits[tile], low, high);
      float largest[2] = {top[tile][0], top[tile][1]};
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          largest[i % 2] = fmaxf(largest[i % 2], logits[tile][block][i]);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        for (int mask = 4; mask < 32; mask *= 2) {
          largest[i] = fmaxf(largest[i], from_lane_xor(largest[i], mask));
        }
      }
      raise_top(tile, largest);
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
        float weight[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          weight[i] = exp2_fast(logits[tile][block][i] - top[tile][i % 2] + K::WEIGHT_LOG2);
          sum[tile][i % 2] += weight[i] * K::WEIGHT_UNIT;
        }
        weights[tile][block][0] = transpose_8x8(pack_bf16(weight[0], weight[1]));
        weights[tile][block][1] = transpose_8x8(pack_bf16(weight[2], weight[3]));
      }
    }

#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
      uint32_t visible[2] = {~0u, ~0u};
      if (ragged) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int token = block * BLOCK + half * 8 + 2 * c;
          visible[half] = (token >= low && token < high ? 0xFFFFu : 0u) |
                          (token + 1 >= low && token + 1 < high ? 0xFFFF0000u : 0u);
        }
      }
#pragma unroll
      for (int group = 0; group < V_DIM / GROUP; ++group) {
        uint32_t a[4];
        V::columns(values, block, group, a);
#pragma unroll
        for (int tile = 0; tile < HEAD_TILES; ++tile) {
          if constexpr (V::SCALED) {
            uint32_t b[2];
            V::scale_weights(values, block, group, weights[tile][block], visible, b);
            multiply_add(result[tile][group], a, b);
          } else {
            multiply_add(result[tile][group], a, weights[tile][block]);
          }
        }
      }
    }
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

  // Chosen, not multiplied away: a hidden token's logit may be anything.
  template <int BLOCKS>
  HMA_DEVICE void hide(float (&logits)[BLOCKS][4], int low, int high) {
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = block * BLOCK + r + i / 2 * 8;
        if (token < low || token >= high) logits[block][i] = MINUS_INFINITY;
      }
    }
  }

  // A new maximum, the same in the lanes of a column, shrinks what was added up so far.
  HMA_DEVICE void raise_top(int tile, const float (&largest)[2]) {
    if (!any_lane(largest[0] != top[tile][0] || largest[1] != top[tile][1])) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float decay = exp2_fast(top[tile][i] - largest[i]);
      top[tile][i] = largest[i];
      sum[tile][i] *= decay;
#pragma unroll
      for (int group = 0; group < V_DIM / GROUP; ++group) {
        result[tile][group][i] *= decay;
        result[tile][group][i + 2] *= decay;
      }
    }
  }

  HMA_DEVICE void multiply_query(float (&dot)[4], const uint32_t (&a)[4], int tile, int group) {
    multiply_add(dot, a, query[tile][group]);
    if constexpr (SPLIT) multiply_add(dot, a, rest[tile][group]);
  }

  // The warps' states become the item's, added up in the warps' order.
  HMA_DEVICE void merge_warps() {
    auto* states = reinterpret_cast<float*>(shared_memory() + WARPS * RING_BYTES);
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        for (int mask = 4; mask < 32; mask *= 2) {
          sum[tile][i] += from_lane_xor(sum[tile][i], mask);
        }
        const int head = tile * HEADS_A_TILE + 2 * c + i;
        if (r == 0) {
          states[(warp * HEADS + head) * 2] = top[tile][i];
          states[(warp * HEADS + head) * 2 + 1] = sum[tile][i];
        }
      }
    }
    sync_block();
    auto* own = reinterpret_cast<float*>(ring);
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int head = tile * HEADS_A_TILE + 2 * c + i;
        // 2^67 undoes the unit of the weights and V's 2^-133 and bias.
        const float share = weight_of(top[tile][i], largest(states, head)) * 0x1p67f;
#pragma unroll
        for (int group = 0; group < V_DIM / GROUP; ++group) {
          float* to = own + head * V_DIM + group * GROUP + 2 * r;
          to[0] = result[tile][group][i] * share;
          to[1] = result[tile][group][i + 2] * share;
        }
      }
    }
    sync_block();
    const int heads = p.grouped - first_head < HEADS ? p.grouped - first_head : HEADS;
    const int64_t slot =
        (int64_t(item) * p.kv_heads + kv_head) * p.grouped + first_head;
    for (int i = warp * 32 + lane; i < heads * V_DIM; i += THREADS) {
      float total = 0;
      for (int from = 0; from < WARPS; ++from) {
        total += reinterpret_cast<const float*>(shared_memory() + from * RING_BYTES)[i];
      }
      p.partial[slot * V_DIM + i] = total;
    }
    for (int head = warp * 32 + lane; head < heads; head += THREADS) {
      const float highest = largest(states, head);
      float total = 0;
      for (int from = 0; from < WARPS; ++from) {
        const float* state = states + (from * HEADS + head) * 2;
        total += state[1] * weight_of(state[0], highest);
      }
      p.maxima[slot + head] = highest;
      p.sums[slot + head] = total;
    }
  }

  HMA_DEVICE static float largest(const float* states, int head) {
    float found = MINUS_INFINITY;
    for (int from = 0; from < WARPS; ++from) {
      found = fmaxf(found, states[(from * HEADS + head) * 2]);
    }
    return found;
  }

  HMA_DEVICE static float weight_of(float own, float highest) {
    return own == MINUS_INFINITY ? 0 : exp2_fast(own - highest);
  }

  const DecodeParams& p;
  const int lane, warp, r, c;
  int item, request, kv_head, first_head, begin, stop;
  uint8_t* ring;
  uint32_t query[HEAD_TILES][DIM / GROUP][2];
  uint32_t rest[SPLIT ? HEAD_TILES : 1][SPLIT ? DIM / GROUP : 1][2];
  // Of columns 2c and 2c+1; the sums of this lane's tokens only.
  float top[HEAD_TILES][2], sum[HEAD_TILES][2];
  float result[HEAD_TILES][V_DIM / GROUP][4];
};

}  // namespace hma
