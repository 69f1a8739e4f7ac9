// One tile row, 32 values in two groups, to and from BFP8: the rules of reference.py, byte for
// byte, once an instruction set.
//
// Device rounding:  q = (m + 2^s) >> (s + 1),  m the 8-bit bfloat16 significand, s = E - e.
// Host rounding:    q = half to even of (m >> s) / 2^17,  m the 24-bit float32 significand; that of
//                   a bfloat16 ends in 16 zeros, so that 8 bits of it do.
// Unpacking:        float(q) has exponent field 133 - lz(q); adding E - 133 makes it E - lz(q).
#pragma once

#include "vec.h"

namespace hma {
namespace {

// Where a row's two groups lie; each is an exponent byte and 16 bytes of data.
struct RowBytes {
    uint8_t* exponent[2];
    uint8_t* data[2];
};

struct ConstRowBytes {
    uint8_t exponent[2];
    const uint8_t* data[2];
};

#if defined(HMA_AVX512)

HMA_INLINE __m512i load_f32(const void* x, Type type, int64_t at) {
    if (type == Type::f32) return _mm512_loadu_si512(static_cast<const float*>(x) + at);
    const __m256i half = _mm256_loadu_si256(
        reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(x) + at));
    if (type == Type::f16) return _mm512_castps_si512(_mm512_cvtph_ps(half));
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
}

HMA_INLINE __m512i load_bf16(const void* x, Type type, int64_t at) {
    if (type == Type::bf16) return _mm512_loadu_si512(static_cast<const uint16_t*>(x) + at);
    const __m512i low = _mm512_srli_epi32(load_f32(x, type, at), 16);
    const __m512i high = _mm512_srli_epi32(load_f32(x, type, at + GROUP), 16);
    const __m512i order = _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0);
    return _mm512_permutexvar_epi64(order, _mm512_packus_epi32(low, high));
}

template <Rounding rounding>
HMA_INLINE void quantize_bf16(__m512i x, const RowBytes& to) {
    const auto all = [](int16_t value) { return _mm512_set1_epi16(value); };
    constexpr bool device = rounding == Rounding::device;
    __m512i magnitude = _mm512_and_si512(x, all(0x7fff));
    if (device) magnitude = _mm512_min_epu16(magnitude, all(0x7f80));  // NaN as infinity
    __m512i most = _mm512_max_epu16(magnitude, _mm512_permutex_epi64(magnitude, 0x4e));
    most = _mm512_max_epu16(most, _mm512_shuffle_epi32(most, _MM_PERM_BADC));
    most = _mm512_max_epu16(most, _mm512_shuffle_epi32(most, _MM_PERM_CDAB));
    most = _mm512_max_epu16(most, _mm512_rol_epi32(most, 16));
    most = _mm512_srli_epi16(most, 7);
    const __m512i shift = _mm512_sub_epi16(most, _mm512_srli_epi16(magnitude, 7));
    const __mmask32 normal = _mm512_test_epi16_mask(magnitude, all(0x7f80));
    const __m512i significand =
        _mm512_or_si512(_mm512_and_si512(magnitude, all(0x7f)), all(0x80));
    const __m512i places = _mm512_add_epi16(shift, all(1));
    __m512i rounded = _mm512_add_epi16(significand, _mm512_sllv_epi16(all(1), shift));
    if (!device) {
        const __m512i odd = _mm512_and_si512(_mm512_srlv_epi16(significand, places), all(1));
        rounded = _mm512_sub_epi16(_mm512_add_epi16(rounded, odd), all(1));
    }
    __m512i q = _mm512_srlv_epi16(rounded, places);
    q = _mm512_maskz_min_epu16(normal, q, all(127));
    const __m512i sign = _mm512_and_si512(_mm512_srli_epi16(x, 8), all(0x80));
    q = _mm512_mask_or_epi32(q, -1, q, _mm512_maskz_mov_epi16(_mm512_test_epi16_mask(q, q), sign));
    const __m256i bytes = _mm512_cvtepi16_epi8(q);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to.data[0]), _mm256_castsi256_si128(bytes));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to.data[1]), _mm256_extracti128_si256(bytes, 1));
    *to.exponent[0] = _mm_cvtsi128_si32(_mm512_castsi512_si128(most));
    *to.exponent[1] = _mm_cvtsi128_si32(_mm512_extracti32x4_epi32(most, 2));
}

