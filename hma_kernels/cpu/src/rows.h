// BFP8 rows of a face in registers, in the order that each half of attention wants.
//
// Keys: lanes are rows, so that a dot product needs no sum across lanes and one scale serves a
// lane's 16 values. A vector of bytes holds ROWS rows; 4 of them are transposed by 32-bit words, so
// lane 4*i + p is row ROWS*p + i.
// Values: lanes are the 16 values of a row, so that a row's weight is one broadcast.
//
// Everything is exact; scales are kept apart from the magnitudes:
//     value = byte * 2^(E-127) * 2^-6
// with 2^(E-127) made by moving E into a float's exponent field, so that E = 0 counts as 0 and
// E = 255 (an infinity or NaN among the 16) makes all 16 infinite or NaN. Full precision needs
// |query| above 2^-96 and |value| in 2^-102 .. 2^102: far from anything a model computes.
#pragma once

#include <bit>
#include <utility>

#include "vec.h"

namespace hma {
namespace {

// body(constant 0) .. body(constant COUNT - 1)
template <int COUNT, class Body, int... I>
HMA_INLINE void times(Body body, std::integer_sequence<int, I...>) {
    (body(std::integral_constant<int, I>{}), ...);
}
template <int COUNT, class Body>
HMA_INLINE void times(Body body) {
    times<COUNT>(body, std::make_integer_sequence<int, COUNT>{});
}

constexpr int ROWS = HMA_VECTOR_BYTES / 16;
constexpr int W = WIDTH<float>;
using F = Reg<float>;

// What a byte's unit is beside 1 in key(); queries carry the rest.
constexpr float KEY_SCALE = 0x1p-30f;
// The same of a byte in Values. Part of it goes on the weights and the rest on the sums, so
// that neither leaves float's range.
constexpr int WEIGHT_UNIT = W == 8 ? -24 : 0;  // log2
constexpr float SUM_SCALE = 0x1p-6f;

#if defined(HMA_AVX512)

using Bytes = __m512i;

HMA_INLINE Bytes twos_complement(Bytes bytes) {
    const Bytes q = _mm512_and_si512(bytes, _mm512_set1_epi8(0x7f));
    return _mm512_mask_sub_epi8(q, _mm512_movepi8_mask(bytes), _mm512_setzero_si512(), q);
}

HMA_INLINE Bytes load_bytes(const uint8_t* from) { return _mm512_loadu_si512(from); }

HMA_INLINE Bytes low_words(Bytes a, Bytes b) { return _mm512_unpacklo_epi32(a, b); }
HMA_INLINE Bytes high_words(Bytes a, Bytes b) { return _mm512_unpackhi_epi32(a, b); }
HMA_INLINE Bytes low_pairs(Bytes a, Bytes b) { return _mm512_unpacklo_epi64(a, b); }
HMA_INLINE Bytes high_pairs(Bytes a, Bytes b) { return _mm512_unpackhi_epi64(a, b); }

template <int I>
HMA_INLINE F key(Bytes words) {
    const __m128i top = _mm_setr_epi8(-1, -1, -1, I, -1, -1, -1, I + 4, -1, -1, -1, I + 8, -1, -1,
                                      -1, I + 12);
    return (F)_mm512_cvtepi32_ps(_mm512_shuffle_epi8(words, _mm512_broadcast_i32x4(top)));
}

HMA_INLINE F key_scales(const uint8_t* exponents) {
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(exponents));
    return (F)_mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_shuffle_epi8(bytes, order)), 23);
}

HMA_INLINE F in_row_order(F lanes) {
    const __m512i from = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    return (F)_mm512_permutexvar_ps(from, (__m512)lanes);
}

HMA_INLINE F scales(const uint8_t* exponents) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(exponents));
    return (F)_mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23);
}

#if defined(HMA_AVX512_BF16)

// The low or the high bytes of the 128 magnitudes as bfloat16.
template <int BYTE>
HMA_INLINE void magnitude_table(__m512i (&table)[2]) {
    alignas(64) static constexpr auto bytes = [] {
        struct { uint8_t at[128]; } t{};
        for (int q = 0; q < 128; q++)
            t.at[q] = std::bit_cast<uint32_t>(float(q)) >> (16 + 8 * BYTE) & 0xff;
        return t;
    }();
    for (int i = 0; i < 2; i++) table[i] = _mm512_load_si512(bytes.at + 64 * i);
}

struct Bfloat16 {
    __m512i low[2], high[2];

