// Tiles of K and V in shared memory, and how they become operands of the tensor cores.
//
// A format says how many tokens a tile has. Of each 16 tokens (`block`) and of 16 dims (`group`) it
// makes
//   k_operands  K as operand a: row m is token(m); columns 2c, 2c+1, 2c+8, 2c+9 are dims 4c..4c+3.
//   v_operands  V transposed as operand a: rows r and r+8 are dims 2r and 2r+1; column m is token(m).
// The order of dims and tokens differs from that in memory, so that a lane loads neighbours.
//
// BFP8 data bytes become bfloat16 without arithmetic: sign and 7-bit magnitude q are put where a
// subnormal has them, which makes them q * 2^-133. The shared exponents are applied later: K's to
// the products of a group, V's to the weights.
#pragma once

#include <hma/layout.h>
#include <hma/warp.cuh>

namespace hma {

constexpr int BLOCK = 16;  // tokens of one tensor core operation
constexpr int COPY_BYTES = 16;

// Queries are multiplied by this before they meet K, so that products with subnormals stay normal.
constexpr float QUERY_LIFT = 0x1p60f;

// Weighted sums of V, of either format, are held divided by this.
constexpr float OUT_UNIT = 0x1p67f;

template <int DIM>
struct Bfp8 {
  static constexpr int TOKENS = PAGE;
  static constexpr int BYTES = DIM / TILE * TILE_BYTES;
  static constexpr int PAGE_BYTES = BYTES;  // of one KV head
  static constexpr bool SCALED = true;
  static constexpr float LOGIT_UNIT = 0x1p67f;  // undoes QUERY_LIFT, 2^-133 and the exponents' bias
  // Weights are lifted, as V is q * 2^-133.
  static constexpr float WEIGHT_LIFT_LOG2 = 60;
  static constexpr float WEIGHT_UNIT = 0x1p-60f;

  HMA_DEVICE static void copy(Shared to, const uint8_t* page, int, int, int) {
    to.copy<BYTES>(page);
  }

  HMA_DEVICE static int face(int block, int group) { return 2 * block + group % 2; }

  HMA_DEVICE static Shared exponents(Shared tile, int block, int group) {
    return tile + group / 2 * TILE_BYTES + face(block, group) * FACE;
  }

  HMA_DEVICE static uint32_t widen(uint32_t bytes, uint32_t selector) {
    return permute_bytes(bytes, 0, selector) & 0x807F807Fu;
  }

  // Columns 2c, 2c+1, 2c+8 and 2c+9 are tokens 4c..4c+3: their exponents are one word.
  HMA_DEVICE static int token(int m) { return m % 8 / 2 * 4 + m / 8 * 2 + m % 2; }

  // This lane's row of the four matrices that hold all tokens of 16 dims: operand rows 8i to 8i+7 in
  // matrix i, two dims in a 16-bit value.
  HMA_DEVICE static Shared row(Shared tile, int group) {
    const int lane = lane_index();
    return tile + group / 2 * TILE_BYTES + EXPONENT_BYTES + face(lane / 16, group) * FACE * FACE +
           token(lane % 16) * FACE;
  }

