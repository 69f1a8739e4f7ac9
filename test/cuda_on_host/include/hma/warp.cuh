// hma/warp.cuh for threads on the host, from the PTX ISA's description of each instruction.
//
// HMA_COPIES=late (the default) performs copies when their group is waited for, eager at once.
// Between them they show a missing wait and a buffer that is reused too soon.
#pragma once

#include <hma/block.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define HMA_DEVICE inline
#define HMA_HOST_DEVICE inline
#define HMA_KERNEL(name, Params, threads) void name(const Params params)

struct uint2 {
  uint32_t x, y;
};

struct __nv_bfloat16 {
  uint16_t bits;
};

struct __half {
  uint16_t bits;
};

namespace hma {

inline on_host::Block& block() { return *on_host::Block::active; }

inline int lane_index() { return block().current % WARP_SIZE; }
inline int warp_index() { return block().current / WARP_SIZE; }
inline int block_x() { return block().x; }
inline int grid_x() { return block().blocks; }
inline uint8_t* shared_memory() { return block().shared; }
inline void sync_block() { block().meet(block().everyone); }
inline void sync_warp() { block().meet(block().warp().barrier); }

template <typename T>
T from_lane(T value, int lane) {
  return block().gather(value, lane);
}

template <typename T>
T from_lane_xor(T value, int mask) {
  return block().gather(value, lane_index() ^ mask);
}

inline bool any_lane(bool value) {
  const int phase = block().share(value);
  bool found = false;
  for (int lane = 0; lane < WARP_SIZE; ++lane) found |= *block().slot<bool>(phase, lane);
  return found;
}

inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t both = uint64_t(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> (4 * i) & 15;
    const uint32_t byte = both >> (8 * (nibble & 7)) & 0xFF;
    result |= ((nibble & 8) ? (byte & 0x80 ? 0xFFu : 0u) : byte) << (8 * i);
  }
  return result;
}

inline float float_from_bits(uint32_t bits) {
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float exp2_fast(float x) {
  const float result = std::exp2(std::fpclassify(x) == FP_SUBNORMAL ? 0.0f : x);
  return std::fpclassify(result) == FP_SUBNORMAL ? 0.0f : result;
}

inline float reciprocal_fast(float x) { return 1 / x; }

inline uint16_t round_to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  if (std::isnan(x)) return 0x7FFF;
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline uint32_t pack_bf16(float low, float high) {
  return round_to_bf16(low) | uint32_t(round_to_bf16(high)) << 16;
}

inline float bf16_at(uint32_t pair, int half) {
  return float_from_bits(half ? pair & 0xFFFF0000u : pair << 16);
}

inline float to_float(__nv_bfloat16 x) { return float_from_bits(uint32_t(x.bits) << 16); }

inline float to_float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float size = exponent == 0    ? std::ldexp(float(fraction), -24)
                     : exponent == 31 ? (fraction ? NAN : INFINITY)
                                      : std::ldexp(float(1024 + fraction), exponent - 25);
  return x.bits & 0x8000 ? -size : size;
}

template <typename T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>) {
    const auto rounded = static_cast<_Float16>(x);
    __half result;
    std::memcpy(&result, &rounded, 2);
    return result;
  } else {
    return T{round_to_bf16(x)};
  }
}

inline uint32_t multiply_bf16(uint32_t a, uint32_t b) {
  return pack_bf16(bf16_at(a, 0) * bf16_at(b, 0), bf16_at(a, 1) * bf16_at(b, 1));
}

inline uint32_t transpose_8x8(uint32_t pair) {
  const int phase = block().share(pair);
  const int r = lane_index() / 4, c = lane_index() % 4;
  auto element = [&](int row, int column) {
    return *block().slot<uint32_t>(phase, row * 4 + column / 2) >> (16 * (column % 2)) & 0xFFFF;
  };
  return element(2 * c, r) | element(2 * c + 1, r) << 16;
}

inline void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    uint32_t a[4], b[2];
  } mine;
  std::memcpy(mine.a, a, sizeof(mine.a));
  std::memcpy(mine.b, b, sizeof(mine.b));
  const int phase = block().share(mine);
  const int r = lane_index() / 4, c = lane_index() % 4;
  auto a_at = [&](int row, int k) {
    const auto* from = block().slot<Operands>(phase, row % 8 * 4 + k % 8 / 2);
    return double(bf16_at(from->a[row / 8 + k / 8 * 2], k % 2));
  };
  auto b_at = [&](int k, int column) {
    const auto* from = block().slot<Operands>(phase, column * 4 + k % 8 / 2);
    return double(bf16_at(from->b[k / 8], k % 2));
  };
  for (int i = 0; i < 4; ++i) {
    const int row = r + i / 2 * 8, column = 2 * c + i % 2;
    double total = sums[i];
    for (int k = 0; k < 16; ++k) total += a_at(row, k) * b_at(k, column);
    sums[i] = float(total);
  }
}

class Shared {
 public:
  explicit Shared(uint8_t* in_block) : address(in_block) {}

  Shared operator+(int bytes) const { return Shared(address + bytes); }
  bool operator==(Shared other) const { return address == other.address; }

  uint32_t load_1() const { return *address; }
  uint32_t load_4() const { return load<uint32_t>(); }
  uint2 load_8() const { return load<uint2>(); }
  void store_8(uint32_t x, uint32_t y) const {
    const uint2 both{x, y};
    check_aligned(8);
    std::memcpy(address, &both, 8);
  }

  template <bool TRANSPOSED>
  void load_matrices(uint32_t (&x)[4]) const {
    check_aligned(16);
    const int phase = block().share(address);
    const int r = lane_index() / 4, c = lane_index() % 4;
    for (int i = 0; i < 4; ++i) {
      auto element = [&](int of_row, int column) {
        uint16_t value;
        std::memcpy(&value, *block().slot<const uint8_t*>(phase, 8 * i + of_row) + 2 * column, 2);
        return uint32_t(value);
      };
      x[i] = TRANSPOSED ? element(2 * c, r) | element(2 * c + 1, r) << 16
                        : element(r, 2 * c) | element(r, 2 * c + 1) << 16;
    }
    sync_warp();  // nobody goes on to overwrite what others still read
  }

  void copy_16(const uint8_t* from, bool valid) const {
    const on_host::Copy copy{address, from, valid};
    if (block().eager) block().perform(copy);
    block().thread().open.push_back(copy);
  }

  template <int BYTES>
  void copy(const uint8_t* from) const {
    for (int at = lane_index() * 16; at < BYTES; at += WARP_SIZE * 16) {
      (*this + at).copy_16(from + at, true);
    }
  }

 private:
  void check_aligned(int bytes) const {
    on_host::check(reinterpret_cast<uintptr_t>(address) % bytes == 0, "not aligned");
  }

  template <typename T>
  T load() const {
    T value;
    check_aligned(sizeof(T));
    std::memcpy(&value, address, sizeof(T));
    return value;
  }

  uint8_t* address;
};

inline void commit_copies() {
  auto& thread = block().thread();
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

// Kernels run one after another.
inline void allow_next_kernel() {}
inline void wait_for_previous_kernel() {}

template <int pending>
void wait_for_copies() {
  auto& groups = block().thread().groups;
  while (groups.size() > pending) {
    if (!block().eager) {
      for (const auto& copy : groups.front()) block().perform(copy);
    }
    groups.pop_front();
  }
}

}  // namespace hma