HMA_INLINE void quantize_host(__m512i x, uint8_t* exponent, uint8_t* data) {
    const auto all = [](int32_t value) { return _mm512_set1_epi32(value); };
    const __m512i magnitude = _mm512_and_si512(x, all(0x7fffffff));
    __m512i most = _mm512_max_epu32(magnitude, _mm512_shuffle_i64x2(magnitude, magnitude, 0x4e));
    most = _mm512_max_epu32(most, _mm512_permutex_epi64(most, 0x4e));
    most = _mm512_max_epu32(most, _mm512_shuffle_epi32(most, _MM_PERM_BADC));
    most = _mm512_max_epu32(most, _mm512_shuffle_epi32(most, _MM_PERM_CDAB));
    most = _mm512_srli_epi32(most, 23);
    const __m512i shift = _mm512_sub_epi32(most, _mm512_srli_epi32(magnitude, 23));
    const __mmask16 normal = _mm512_test_epi32_mask(magnitude, all(0x7f800000));
    __m512i m = _mm512_or_si512(_mm512_and_si512(magnitude, all(0x7fffff)), all(0x800000));
    m = _mm512_srlv_epi32(m, shift);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(m, 17), all(1));
    __m512i q = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(m, all(0xffff)), odd), 17);
    q = _mm512_maskz_min_epu32(normal, q, all(127));
    const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(x, 24), all(0x80));
    q = _mm512_mask_or_epi32(q, _mm512_test_epi32_mask(q, q), q, sign);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(data), _mm512_cvtepi32_epi8(q));
    *exponent = _mm_cvtsi128_si32(_mm512_castsi512_si128(most));
}

template <Type type, Rounding rounding>
HMA_INLINE void pack_row(const void* x, int64_t at, const RowBytes& to) {
    if constexpr (rounding == Rounding::device || type == Type::bf16) {
        quantize_bf16<rounding>(load_bf16(x, type, at), to);
    } else {
        for (int half = 0; half < 2; half++)
            quantize_host(load_f32(x, type, at + half * GROUP), to.exponent[half], to.data[half]);
    }
}

// float32 bits of one group.
HMA_INLINE __m512i dequantize(int exponent, const uint8_t* data) {
    const __m512i bytes =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)));
    const __m512i q = _mm512_and_si512(bytes, _mm512_set1_epi32(0x7f));
    const __m512i sign = _mm512_slli_epi32(_mm512_srli_epi32(bytes, 7), 31);
    const __m512i value = _mm512_add_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(q)),
                                           _mm512_set1_epi32((exponent - 133) * (1 << 23)));
    // A negative sum has E < lz and is +0; q = 0 keeps its sign.
    const __mmask16 used = _mm512_test_epi32_mask(q, q);
    const __mmask16 flushed = used & _mm512_movepi32_mask(value);
    return _mm512_maskz_or_epi32(~flushed, sign, _mm512_maskz_mov_epi32(used, value));
}

template <Type type>
HMA_INLINE void unpack_row(const ConstRowBytes& row, void* out, int64_t at) {
    for (int half = 0; half < 2; half++) {
        const __m512i bits = dequantize(row.exponent[half], row.data[half]);
        if (type == Type::f32) {
            _mm512_storeu_si512(static_cast<float*>(out) + at + half * GROUP, bits);
        } else {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(out) + at +
                                                           half * GROUP),
                                _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
        }
    }
}

#elif defined(__AVX2__)

struct Group32 {
    __m256i half[2];
};

HMA_INLINE __m128i load128(const void* from) {
    return _mm_loadu_si128(static_cast<const __m128i*>(from));
}

HMA_INLINE Group32 load_f32(const void* x, Type type, int64_t at) {
    Group32 group;
    for (int i = 0; i < 2; i++) {
        if (type == Type::f32) {
            group.half[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(
                static_cast<const float*>(x) + at + i * 8));
            continue;
        }
        const __m128i half = load128(static_cast<const uint16_t*>(x) + at + i * 8);
        group.half[i] = type == Type::f16 ? _mm256_castps_si256(_mm256_cvtph_ps(half))
                                          : _mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
    }
    return group;
}

HMA_INLINE __m256i load_bf16(const void* x, Type type, int64_t at) {
    if (type == Type::bf16)
        return _mm256_loadu_si256(
            reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(x) + at));
    const Group32 group = load_f32(x, type, at);
    const __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(group.half[0], 16),
                                               _mm256_srli_epi32(group.half[1], 16));
    return _mm256_permute4x64_epi64(packed, 0xd8);
}

HMA_INLINE void store_bytes(uint8_t* to, __m256i words) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_packus_epi16(_mm256_castsi256_si128(words),
                                      _mm256_extracti128_si256(words, 1)));
}

