// The accumulators of XXH3 over many equally long blocks; hma_kernels/xxh3.py has the algorithm.
#pragma once

#include "vec.h"

namespace hma {
namespace {

using Lanes = Vec<uint64_t, 8>;

HMA_INLINE Lanes low_times_high(Lanes x) {
#if defined(HMA_AVX512)
    const __m512i v = reinterpret_cast<__m512i>(x);
    return reinterpret_cast<Lanes>(_mm512_mul_epu32(v, _mm512_srli_epi64(v, 32)));
#elif defined(__AVX2__)
    const auto half = [](Vec<uint64_t, 4> h) {
        const __m256i v = reinterpret_cast<__m256i>(h);
        return reinterpret_cast<Vec<uint64_t, 4>>(_mm256_mul_epu32(v, _mm256_srli_epi64(v, 32)));
    };
    return __builtin_shufflevector(half(__builtin_shufflevector(x, x, 0, 1, 2, 3)),
                                   half(__builtin_shufflevector(x, x, 4, 5, 6, 7)),
                                   0, 1, 2, 3, 4, 5, 6, 7);
#else
    return (x & 0xffffffff) * (x >> 32);
#endif
}

HMA_INLINE Lanes stripe(Lanes acc, const uint8_t* data, const uint64_t* key) {
    const Lanes input = load<Lanes>(data);
    const Lanes swapped = __builtin_shufflevector(input, input, 1, 0, 3, 2, 5, 4, 7, 6);
    return acc + swapped + low_times_high(input ^ load<Lanes>(key));
}

void hash(const HashArgs& args, int64_t first, int64_t last) {
    constexpr int64_t stripe_bytes = 64, stripes = 16, chunk_bytes = stripes * stripe_bytes;
    constexpr uint64_t prime = 0x9E3779B1;
    const auto key = [&](int64_t row) { return args.keys + 8 * row; };
    const int64_t chunks = (args.length - 1) / chunk_bytes;
    const int64_t rest = (args.length - 1 - chunks * chunk_bytes) / stripe_bytes;
    for (int64_t i = first; i < last; i++) {
        const uint8_t* data = reinterpret_cast<const uint8_t*>(args.addresses[i]);
        const uint8_t* end = data + args.length;
        Lanes acc = load<Lanes>(args.start);
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            for (int64_t s = 0; s < stripes; s++, data += stripe_bytes)
                acc = stripe(acc, data, key(s));
            acc = (acc ^ (acc >> 47) ^ load<Lanes>(key(stripes))) * prime;
        }
        for (int64_t s = 0; s < rest; s++, data += stripe_bytes) acc = stripe(acc, data, key(s));
        acc = stripe(acc, end - stripe_bytes, key(stripes + 1));
        store(args.out + 8 * i, acc);
    }
}

}  // namespace
}  // namespace hma
