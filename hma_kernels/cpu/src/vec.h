// Vectors in the compiler's own terms; compiled once an instruction set, nothing here may be
// shared between them: everything lives in an anonymous namespace.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "types.h"

#if defined(__AVX512BW__)
#define HMA_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define HMA_VECTOR_BYTES 32
#else
#define HMA_VECTOR_BYTES 16
#endif

#define HMA_INLINE inline __attribute__((always_inline))

namespace hma {
namespace {

template <class T, int N>
using Vec __attribute__((vector_size(N * sizeof(T)))) = T;

template <class T>
constexpr int WIDTH = HMA_VECTOR_BYTES / sizeof(T);

template <class T>
using Reg = Vec<T, WIDTH<T>>;

template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

template <class V, class T>
HMA_INLINE V load(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <class V, class T>
HMA_INLINE void store(T* to, V v) {
    std::memcpy(to, &v, sizeof v);
}

// Both return b where b is NaN.
template <class V>
HMA_INLINE V vmax(V a, V b) {
    return a > b ? a : b;
}

template <class V>
HMA_INLINE V vmin(V a, V b) {
    return a < b ? a : b;
}

// Loaded once and kept: GCC would rather load again for each use.
template <class V>
HMA_INLINE V in_register(V v) {
#if defined(__x86_64__)
    asm("" : "+v"(v));
#endif
    return v;
}

template <class T>
HMA_INLINE Reg<T> splat(T x) {
    return x - Reg<T>{};
}

// 16 integers at a time. Conversions between widths are spelled out where there are instructions
// for them: GCC 12 moves each element by itself.
using U8 = Vec<uint8_t, 16>;
using U16 = Vec<uint16_t, 16>;
using U32 = Vec<uint32_t, 16>;
using I32 = Vec<int32_t, 16>;

#if defined(__AVX512BW__)

HMA_INLINE I32 widen(U8 x) { return (I32)_mm512_cvtepu8_epi32((__m128i)x); }
HMA_INLINE I32 widen(U16 x) { return (I32)_mm512_cvtepu16_epi32((__m256i)x); }
HMA_INLINE U8 narrow_u8(I32 x) { return (U8)_mm512_cvtepi32_epi8((__m512i)x); }
HMA_INLINE U16 narrow_u16(I32 x) { return (U16)_mm512_cvtepi32_epi16((__m512i)x); }

#elif defined(__AVX2__)

using HalfI32 = Vec<int32_t, 8>;

HMA_INLINE I32 join(__m256i low, __m256i high) {
    return __builtin_shufflevector((HalfI32)low, (HalfI32)high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10,
                                   11, 12, 13, 14, 15);
}
HMA_INLINE __m256i low_half(I32 x) {
    return (__m256i)__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7);
}
HMA_INLINE __m256i high_half(I32 x) {
    return (__m256i)__builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
}
HMA_INLINE I32 widen(U8 x) {
    return join(_mm256_cvtepu8_epi32((__m128i)x),
                _mm256_cvtepu8_epi32(_mm_srli_si128((__m128i)x, 8)));
}
HMA_INLINE I32 widen(U16 x) {
    return join(_mm256_cvtepu16_epi32(_mm256_castsi256_si128((__m256i)x)),
                _mm256_cvtepu16_epi32(_mm256_extracti128_si256((__m256i)x, 1)));
}
HMA_INLINE U16 narrow_u16(I32 x) {  // of values below 2^16
    const __m256i lanes = _mm256_packus_epi32(low_half(x), high_half(x));
    return (U16)_mm256_permute4x64_epi64(lanes, 0xd8);
}
HMA_INLINE U8 narrow_u8(I32 x) {  // of values below 2^8
    const __m256i words = (__m256i)narrow_u16(x);
    return (U8)_mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

#else

HMA_INLINE I32 widen(U8 x) { return __builtin_convertvector(x, I32); }
HMA_INLINE I32 widen(U16 x) { return __builtin_convertvector(x, I32); }
HMA_INLINE U8 narrow_u8(I32 x) { return __builtin_convertvector(x, U8); }
HMA_INLINE U16 narrow_u16(I32 x) { return __builtin_convertvector(x, U16); }

#endif

// 2^x, to a few units in the last place; exactly 0 from x = -bias down, x at most bias - 1.
template <class T>
HMA_INLINE Reg<T> exp2(Reg<T> x) {
    using I = Bits<T>;
    constexpr bool single = sizeof(T) == 4;
    constexpr int mantissa = single ? 23 : 52, bias = single ? 127 : 1023;
    constexpr T magic = single ? T(0x1.8p23) : T(0x1.8p52);
    // ln(2)^k / k!, the Taylor series on |f| <= 1/2.
    constexpr int degree = single ? 7 : 14;
    x = vmin(splat<T>(bias - 1), vmax(splat<T>(-bias), x));
    const Reg<T> shifted = x + magic;
    const Reg<T> f = x - (shifted - magic);
    const Reg<I> n = reinterpret_cast<Reg<I>>(shifted) - reinterpret_cast<Reg<I>>(splat<T>(magic));
    constexpr auto coefficients = [] {
        struct { T at[degree + 1]; } c{};
        long double value = 1;
        for (int k = 0; k <= degree; k++) {
            c.at[k] = T(value);
            value *= 0.693147180559945309417232121458176568L / (k + 1);
        }
        return c;
    }();
    Reg<T> y = splat<T>(coefficients.at[degree]);
    for (int k = degree - 1; k >= 0; k--) y = y * f + coefficients.at[k];
    return y * reinterpret_cast<Reg<T>>((n + bias) << mantissa);
}

template <class T>
HMA_INLINE Reg<T> tanh(Reg<T> x) {
    constexpr T two_log2e = T(2.885390081777926814719849362003784L);
    return T(1) - T(2) / (exp2<T>(x * two_log2e) + T(1));
}

// Logits as the dot product gave them -> units of log2. See softmax_factor.
template <class T>
HMA_INLINE Reg<T> to_log2(Reg<T> dot, const Softmax& softmax) {
    constexpr double log2e = 1.442695040888963407359924681001892137;
    return softmax.logit_cap > 0 ? tanh<T>(dot) * T(softmax.logit_cap * log2e) : dot;
}

// What the query is multiplied by before the dot product.
HMA_INLINE double softmax_factor(const Softmax& softmax) {
    constexpr double log2e = 1.442695040888963407359924681001892137;
    return softmax.logit_cap > 0 ? softmax.scale / softmax.logit_cap : softmax.scale * log2e;
}

HMA_INLINE float f16_to_f32(uint16_t h) {
    const int exponent = h >> 10 & 31, fraction = h & 1023;
    uint32_t bits = 0;
    if (exponent == 31) bits = 0x7f800000u | uint32_t(fraction) << 13;
    else if (exponent) bits = uint32_t(exponent + 112) << 23 | uint32_t(fraction) << 13;
    float f = load<float>(&bits);
    if (exponent == 0) f = float(fraction) * 0x1p-24f;
    return h & 0x8000 ? -f : f;
}

HMA_INLINE uint16_t f32_to_f16(float f) {
    const uint32_t bits = load<uint32_t>(&f), magnitude = bits & 0x7fffffff;
    const uint16_t sign = bits >> 16 & 0x8000;
    if (magnitude > 0x7f800000) return sign | 0x7e00;
    if (magnitude >= 0x477ff000) return sign | 0x7c00;
    if (magnitude < 0x38800000) {
        const float scaled = load<float>(&magnitude) + 0.5f;  // unit in the last place: 2^-24
        return sign | uint16_t(load<uint32_t>(&scaled) - 0x3f000000u);
    }
    return sign | uint16_t((magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000u) >> 13);
}

HMA_INLINE float element(const void* from, Type type, int64_t index) {
    if (type == Type::f32) return static_cast<const float*>(from)[index];
    const uint16_t half = static_cast<const uint16_t*>(from)[index];
    if (type == Type::f16) return f16_to_f32(half);
    const uint32_t bits = uint32_t(half) << 16;
    return load<float>(&bits);
}

HMA_INLINE void set_element(void* to, Type type, int64_t index, float value) {
    if (type == Type::f32) {
        static_cast<float*>(to)[index] = value;
        return;
    }
    uint16_t half;
    if (type == Type::f16) {
        half = f32_to_f16(value);
    } else {
        const uint32_t bits = load<uint32_t>(&value);
        const bool nan = (bits & 0x7fffffff) > 0x7f800000;
        half = nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
    static_cast<uint16_t*>(to)[index] = half;
}

}  // namespace
}  // namespace hma
