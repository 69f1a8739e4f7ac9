// Scores and weighted values of one BF16 page, for N query heads of one KV head.
#pragma once

#include "rows.h"

namespace hma {
namespace {

HMA_INLINE F from_bf16(const uint16_t* bf16) {
#if defined(HMA_AVX512)
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bf16));
    return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#elif defined(__AVX2__)
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bf16));
    return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#else
    const auto bits = __builtin_convertvector(load<Vec<uint16_t, W>>(bf16), Vec<uint32_t, W>);
    return (F)(bits << 16);
#endif
}

// Word p of result's 128-bit lane i: the sum of that lane of v[p].
HMA_INLINE F lane_sums(const F* v) {
    const auto add = [](F a, F b) {
        return (F)low_words((Bytes)a, (Bytes)b) + (F)high_words((Bytes)a, (Bytes)b);
    };
    const Bytes a = (Bytes)add(v[0], v[1]), b = (Bytes)add(v[2], v[3]);
    return (F)low_pairs(a, b) + (F)high_pairs(a, b);
}

// query [head][dim]; tokens begin..end-1
template <int N>
HMA_INLINE void bf16_scores(const uint16_t* k, int dim, const float* query, int first, int begin,
                            int end, float* logits) {
    for (int token = begin; token < end; token += 4) {
        for (int h = 0; h < N; h++) {
            const float* q = query + (first + h) * dim;
            F sum[4] = {};
            for (int t = 0; t < 4; t++) {
                const uint16_t* row = k + (token + t < end ? token + t : end - 1) * dim;
                for (int i = 0; i < dim; i += W)
                    sum[t] = from_bf16(row + i) * load<F>(q + i) + sum[t];
            }
            const F lanes = lane_sums(sum);
            for (int t = 0; t < 4 && token + t < end; t++) {
                float logit = 0;
                for (int i = t; i < W; i += 4) logit += lanes[i];
                logits[(first + h) * PAGE + token + t] = logit;
            }
        }
    }
}

// weights [head][PAGE], out [head][dim]
template <int N>
HMA_INLINE void bf16_values(const uint16_t* v, int dim, const float* weights, int first, int begin,
                            int end, F* out) {
    for (int i = 0; i < dim / W; i++) {
        F sum[N];
        for (int h = 0; h < N; h++) sum[h] = out[(first + h) * (dim / W) + i];
        for (int token = begin; token < end; token++) {
            const F value = from_bf16(v + token * dim + i * W);
            for (int h = 0; h < N; h++)
                sum[h] = value * weights[(first + h) * PAGE + token] + sum[h];
        }
        for (int h = 0; h < N; h++) out[(first + h) * (dim / W) + i] = sum[h];
    }
}

}  // namespace
}  // namespace hma
