// BFP8 rows in registers: a vector holds ROWS rows of a face, 4 of a row's 16 values in each
// 128-bit lane. Everything is exact; scales are kept apart from the magnitudes:
//     value = byte * 2^24 * 2^(E-127) * 2^-30
// with 2^(E-127) made by moving E into a float's exponent field, so that E = 0 counts as 0 and
// E = 255 (an infinity or NaN among the 16) makes all 16 infinite or NaN. Full precision needs
// |query| above 2^-96 and |value| in 2^-102 .. 2^106: far from anything a model computes.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "vec.h"

namespace hma {
namespace {

constexpr float MAGNITUDE_SCALE = 0x1p-30f;
// Part of it goes on the weights and the rest on the sums, so that neither leaves float's range.
constexpr float WEIGHT_SCALE = 0x1p-24f, SUM_SCALE = 0x1p-6f;

constexpr int ROWS = HMA_VECTOR_BYTES / 16;
using F = Reg<float>;

struct Quads {
    F at[4];  // lane r of at[j]: values 4j..4j+3 of row r, times 2^24
};

#if defined(__AVX512BW__)

HMA_INLINE Quads magnitudes(const uint8_t* data) {
    const __m512i bytes = _mm512_loadu_si512(data);
    const __m512i q = _mm512_and_si512(bytes, _mm512_set1_epi8(0x7f));
    const __m512i integer =
        _mm512_mask_sub_epi8(q, _mm512_movepi8_mask(bytes), _mm512_setzero_si512(), q);
    Quads quads;
    for (int j = 0; j < 4; j++) {
        const int b = 4 * j;
        const __m128i top = _mm_setr_epi8(-1, -1, -1, b, -1, -1, -1, b + 1, -1, -1, -1, b + 2, -1,
                                          -1, -1, b + 3);
        const __m512i spread = _mm512_shuffle_epi8(integer, _mm512_broadcast_i32x4(top));
        quads.at[j] = reinterpret_cast<F>(_mm512_cvtepi32_ps(spread));
    }
    return quads;
}

HMA_INLINE F row_scales(const uint8_t* exponents) {
    int32_t four;
    std::memcpy(&four, exponents, 4);
    const __m512i spread =
        _mm512_shuffle_epi8(_mm512_set1_epi32(four),
                            _mm512_set_epi32(~0xff | 3, ~0xff | 3, ~0xff | 3, ~0xff | 3, ~0xff | 2,
                                             ~0xff | 2, ~0xff | 2, ~0xff | 2, ~0xff | 1, ~0xff | 1,
                                             ~0xff | 1, ~0xff | 1, ~0xff, ~0xff, ~0xff, ~0xff));
    return reinterpret_cast<F>(_mm512_slli_epi32(spread, 23));
}

// One scale an element.
HMA_INLINE F scales(const uint8_t* exponents) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(exponents));
    return (F)_mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23);
}

// Lane r: from[r] four times.
HMA_INLINE F replicate(const float* from) {
    const __m512 four = _mm512_broadcast_f32x4(_mm_loadu_ps(from));
    const __m512i lane = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    return reinterpret_cast<F>(_mm512_permutevar_ps(four, lane));
}

// Each lane of each of 4 vectors summed: result[i * ROWS + r] is lane r of v[i].
HMA_INLINE F lane_sums(const F* v) {
    const auto add = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    };
    const __m512d low = _mm512_castps_pd(add((__m512)v[0], (__m512)v[1]));
    const __m512d high = _mm512_castps_pd(add((__m512)v[2], (__m512)v[3]));
    const __m512 sums = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                                      _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    return (F)_mm512_permutexvar_ps(order, sums);
}

#elif defined(__AVX2__)

HMA_INLINE Quads magnitudes(const uint8_t* data) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
    const __m256i q = _mm256_and_si256(bytes, _mm256_set1_epi8(0x7f));
    const __m256i integer = _mm256_sign_epi8(q, bytes);
    Quads quads;
    for (int j = 0; j < 4; j++) {
        const int b = 4 * j;
        const __m128i top = _mm_setr_epi8(-1, -1, -1, b, -1, -1, -1, b + 1, -1, -1, -1, b + 2, -1,
                                          -1, -1, b + 3);
        const __m256i spread = _mm256_shuffle_epi8(integer, _mm256_broadcastsi128_si256(top));
        quads.at[j] = (F)_mm256_cvtepi32_ps(spread);
    }
    return quads;
}

HMA_INLINE F row_scales(const uint8_t* exponents) {
    int16_t two;
    std::memcpy(&two, exponents, 2);
    const __m256i spread = _mm256_shuffle_epi8(
        _mm256_set1_epi16(two), _mm256_set_epi32(~0xff | 1, ~0xff | 1, ~0xff | 1, ~0xff | 1, ~0xff,
                                                 ~0xff, ~0xff, ~0xff));
    return (F)_mm256_slli_epi32(spread, 23);
}

HMA_INLINE F scales(const uint8_t* exponents) {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(exponents));
    return (F)_mm256_slli_epi32(_mm256_cvtepu8_epi32(eight), 23);
}

HMA_INLINE F replicate(const float* from) {
    double two;
    std::memcpy(&two, from, 8);
    const __m256 pairs = _mm256_castpd_ps(_mm256_set1_pd(two));
    return (F)_mm256_permutevar_ps(pairs, _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0));
}

HMA_INLINE F lane_sums(const F* v) {
    const __m256 low = _mm256_hadd_ps((__m256)v[0], (__m256)v[1]);
    const __m256 high = _mm256_hadd_ps((__m256)v[2], (__m256)v[3]);
    const __m256i order = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
    return (F)_mm256_permutevar8x32_ps(_mm256_hadd_ps(low, high), order);
}

#else

HMA_INLINE Quads magnitudes(const uint8_t* data) {
    Quads quads;
    for (int i = 0; i < GROUP; i++) {
        const float q = float(data[i] & 0x7f) * 0x1p24f;
        quads.at[i / 4][i % 4] = data[i] & 0x80 ? -q : q;
    }
    return quads;
}

HMA_INLINE F row_scales(const uint8_t* exponents) {
    const uint32_t bits = uint32_t(*exponents) << 23;
    return splat<float>(0) + load<float>(&bits);
}

HMA_INLINE F scales(const uint8_t* exponents) {
    F result;
    for (int i = 0; i < 4; i++) result[i] = row_scales(exponents + i)[0];
    return result;
}

HMA_INLINE F replicate(const float* from) { return splat<float>(*from); }

HMA_INLINE F lane_sums(const F* v) {
    F sums;
    for (int i = 0; i < 4; i++) sums[i] = (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
    return sums;
}

#endif

}  // namespace
}  // namespace hma