  // The operands of all blocks of a group of dims.
  HMA_DEVICE static void k_operands(Shared tile, int group, uint32_t (&a)[2][4]) {
    uint32_t raw[4];
    row(tile, group).load_matrices<false>(raw);
#pragma unroll
    for (int block = 0; block < 2; ++block) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        a[block][half] = widen(raw[2 * block + half], 0x9180);
        a[block][half + 2] = widen(raw[2 * block + half], 0xB3A2);
      }
    }
  }

  HMA_DEVICE static void v_operands(Shared tile, int group, uint32_t (&a)[2][4]) {
    uint32_t raw[4];
    row(tile, group).load_matrices<true>(raw);
#pragma unroll
    for (int block = 0; block < 2; ++block) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        a[block][2 * half] = widen(raw[2 * block + half], 0xA280);
        a[block][2 * half + 1] = widen(raw[2 * block + half], 0xB391);
      }
    }
  }

  // 2^(E-127) of operand row r + 8 * half.
  HMA_DEVICE static float k_scale(Shared tile, int block, int group, int r, int half) {
    return float_from_bits((exponents(tile, block, group) + token(r) + 2 * half).load_1() << 23);
  }

  // Weights times 2^(E-127) of their tokens in this group. The weight of a hidden token is zero,
  // and stays zero beside an exponent that is not finite.
  HMA_DEVICE static void scale_weights(Shared tile, int block, int group,
                                       const uint32_t (&weights)[2], const uint32_t (&visible)[2],
                                       uint32_t (&b)[2]) {
    const uint32_t four = (exponents(tile, block, group) + 4 * (lane_index() % 4)).load_4();
    const uint32_t pairs[2] = {permute_bytes(four, 0, 0x4140), permute_bytes(four, 0, 0x4342)};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      b[half] = multiply_bf16(weights[half], pairs[half] << 7) & visible[half];
    }
  }
};

template <int DIM>
struct Bf16 {
  static constexpr int TOKENS = BLOCK;  // half a page takes no more room than a page of BFP8
  static constexpr int PADDED = DIM <= 32 ? 32 : DIM <= 64 ? 64 : DIM <= 128 ? 128 : 256;
  static constexpr int BYTES = TOKENS * PADDED * 2;
  static constexpr int PAGE_BYTES = PAGE * DIM * 2;
  static constexpr bool SCALED = false;
  static constexpr float LOGIT_UNIT = 0x1p-60f;  // undoes QUERY_LIFT
  // Weights are lowered, so that sums are in the same unit as those of BFP8.
  static constexpr float WEIGHT_LIFT_LOG2 = -67;
  static constexpr float WEIGHT_UNIT = 0x1p67f;

  // Where 16 bytes of a token lie in a tile: spread over the banks as both operands need them.
  HMA_DEVICE static int place(int token, int chunk) {
    const int mixed = chunk ^ (((token & 6) ^ ((token & 1) << 2)) & (PADDED / 8 - 1));
    return (token * (PADDED / 8) + mixed) * COPY_BYTES;
  }

  HMA_DEVICE static int token(int m) { return m; }

  // Tokens outside begin..end-1 become zeros: nobody knows what they hold.
  HMA_DEVICE static void copy(Shared to, const uint8_t* page, int first_token, int begin,
                              int end) {
    constexpr int CHUNKS = DIM * 2 / COPY_BYTES;
    for (int i = lane_index(); i < TOKENS * CHUNKS; i += WARP_SIZE) {
      const int token = i / CHUNKS, chunk = i % CHUNKS;
      (to + place(token, chunk))
          .copy_16(page + (first_token + token) * DIM * 2 + chunk * COPY_BYTES,
                   token >= begin && token < end);
    }
  }

  HMA_DEVICE static void k_operands(Shared tile, int group, uint32_t (&a)[1][4]) {
    const int r = lane_index() / 4, c = lane_index() % 4;
    for (int half = 0; half < 2; ++half) {
      const uint2 four = (tile + (place(r + 8 * half, 2 * group + c / 2) + c % 2 * 8)).load_8();
      a[0][half] = four.x;
      a[0][half + 2] = four.y;
    }
  }

  HMA_DEVICE static void v_operands(Shared tile, int group, uint32_t (&a)[1][4]) {
    const int r = lane_index() / 4, c = lane_index() % 4;
    const int chunk = 2 * group + r / 4, within = r % 4 * 4;
    for (int half = 0; half < 2; ++half) {
      const int token = 2 * c + 8 * half;
      const uint32_t even = (tile + (place(token, chunk) + within)).load_4();
      const uint32_t odd = (tile + (place(token + 1, chunk) + within)).load_4();
      a[0][2 * half] = permute_bytes(even, odd, 0x5410);
      a[0][2 * half + 1] = permute_bytes(even, odd, 0x7632);
    }
  }
};

}  // namespace hma
