// BFP8 bytes to bfloat16 by VBMI's table look-up: 7 bits of magnitude are 128 entries of 2 bytes.
#pragma once

#include <bit>

#include "vec.h"

#if defined(HMA_AVX512_BF16)

namespace hma {
namespace {

// Byte `byte` of each magnitude's bfloat16.
constexpr auto bfloat16_bytes(int byte) {
    struct { alignas(64) uint8_t at[128]; } bytes{};
    for (int q = 0; q < 128; q++)
        bytes.at[q] = std::bit_cast<uint32_t>(float(q)) >> (16 + 8 * byte) & 0xff;
    return bytes;
}

// Bytes are looked up one for one: the caller interleaves low and high ones.
struct Bfloat16Table {
    __m512i low[2], high[2];

    HMA_INLINE Bfloat16Table() {
        static constexpr auto low_of = bfloat16_bytes(0), high_of = bfloat16_bytes(1);
        for (int i = 0; i < 2; i++) {
            low[i] = _mm512_load_si512(low_of.at + 64 * i);
            high[i] = _mm512_load_si512(high_of.at + 64 * i);
        }
    }

    // The index is the 7 low bits of a byte.
    HMA_INLINE __m512i low_bytes(__m512i bfp8) const {
        return _mm512_permutex2var_epi8(low[0], bfp8, low[1]);
    }
    HMA_INLINE __m512i high_bytes(__m512i bfp8) const {
        const __m512i sign = _mm512_and_si512(bfp8, _mm512_set1_epi8(int8_t(0x80)));
        return _mm512_or_si512(_mm512_permutex2var_epi8(high[0], bfp8, high[1]), sign);
    }
};

}  // namespace
}  // namespace hma

#endif