HMA_INLINE void quantize_device(__m256i x, uint8_t* exponent, uint8_t* data) {
    const auto all = [](int16_t value) { return _mm256_set1_epi16(value); };
    const __m256i magnitude =
        _mm256_min_epu16(_mm256_and_si256(x, all(0x7fff)), all(0x7f80));  // NaN as infinity
    __m256i most = _mm256_max_epu16(magnitude, _mm256_permute4x64_epi64(magnitude, 0x4e));
    most = _mm256_max_epu16(most, _mm256_shuffle_epi32(most, 0x4e));
    most = _mm256_max_epu16(most, _mm256_shuffle_epi32(most, 0xb1));
    most = _mm256_max_epu16(
        most, _mm256_or_si256(_mm256_slli_epi32(most, 16), _mm256_srli_epi32(most, 16)));
    most = _mm256_srli_epi16(most, 7);
    const __m256i own = _mm256_srli_epi16(magnitude, 7);
    const __m256i shift = _mm256_min_epu16(_mm256_sub_epi16(most, own), all(15));
    const __m256i significand =
        _mm256_or_si256(_mm256_and_si256(magnitude, all(0x7f)), all(0x80));
    // mulhrs(m, 2^(14-s)) is (m * 2^(14-s) + 2^14) >> 15; 2^(14-s) looked up, 0 from s = 8 on.
    const __m256i high = _mm256_shuffle_epi8(
        _mm256_broadcastsi128_si256(_mm_setr_epi8(64, 32, 16, 8, 4, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0)),
        shift);
    const __m256i factor =
        _mm256_or_si256(_mm256_slli_epi16(high, 8),
                        _mm256_and_si256(_mm256_cmpeq_epi16(shift, all(7)), all(0x80)));
    __m256i q = _mm256_min_epu16(_mm256_mulhrs_epi16(significand, factor), all(127));
    const __m256i zero = _mm256_setzero_si256();
    q = _mm256_andnot_si256(_mm256_cmpeq_epi16(own, zero), q);
    const __m256i sign = _mm256_and_si256(_mm256_srli_epi16(x, 8), all(0x80));
    store_bytes(data, _mm256_or_si256(q, _mm256_andnot_si256(_mm256_cmpeq_epi16(q, zero), sign)));
    *exponent = _mm_cvtsi128_si32(_mm256_castsi256_si128(most));
}

HMA_INLINE void quantize_host(const Group32& x, uint8_t* exponent, uint8_t* data) {
    const auto all = [](int32_t value) { return _mm256_set1_epi32(value); };
    __m256i magnitude[2], q[2];
    for (int i = 0; i < 2; i++) magnitude[i] = _mm256_and_si256(x.half[i], all(0x7fffffff));
    __m256i most = _mm256_max_epu32(magnitude[0], magnitude[1]);
    most = _mm256_max_epu32(most, _mm256_permute4x64_epi64(most, 0x4e));
    most = _mm256_max_epu32(most, _mm256_shuffle_epi32(most, 0x4e));
    most = _mm256_max_epu32(most, _mm256_shuffle_epi32(most, 0xb1));
    most = _mm256_srli_epi32(most, 23);
    const __m256i zero = _mm256_setzero_si256();
    for (int i = 0; i < 2; i++) {
        const __m256i own = _mm256_srli_epi32(magnitude[i], 23);
        __m256i m = _mm256_or_si256(_mm256_and_si256(magnitude[i], all(0x7fffff)), all(0x800000));
        m = _mm256_srlv_epi32(m, _mm256_sub_epi32(most, own));
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(m, 17), all(1));
        q[i] = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(m, all(0xffff)), odd), 17);
        q[i] = _mm256_andnot_si256(_mm256_cmpeq_epi32(own, zero), _mm256_min_epu32(q[i], all(127)));
        const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(x.half[i], 24), all(0x80));
        q[i] = _mm256_or_si256(q[i], _mm256_andnot_si256(_mm256_cmpeq_epi32(q[i], zero), sign));
    }
    store_bytes(data, _mm256_permute4x64_epi64(_mm256_packus_epi32(q[0], q[1]), 0xd8));
    *exponent = _mm_cvtsi128_si32(_mm256_castsi256_si128(most));
}

template <Type type, Rounding rounding>
HMA_INLINE void pack_row(const void* x, int64_t at, const RowBytes& to) {
    for (int half = 0; half < 2; half++) {
        if constexpr (rounding == Rounding::device)
            quantize_device(load_bf16(x, type, at + half * GROUP), to.exponent[half], to.data[half]);
        else
            quantize_host(load_f32(x, type, at + half * GROUP), to.exponent[half], to.data[half]);
    }
}