    HMA_INLINE Bfloat16() {
        magnitude_table<0>(low);
        magnitude_table<1>(high);
    }
    HMA_INLINE __m512i low_bytes(__m512i bytes) const {
        return _mm512_permutex2var_epi8(low[0], bytes, low[1]);
    }
    HMA_INLINE __m512i high_bytes(__m512i bytes) const {
        const __m512i sign = _mm512_and_si512(bytes, _mm512_set1_epi8(int8_t(0x80)));
        return _mm512_or_si512(_mm512_permutex2var_epi8(high[0], bytes, high[1]), sign);
    }
};

// What bfp8_values reads: the page itself.
constexpr bool PREPARED = false;

// HMA_VECTOR_BYTES of a column: W / 4 rows, GROUP / W vectors each.
struct Values {
    __m512i low, high;

    HMA_INLINE explicit Values(const uint8_t* bytes) {
        const Bfloat16 table;
        const __m512i packed = load_bytes(bytes);
        low = table.low_bytes(packed);
        high = table.high_bytes(packed);
    }
    HMA_INLINE void row(int r, F* values) const {
        const __m512i dims = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i from = (__m512i)(((Vec<uint32_t, 16>)dims + 16 * r) * 0x01010000 + 0x40000000);
        values[0] = (F)_mm512_maskz_permutex2var_epi8(0xcccccccccccccccc, low, from, high);
    }
};

#else

// What bfp8_values reads: the page's bytes as twos_complement.
constexpr bool PREPARED = true;

// HMA_VECTOR_BYTES of a column: W / 4 rows, GROUP / W vectors each.
struct Values {
    const uint8_t* bytes;

    HMA_INLINE explicit Values(const uint8_t* from) : bytes(from) {}
    HMA_INLINE void row(int r, F* values) const {
        const __m128i own = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes) + r);
        values[0] = (F)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(own));
    }
};

#endif

HMA_INLINE bool any_above(F a, float b) {
    return _mm512_cmp_ps_mask((__m512)a, _mm512_set1_ps(b), _CMP_GT_OQ) != 0;
}

#elif defined(__AVX2__)

using Bytes = __m256i;

HMA_INLINE Bytes twos_complement(Bytes bytes) {
    return _mm256_sign_epi8(_mm256_and_si256(bytes, _mm256_set1_epi8(0x7f)), bytes);
}

HMA_INLINE Bytes load_bytes(const uint8_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

HMA_INLINE Bytes low_words(Bytes a, Bytes b) { return _mm256_unpacklo_epi32(a, b); }
HMA_INLINE Bytes high_words(Bytes a, Bytes b) { return _mm256_unpackhi_epi32(a, b); }
HMA_INLINE Bytes low_pairs(Bytes a, Bytes b) { return _mm256_unpacklo_epi64(a, b); }
HMA_INLINE Bytes high_pairs(Bytes a, Bytes b) { return _mm256_unpackhi_epi64(a, b); }

template <int I>
HMA_INLINE F key(Bytes words) {
    const __m256i top = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        -1, -1, -1, I, -1, -1, -1, I + 4, -1, -1, -1, I + 8, -1, -1, -1, I + 12));
    return (F)_mm256_cvtepi32_ps(_mm256_shuffle_epi8(words, top));
}

HMA_INLINE F key_scales(const uint8_t* exponents) {
    const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(exponents));
    return (F)_mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_shuffle_epi8(eight, order)), 23);
}

HMA_INLINE F in_row_order(F lanes) {
    return (F)_mm256_permutevar8x32_ps((__m256)lanes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

HMA_INLINE F scales(const uint8_t* exponents) {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(exponents));
    return (F)_mm256_slli_epi32(_mm256_cvtepu8_epi32(eight), 23);
}

constexpr bool PREPARED = true;

struct Values {
    const uint8_t* bytes;

    HMA_INLINE explicit Values(const uint8_t* from) : bytes(from) {}
    HMA_INLINE void row(int r, F* values) const {
        const __m256i low = _mm256_setr_epi8(-1, -1, -1, 0, -1, -1, -1, 1, -1, -1, -1, 2, -1, -1, -1,
                                             3, -1, -1, -1, 4, -1, -1, -1, 5, -1, -1, -1, 6, -1, -1,
                                             -1, 7);
        const __m256i high = _mm256_or_si256(low, _mm256_set1_epi32(0x08000000));
        const __m256i twice = _mm256_broadcastsi128_si256(
            _mm_load_si128(reinterpret_cast<const __m128i*>(bytes) + r));
        values[0] = (F)_mm256_cvtepi32_ps(_mm256_shuffle_epi8(twice, low));
        values[1] = (F)_mm256_cvtepi32_ps(_mm256_shuffle_epi8(twice, high));
    }
};

HMA_INLINE bool any_above(F a, float b) {
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, _mm256_set1_ps(b), _CMP_GT_OQ)) != 0;
}

