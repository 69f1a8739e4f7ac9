// Vectors in the compiler's own terms; compiled once an instruction set, nothing here may be
// shared between them: everything lives in an anonymous namespace.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "types.h"

#if defined(__AVX512BW__)
#define HMA_AVX512 1
#endif
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define HMA_AVX512_BF16 1
#endif

#if defined(HMA_AVX512)
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

// body(constant 0) .. body(constant COUNT - 1)
template <int COUNT, class Body, int... I>
HMA_INLINE void times(Body body, std::integer_sequence<int, I...>) {
    (body(std::integral_constant<int, I>{}), ...);
}
template <int COUNT, class Body>
HMA_INLINE void times(Body body) {
    times<COUNT>(body, std::make_integer_sequence<int, COUNT>{});
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

// 2^(x + PLUS), to a few units in the last place; x + PLUS must lie between the exponents of the
// smallest and the largest normal number, or the result is any number.
template <class T, int PLUS = 0>
HMA_INLINE Reg<T> exp2_in_range(Reg<T> x) {
    using I = Bits<T>;
    constexpr bool single = sizeof(T) == 4;
    constexpr int mantissa = single ? 23 : 52, bias = single ? 127 : 1023;
    // Its last bits are the exponent field of 2^PLUS: x + magic has that of the result.
    constexpr T magic = (single ? T(0x1.8p23) : T(0x1.8p52)) + (bias + PLUS);
    // ln(2)^k / k!, the Taylor series on |f| <= 1/2.
    constexpr int degree = single ? 6 : 14;
    constexpr auto coefficients = [] {
        struct { T at[degree + 1]; } c{};
        long double value = 1;
        for (int k = 0; k <= degree; k++) {
            c.at[k] = T(value);
            value *= 0.693147180559945309417232121458176568L / (k + 1);
        }
        return c;
    }();
    const Reg<T> shifted = x + magic;
    const Reg<T> f = x - (shifted - magic);
    Reg<T> y = splat<T>(coefficients.at[degree]);
    for (int k = degree - 1; k >= 0; k--) y = y * f + coefficients.at[k];
    return y * reinterpret_cast<Reg<T>>(reinterpret_cast<Reg<I>>(shifted) << mantissa);
}

// 2^x; exactly 0 from x = -bias down, x at most bias - 1.
template <class T>
HMA_INLINE Reg<T> exp2(Reg<T> x) {
    constexpr int bias = sizeof(T) == 4 ? 127 : 1023;
    return exp2_in_range<T>(vmin(splat<T>(bias - 1), vmax(splat<T>(-bias), x)));
}

template <class T>
HMA_INLINE Reg<T> tanh(Reg<T> x) {
    constexpr T two_log2e = T(2.885390081777926814719849362003784L);
    return T(1) - T(2) / (exp2<T>(x * two_log2e) + T(1));
}

// Logits as the dot product gave them -> units of log2. See softmax_factor.
template <class T>
HMA_INLINE Reg<T> to_log2(Reg<T> dot, const Softmax& softmax) {
    return softmax.logit_cap > 0 ? tanh<T>(dot) * T(softmax.logit_cap * LOG2E) : dot;
}

// What the query is multiplied by before the dot product.
HMA_INLINE double softmax_factor(const Softmax& softmax) {
    return softmax.logit_cap > 0 ? softmax.scale / softmax.logit_cap : softmax.scale * LOG2E;
}

HMA_INLINE float f16_to_f32(uint16_t h) {
    const int exponent = h >> 10 & 31, fraction = h & 1023;
    uint32_t bits = 0;
    if (exponent == 31) bits = 0x7f800000u | uint32_t(fraction) << 13 | (fraction ? 1u << 22 : 0);
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
