// Scores of one BFP8 page with VDPBF16PS, for N query heads of one KV head.
//
// It multiplies pairs of bfloat16 and adds both products to a float. Magnitudes have 7 bits and the
// queries are bfloat16 as they come: nothing is rounded before the sums, which are float's as in
// decode_bfp8.h. VDPBF16PS takes denormals for 0, which lie below what rows.h promises.
// Weights would not be exact in bfloat16, so values stay with float's multiply-add.
#pragma once

#include "decode_bfp8.h"

#if defined(HMA_AVX512_BF16)

namespace hma {
namespace {

// 16 rows of a face, lanes in rows.h's order. In each 128 bits of at[j], the low half has values 4j
// and 4j + 1 of 4 rows, and the high half 4j + 2 and 4j + 3.
HMA_INLINE Keys load_pairs(const uint8_t* data) {
    __m512i rows[4];
    for (int p = 0; p < 4; p++) rows[p] = load_bytes(data + p * 64);
    const __m512i a = _mm512_unpacklo_epi16(rows[0], rows[1]);
    const __m512i b = _mm512_unpacklo_epi16(rows[2], rows[3]);
    const __m512i c = _mm512_unpackhi_epi16(rows[0], rows[1]);
    const __m512i d = _mm512_unpackhi_epi16(rows[2], rows[3]);
    return {{_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b),
             _mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d)}};
}

// query [group][head][GROUP] bfloat16, logits [head][PAGE] times `unit`
template <int N>
HMA_INLINE void pair_scores(const uint8_t* k, const uint8_t* later, int tiles,
                            const uint16_t* query, int heads, int first, float unit,
                            float* logits) {
    constexpr int FACES = PAGE / 16;  // that share a load of the query
    const Bfloat16Table table;
    F sum[N][FACES] = {};
    const uint16_t* q = query + first * GROUP;
    for (int group = 0; group < 2 * tiles; group++, q += heads * GROUP) {
        Keys keys[FACES];
        F scale[FACES], dot[N][FACES] = {};
        for (int f = 0; f < FACES; f++) {
            const uint8_t* data = bytes_of(k, group, f * 16);
            keys[f] = load_pairs(data);
            scale[f] = key_scales(exponents_of(k, group, f * 16));
            __builtin_prefetch(exponents_of(later, group, f * 16));
            for (int line = 0; line < FACE_BYTES; line += 64)
                __builtin_prefetch(later + (data - k) + line);
        }
        times<4>([&](auto j) {
            __m512i low[FACES], high[FACES];
            for (int f = 0; f < FACES; f++) {
                low[f] = table.low_bytes(keys[f].at[j]);
                high[f] = table.high_bytes(keys[f].at[j]);
            }
            times<2>([&](auto half) {
                __m512bh pairs[FACES];
                for (int f = 0; f < FACES; f++)
                    pairs[f] = (__m512bh)(half ? _mm512_unpackhi_epi8(low[f], high[f])
                                               : _mm512_unpacklo_epi8(low[f], high[f]));
                for (int h = 0; h < N; h++) {
                    const __m512i part = in_register(
                        _mm512_set1_epi32(load<int32_t>(q + h * GROUP + 4 * j + 2 * half)));
                    for (int f = 0; f < FACES; f++)
                        dot[h][f] = (F)_mm512_dpbf16_ps((__m512)dot[h][f], pairs[f],
                                                        (__m512bh)part);
                }
            });
        });
        for (int h = 0; h < N; h++)
            for (int f = 0; f < FACES; f++) sum[h][f] = dot[h][f] * scale[f] + sum[h][f];
    }
    for (int h = 0; h < N; h++)
        for (int f = 0; f < FACES; f++)
            store(logits + (first + h) * PAGE + f * 16, in_row_order(sum[h][f]) * unit);
}

}  // namespace
}  // namespace hma

#endif