#else

using Bytes = Vec<int8_t, 16>;

HMA_INLINE Bytes twos_complement(Bytes bytes) {
    const Bytes sign = bytes < 0;
    return ((bytes & 0x7f) ^ sign) - sign;
}

HMA_INLINE Bytes load_bytes(const uint8_t* from) { return load<Bytes>(from); }

using Words = Vec<int32_t, 4>;
HMA_INLINE Bytes merge(Bytes a, Bytes b, Words order) {
    return (Bytes)__builtin_shuffle((Words)a, (Words)b, order);
}
HMA_INLINE Bytes low_words(Bytes a, Bytes b) { return merge(a, b, Words{0, 4, 1, 5}); }
HMA_INLINE Bytes high_words(Bytes a, Bytes b) { return merge(a, b, Words{2, 6, 3, 7}); }
HMA_INLINE Bytes low_pairs(Bytes a, Bytes b) { return merge(a, b, Words{0, 1, 4, 5}); }
HMA_INLINE Bytes high_pairs(Bytes a, Bytes b) { return merge(a, b, Words{2, 3, 6, 7}); }

template <int I>
HMA_INLINE F key(Bytes words) {
    return __builtin_convertvector((Words)words << (24 - 8 * I) & ~0xffffff, F);
}

HMA_INLINE F key_scales(const uint8_t* exponents) {
    const auto wide = __builtin_convertvector(load<Vec<uint8_t, 4>>(exponents), Vec<uint32_t, 4>);
    return (F)(wide << 23);
}

HMA_INLINE F in_row_order(F lanes) { return lanes; }

HMA_INLINE F scales(const uint8_t* exponents) { return key_scales(exponents); }

HMA_INLINE F top_bytes(Words words) { return __builtin_convertvector(words >> 24, F); }

constexpr bool PREPARED = true;

struct Values {
    Bytes bytes;

    HMA_INLINE explicit Values(const uint8_t* from) : bytes(load_bytes(from)) {}
    HMA_INLINE void row(int, F* values) const {
        // Each byte to the top of a word, by interleaving with zeros twice.
        using Halves = Vec<int16_t, 8>;
        const Bytes first{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
        times<2>([&](auto i) {
            const auto halves = (Halves)__builtin_shuffle(Bytes{}, bytes, first + int8_t(8 * i));
            values[2 * i] = top_bytes(
                (Words)__builtin_shuffle(Halves{}, halves, Halves{0, 8, 1, 9, 2, 10, 3, 11}));
            values[2 * i + 1] = top_bytes(
                (Words)__builtin_shuffle(Halves{}, halves, Halves{4, 12, 5, 13, 6, 14, 7, 15}));
        });
    }
};

HMA_INLINE bool any_above(F a, float b) { return a[0] > b || a[1] > b || a[2] > b || a[3] > b; }

#endif

HMA_INLINE void store_vector(uint8_t* to, Bytes bytes) { std::memcpy(to, &bytes, sizeof bytes); }

// sum += a * b. GCC would overwrite a factor and copy the sum back.
HMA_INLINE void add_product(F& sum, F a, F b) {
#if defined(__FMA__) || defined(__AVX512F__)
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#else
    sum += a * b;
#endif
}

// The same with b in all lanes.
HMA_INLINE void add_product(F& sum, F a, const float* b) {
#if defined(__AVX512F__)
    asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(a), "m"(*b));
#else
    add_product(sum, a, splat<float>(*b));
#endif
}

// W rows of a face: lane l of at[j] has values 4j..4j+3 of its row.
struct Keys {
    Bytes at[4];
};

HMA_INLINE Keys load_keys(const uint8_t* data) {
    Bytes rows[4];
    for (int p = 0; p < 4; p++)
        rows[p] = twos_complement(load_bytes(data + p * HMA_VECTOR_BYTES));
    const Bytes a = low_words(rows[0], rows[1]), b = low_words(rows[2], rows[3]);
    const Bytes c = high_words(rows[0], rows[1]), d = high_words(rows[2], rows[3]);
    return {{low_pairs(a, b), high_pairs(a, b), low_pairs(c, d), high_pairs(c, d)}};
}

}  // namespace
}  // namespace hma