// float32 bits of 8 values.
HMA_INLINE __m256i dequantize(int exponent, const uint8_t* data) {
    const __m256i bytes =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(data)));
    const __m256i q = _mm256_and_si256(bytes, _mm256_set1_epi32(0x7f));
    const __m256i sign = _mm256_slli_epi32(_mm256_srli_epi32(bytes, 7), 31);
    const __m256i zero = _mm256_setzero_si256();
    __m256i value = _mm256_add_epi32(_mm256_castps_si256(_mm256_cvtepi32_ps(q)),
                                     _mm256_set1_epi32((exponent - 133) * (1 << 23)));
    // A negative sum has E < lz and is +0; q = 0 keeps its sign.
    value = _mm256_andnot_si256(_mm256_cmpeq_epi32(q, zero), value);
    return _mm256_andnot_si256(_mm256_cmpgt_epi32(zero, value), _mm256_or_si256(value, sign));
}

template <Type type>
HMA_INLINE void unpack_row(const ConstRowBytes& row, void* out, int64_t at) {
    for (int half = 0; half < 2; half++) {
        const __m256i low = dequantize(row.exponent[half], row.data[half]);
        const __m256i high = dequantize(row.exponent[half], row.data[half] + 8);
        if (type == Type::f32) {
            auto* to = reinterpret_cast<__m256i*>(static_cast<float*>(out) + at + half * GROUP);
            _mm256_storeu_si256(to, low);
            _mm256_storeu_si256(to + 1, high);
        } else {
            auto* to = reinterpret_cast<__m256i*>(static_cast<uint16_t*>(out) + at + half * GROUP);
            const __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(low, 16),
                                                       _mm256_srli_epi32(high, 16));
            _mm256_storeu_si256(to, _mm256_permute4x64_epi64(packed, 0xd8));
        }
    }
}

#else

HMA_INLINE uint32_t f32_bits(const void* x, Type type, int64_t at) {
    const float value = element(x, type, at);
    return load<uint32_t>(&value);
}

HMA_INLINE uint8_t quantize_device(uint16_t bits, int most) {
    const int magnitude = (bits & 0x7fff) < 0x7f80 ? bits & 0x7fff : 0x7f80;  // NaN as infinity
    const int exponent = magnitude >> 7, shift = most - exponent < 8 ? most - exponent : 8;
    const int q = exponent ? ((magnitude & 0x7f) + 0x80 + (1 << shift)) >> (shift + 1) : 0;
    return q ? (q < 127 ? q : 127) | (bits >> 8 & 0x80) : 0;
}

HMA_INLINE uint8_t quantize_host(uint32_t bits, int most) {
    const int exponent = bits >> 23 & 0xff, shift = most - exponent < 31 ? most - exponent : 31;
    const uint32_t m = ((bits & 0x7fffff) | 0x800000) >> shift;
    const int q = exponent ? (m + 0xffff + (m >> 17 & 1)) >> 17 : 0;
    return q ? (q < 127 ? q : 127) | (bits >> 24 & 0x80) : 0;
}

template <Type type, Rounding rounding>
HMA_INLINE void pack_row(const void* x, int64_t at, const RowBytes& to) {
    for (int half = 0; half < 2; half++) {
        uint32_t bits[GROUP], most = 0;
        for (int i = 0; i < GROUP; i++) {
            bits[i] = f32_bits(x, type, at + half * GROUP + i);
            const uint32_t magnitude = bits[i] & 0x7fffffff;
            most = magnitude > most ? magnitude : most;
        }
        most >>= 23;
        *to.exponent[half] = most;
        for (int i = 0; i < GROUP; i++)
            to.data[half][i] = rounding == Rounding::device ? quantize_device(bits[i] >> 16, most)
                                                            : quantize_host(bits[i], most);
    }
}

template <Type type>
HMA_INLINE void unpack_row(const ConstRowBytes& row, void* out, int64_t at) {
    for (int half = 0; half < 2; half++) {
        for (int i = 0; i < GROUP; i++) {
            const uint8_t byte = row.data[half][i];
            const float q = byte & 0x7f;
            const int32_t sum = load<int32_t>(&q) + (row.exponent[half] - 133) * (1 << 23);
            const uint32_t sign = uint32_t(byte >> 7) << 31;
            const uint32_t bits = q == 0 ? sign : sum < 0 ? 0 : sum | sign;
            if (type == Type::f32)
                static_cast<float*>(out)[at + half * GROUP + i] = load<float>(&bits);
            else
                static_cast<uint16_t*>(out)[at + half * GROUP + i] = bits >> 16;
        }
    }
}

#endif

}  // namespace
}  // namespace hma
