// The instructions that the kernels are made of, each with the PTX ISA's semantics. lane is 0..31;
// r = lane / 4 and c = lane % 4, as in the PTX ISA's figures of fragments.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#define HMA_DEVICE __device__ __forceinline__
#define HMA_HOST_DEVICE __host__ __device__ __forceinline__
#define HMA_KERNEL(name, Params, threads) \
  __global__ void __launch_bounds__(threads, 1) name(const __grid_constant__ Params params)

namespace hma {

constexpr int WARP_SIZE = 32;

HMA_DEVICE int lane_index() { return threadIdx.x % WARP_SIZE; }
HMA_DEVICE int warp_index() { return threadIdx.x / WARP_SIZE; }
HMA_DEVICE int block_x() { return blockIdx.x; }
HMA_DEVICE int grid_x() { return gridDim.x; }

HMA_DEVICE uint8_t* shared_memory() {
  extern __shared__ __align__(16) uint8_t bytes[];
  return bytes;
}

HMA_DEVICE void sync_block() { __syncthreads(); }
HMA_DEVICE void sync_warp() { __syncwarp(); }

template <typename T>
HMA_DEVICE T from_lane(T value, int lane) {
  return __shfl_sync(~0u, value, lane);
}

template <typename T>
HMA_DEVICE T from_lane_xor(T value, int mask) {
  return __shfl_xor_sync(~0u, value, mask);
}

HMA_DEVICE bool any_lane(bool value) { return __any_sync(~0u, value); }

// Bytes of low (0..3) and high (4..7), chosen by four nibbles of selector; bit 3 of a nibble
// replicates the byte's sign instead.
HMA_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
  return result;
}

HMA_DEVICE float float_from_bits(uint32_t bits) { return __uint_as_float(bits); }

// 2^x; -inf gives 0.
HMA_DEVICE float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

HMA_DEVICE float reciprocal_fast(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Two floats as bfloat16, `low` in the lower half.
HMA_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

HMA_DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
HMA_DEVICE float to_float(__half x) { return __half2float(x); }

template <typename T>
HMA_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
  else return __float2bfloat16_rn(x);
}

// Products of two pairs of bfloat16, subnormals kept: a * b + -0 is rounded like a * b.
HMA_DEVICE uint32_t multiply_bf16(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(0x80008000u));
  return result;
}

// An 8x8 matrix of 16-bit values, two to a lane (row r, columns 2c and 2c+1), transposed.
HMA_DEVICE uint32_t transpose_8x8(uint32_t pair) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// sums [16 x 8] += a [16 x 16] * b [16 x 8] in bfloat16 with float sums. Subnormal inputs count.
// a: (r, 2c..), (r+8, 2c..), (r, 2c+8..), (r+8, 2c+8..); b: (2c.., r), (2c+8.., r);
// sums: (r, 2c), (r, 2c+1), (r+8, 2c), (r+8, 2c+1).
HMA_DEVICE void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The compiler is not to know how x was made: else it makes it anew where it is used, or works out
// each of several addresses beside it by itself.
HMA_DEVICE void make_opaque(uint32_t& x) { asm volatile("" : "+r"(x)); }
HMA_DEVICE void make_opaque(const uint8_t*& x) { asm volatile("" : "+l"(x)); }

// Where something lies in shared memory. A number of 32 bits, so that the address of what lies beside
// it is part of an instruction and not worked out for each.
class Shared {
 public:
  HMA_DEVICE explicit Shared(const uint8_t* in_block)
      : address(static_cast<uint32_t>(__cvta_generic_to_shared(in_block))) {}

  HMA_DEVICE Shared operator+(int bytes) const { return Shared(address + uint32_t(bytes)); }
  HMA_DEVICE bool operator==(Shared other) const { return address == other.address; }

  // What lies there, aligned to its size of 1, 2, 4 or 8 bytes.
  HMA_DEVICE uint32_t load_1() const {
    uint32_t x;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
    return x;
  }
  HMA_DEVICE uint32_t load_4() const {
    uint32_t x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
    return x;
  }
  HMA_DEVICE uint2 load_8() const {
    uint2 x;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(address) : "memory");
    return x;
  }
  HMA_DEVICE void store_8(uint32_t x, uint32_t y) const {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(x), "r"(y) : "memory");
  }

  // Four 8x8 matrices of 16-bit values. Lanes 8i to 8i+7 say where the rows of matrix i begin, each
  // 16 bytes and aligned to them. x[i] is of matrix i: row r, columns 2c and 2c+1; transposed: rows
  // 2c and 2c+1, column r.
  template <bool TRANSPOSED>
  HMA_DEVICE void load_matrices(uint32_t (&x)[4]) const {
    if constexpr (TRANSPOSED) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                   : "r"(address)
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                   : "r"(address)
                   : "memory");
    }
  }

  // 16 bytes of global memory come here, or zeros if not valid. They are there for this lane after
  // commit_copies and wait_for_copies, for other lanes after a sync as well.
  HMA_DEVICE void copy_16(const uint8_t* from, bool valid) const {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
  }

  // The same of BYTES bytes, a multiple of 16, by the whole warp.
  template <int BYTES>
  HMA_DEVICE void copy(const uint8_t* from) const {
    constexpr int STEP = WARP_SIZE * 16;
    const int at = lane_index() * 16;
    uint32_t to = address + at;
    const uint8_t* source = from + at;
    make_opaque(to);
    make_opaque(source);
#pragma unroll
    for (int i = 0; i < BYTES / STEP; ++i) {
      asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to + i * STEP),
                   "l"(source + i * STEP)
                   : "memory");
    }
    if constexpr (BYTES % STEP != 0) {
      constexpr int REST = BYTES / STEP * STEP;
      asm volatile(
          "{ .reg .pred mine; setp.lt.s32 mine, %2, %3;"
          " @mine cp.async.cg.shared.global.L2::128B [%0], [%1], 16; }" ::"r"(to + REST),
          "l"(source + REST), "r"(at), "n"(BYTES % STEP)
          : "memory");
    }
  }

 private:
  HMA_DEVICE explicit Shared(uint32_t at) : address(at) {}

  uint32_t address;
};

HMA_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// The next kernel of the stream, if it was started early, may begin now; and what this one has
// written is complete for it once it has waited. Compute capability 9.0 and up; before that no kernel
// is started early.
HMA_DEVICE void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

HMA_DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Waits until at most `pending` of this lane's committed copies are under way.
template <int pending>
HMA_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

}  // namespace hma
