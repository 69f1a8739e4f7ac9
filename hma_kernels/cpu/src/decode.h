// Decode attention of one work item: query heads of one KV head over pages of one format.
//
// Scores:  s[t] = sum over groups of 2^(E-127) * (q . byte), a group's scale applied to its dot
//          product, so that dequantization costs one multiply-add for 16 values and head.
// Values:  out += (p[t] * 2^(E-127)) * byte, the scale applied to the weight.
// While a page is read, the same bytes of the next one are prefetched.
// The lanes of a vector are rows (tokens) of a face; they are added up once, at the item's end.
//
// Instructions on the vector ports (AVX-512, 4 heads): 33 for 64 bytes of K, 35 for 64 of V, and
// about 3 of softmax and sums across lanes: 0.56 a byte. VNNI would not save any: two digits of q,
// a combination, a conversion and a scaling make 5 a head and load, as in float; docs/benchmarks.md.
#pragma once

#include "rows.h"

namespace hma {
namespace {

// Query heads that share one pass over a page's registers.
constexpr int HEADS = HMA_VECTOR_BYTES == 64 ? 4 : 2;
constexpr float NOTHING = -1e30f;  // below every logit, and finite: exp2(-inf - NOTHING) is 0
constexpr float NEGLIGIBLE = -64;  // log2; such a weight is nothing beside the largest, 1
constexpr int W = WIDTH<float>;

int64_t groups(int dim) { return dim / GROUP; }

// Per head: query in lanes, softmax state, accumulators; then one page's logits.
struct Scratch {
    F* query;  // BFP8 [groups][head][4], BF16 [head][dim/W]
    F* out;    // BFP8 [groups][head][4], BF16 [head][v_dim/W]
    float* max;
    float* sum;
    float* logits;  // [head][PAGE]

    static int64_t lanes(const Heads& h, int dim) { return groups(dim) * h.group * 4 * sizeof(F); }
    static int64_t floats(int64_t count) { return (count * sizeof(float) + 63) / 64 * 64; }

    static int64_t bytes(const Heads& h) {
        return lanes(h, h.dim) + lanes(h, h.v_dim) + 2 * floats(h.group) + floats(h.group * PAGE);
    }

    Scratch(void* memory, const Heads& h) {
        char* at = static_cast<char*>(memory);
        query = reinterpret_cast<F*>(at);
        out = reinterpret_cast<F*>(at += lanes(h, h.dim));
        max = reinterpret_cast<float*>(at += lanes(h, h.v_dim));
        sum = reinterpret_cast<float*>(at += floats(h.group));
        logits = reinterpret_cast<float*>(at += floats(h.group));
    }
};

// Heads are taken HEADS at a time: calls block(first, width) with width a constant.
template <class Block>
HMA_INLINE void for_head_blocks(int heads, Block block) {
    int first = 0;
    for (; first + HEADS <= heads; first += HEADS)
        block(first, std::integral_constant<int, HEADS>{});
    switch (heads - first) {
        case 3: block(first, std::integral_constant<int, 3>{}); break;
        case 2: block(first, std::integral_constant<int, 2>{}); break;
        case 1: block(first, std::integral_constant<int, 1>{}); break;
    }
}

template <int N>
HMA_INLINE void bfp8_scores(const uint8_t* k, const uint8_t* next, int tiles, const F* query,
                            int heads, int first, float* logits) {
    constexpr int BLOCKS = PAGE / ROWS, AT_ONCE = 2;  // blocks that share a load of the query
    alignas(64) F sums[N][BLOCKS];
    for (int block = 0; block < BLOCKS; block += AT_ONCE) {
        const int face_row = block * ROWS / 16, row = block * ROWS % 16;
        F sum[AT_ONCE][N] = {};
        const F* q = query + first * 4;
        for (int group = 0; group < 2 * tiles; group++, q += heads * 4) {
            const int face = 2 * face_row + group % 2;
            const uint8_t* tile = k + group / 2 * TILE_BYTES;
            const uint8_t* data = tile + EXPONENT_BYTES + face * FACE_BYTES + row * GROUP;
            const uint8_t* exponents = tile + face * 16 + row;
            Quads key[AT_ONCE];
            F scale[AT_ONCE];
            for (int b = 0; b < AT_ONCE; b++) {
                key[b] = magnitudes(data + b * ROWS * GROUP);
                __builtin_prefetch(next + (data - k) + b * ROWS * GROUP);
                scale[b] = row_scales(exponents + b * ROWS);
            }
            for (int h = 0; h < N; h++) {
                F dot[AT_ONCE];
                for (int j = 0; j < 4; j++) {
                    const F part = in_register(q[h * 4 + j]);
                    for (int b = 0; b < AT_ONCE; b++)
                        dot[b] = j ? key[b].at[j] * part + dot[b] : key[b].at[j] * part;
                }
                for (int b = 0; b < AT_ONCE; b++) sum[b][h] = dot[b] * scale[b] + sum[b][h];
            }
        }
        for (int h = 0; h < N; h++)
            for (int b = 0; b < AT_ONCE; b++) sums[h][block + b] = sum[b][h];
    }
    for (int h = 0; h < N; h++)
        for (int block = 0; block < BLOCKS; block += 4)
            store(logits + (first + h) * PAGE + block * ROWS, lane_sums(sums[h] + block));
}

template <int N>
HMA_INLINE void bfp8_values(const uint8_t* v, const uint8_t* next, int tiles, const float* weights,
                            int heads, int first, F* out) {
    for (int group = 0; group < 2 * tiles; group++) {
        const uint8_t* tile = v + group / 2 * TILE_BYTES;
        F sum[N][4];
        for (int h = 0; h < N; h++)
            for (int j = 0; j < 4; j++) sum[h][j] = out[(group * heads + first + h) * 4 + j];
        for (int face_row = 0; face_row < 2; face_row++) {
            const int face = 2 * face_row + group % 2;
            alignas(64) float scaled[N][16];
            for (int i = 0; i < 16; i += W) {
                const F scale = scales(tile + face * 16 + i);
                for (int h = 0; h < N; h++) {
                    const F p = load<F>(weights + (first + h) * PAGE + face_row * 16 + i);
                    // A row that is hidden has weight 0 and may have an infinite scale.
                    store(scaled[h] + i, p == 0.f ? F{} : p * scale);
                }
            }
            // Read back by broadcasting loads: cheaper than shuffles of the register.
            asm("" : "+m"(scaled));
            const uint8_t* data = tile + EXPONENT_BYTES + face * FACE_BYTES;
            for (int row = 0; row < 16; row += ROWS) {
                const Quads value = magnitudes(data + row * GROUP);
                __builtin_prefetch(next + (data - v) + row * GROUP);
                for (int h = 0; h < N; h++) {
                    const F weight = replicate(scaled[h] + row);
                    for (int j = 0; j < 4; j++) sum[h][j] = value.at[j] * weight + sum[h][j];
                }
            }
        }
        for (int h = 0; h < N; h++)
            for (int j = 0; j < 4; j++) out[(group * heads + first + h) * 4 + j] = sum[h][j];
    }
}

HMA_INLINE F from_bf16(const uint16_t* bf16) {
#if defined(__AVX512BW__)
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

template <int N>
HMA_INLINE void bf16_scores(const uint16_t* k, int dim, const F* query, int first, int begin,
                            int end, float* logits) {
    for (int token = begin; token < end; token += 4) {
        for (int h = 0; h < N; h++) {
            const F* q = query + (first + h) * (dim / W);
            F sum[4] = {};
            for (int t = 0; t < 4; t++) {
                const uint16_t* row = k + (token + t < end ? token + t : end - 1) * dim;
                for (int i = 0; i < dim / W; i++) sum[t] = from_bf16(row + i * W) * q[i] + sum[t];
            }
            const F lanes = lane_sums(sum);
            for (int t = 0; t < 4 && token + t < end; t++) {
                float logit = 0;
                for (int r = 0; r < ROWS; r++) logit += lanes[t * ROWS + r];
                logits[(first + h) * PAGE + token + t] = logit;
            }
        }
    }
}

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

template <class Join>
HMA_INLINE float across(F v, Join join) {
    alignas(64) float lanes[W];
    store(lanes, v);
    using Four = Vec<float, 4>;
    Four four = load<Four>(lanes);
    for (int i = 4; i < W; i += 4) four = join(four, load<Four>(lanes + i));
    four = join(four, (Four)__builtin_shuffle(four, Vec<int32_t, 4>{2, 3, 0, 1}));
    return join(four, (Four)__builtin_shuffle(four, Vec<int32_t, 4>{1, 0, 3, 2}))[0];
}

HMA_INLINE float largest(F v) {
    return across(v, [](auto a, auto b) { return vmax(a, b); });
}

HMA_INLINE float total(F v) {
    return across(v, [](auto a, auto b) { return a + b; });
}

// Turns one page's logits into weights times `unit`; rescales the head's state if they set a new
// maximum. Returns by how much `out` must be multiplied.
HMA_INLINE float weigh(float* logits, int begin, int end, const Softmax& softmax, float unit,
                       float& max, float& sum) {
    F s[PAGE / W];
    F most = splat<float>(NOTHING);
    for (int i = 0; i < PAGE / W; i++) s[i] = to_log2<float>(load<F>(logits + i * W), softmax);
    if (begin > 0 || end < PAGE) {
        for (int i = 0; i < PAGE; i++)
            if (i < begin || i >= end) s[i / W][i % W] = -__builtin_inff();
    }
    for (int i = 0; i < PAGE / W; i++) most = vmax(s[i], most);
    const float page_max = largest(most);
    float decay = 1;
    if (page_max > max) {
        decay = exp2<float>(splat<float>(max - page_max))[0];
        max = page_max;
        sum *= decay;
    }
    F added = {};
    for (int i = 0; i < PAGE / W; i++) {
        const F x = s[i] - max;
        const F p = x < NEGLIGIBLE ? F{} : exp2<float>(x);
        added += p;
        store(logits + i * W, p * unit);
    }
    sum += total(added);
    return decay;
}

void load_query(const DecodeArgs& args, const DecodeItem& item, F* query) {
    const Heads& h = args.heads;
    const float factor =
        softmax_factor(args.softmax) * (item.format == BFP8 ? MAGNITUDE_SCALE : 1.f);
    float* to = reinterpret_cast<float*>(query);
    for (int head = 0; head < h.group; head++) {
        const int64_t start = item.request * args.q.row_stride +
                              (int64_t(item.kv_head) * h.group + head) * args.q.head_stride;
        for (int group = 0; group < groups(h.dim); group++) {
            alignas(64) float x[GROUP];
            for (int i = 0; i < GROUP; i++)
                x[i] = element(args.q.data, args.q.type, start + group * GROUP + i) * factor;
            if (item.format == BF16) {
                std::memcpy(to + head * h.dim + group * GROUP, x, sizeof x);
                continue;
            }
            float* lanes = to + (int64_t(group) * h.group + head) * 4 * W;
            for (int j = 0; j < 4; j++)
                for (int r = 0; r < ROWS; r++)
                    std::memcpy(lanes + j * W + r * 4, x + j * 4, 4 * sizeof(float));
        }
    }
}

void store_out(const Heads& h, Format format, const F* out, float* to) {
    using Lane = Vec<float, 4>;
    const float* from = reinterpret_cast<const float*>(out);
    if (format == BF16) {
        std::memcpy(to, from, sizeof(float) * h.group * h.v_dim);
        return;
    }
    for (int head = 0; head < h.group; head++) {
        for (int d = 0; d < h.v_dim; d += 4) {
            const float* lanes =
                from + ((int64_t(d / GROUP) * h.group + head) * 4 + d % GROUP / 4) * W;
            Lane sum = load<Lane>(lanes);
            for (int r = 1; r < ROWS; r++) sum += load<Lane>(lanes + r * 4);
            store(to + head * h.v_dim + d, sum * SUM_SCALE);
        }
    }
}

void decode(const DecodeArgs& args, const DecodeItem& item, void* memory, Partial partial) {
    const Heads& h = args.heads;
    Scratch scratch(memory, h);
    load_query(args, item, scratch.query);
    const bool bfp8 = item.format == BFP8;
    const int64_t out_regs = bfp8 ? groups(h.v_dim) * 4 : h.v_dim / W;  // a head
    std::memset(static_cast<void*>(scratch.out), 0, out_regs * h.group * sizeof(F));
    for (int head = 0; head < h.group; head++) {
        scratch.max[head] = NOTHING;
        scratch.sum[head] = 0;
    }
    const int64_t k_bytes = bfp8 ? h.dim / TILE * TILE_BYTES : PAGE * h.dim * 2;
    const int64_t v_bytes = bfp8 ? h.v_dim / TILE * TILE_BYTES : PAGE * h.v_dim * 2;
    const auto k_at = [&](int page) {
        return args.pages.k[item.format] + args.list[item.format][page].id *
                   args.pages.k_stride[item.format] + item.kv_head * k_bytes;
    };
    const auto v_at = [&](int page) {
        return args.pages.v[item.format] + args.list[item.format][page].id *
                   args.pages.v_stride[item.format] + item.kv_head * v_bytes;
    };
    const auto rescale = [&](int head, float decay) {
        for (int64_t i = 0; i < (bfp8 ? groups(h.v_dim) : 1); i++) {
            F* out = scratch.out + (bfp8 ? (i * h.group + head) * 4 : head * out_regs);
            for (int64_t j = 0; j < (bfp8 ? 4 : out_regs); j++) out[j] *= decay;
        }
    };
    for (int page = item.first; page < item.last; page++) {
        const uint8_t *k = k_at(page), *v = v_at(page);
        const int begin = args.list[item.format][page].first;
        const int end = args.list[item.format][page].last;
        const int next = page + 1 < item.last ? page + 1 : page;
        for_head_blocks(h.group, [&](int first, auto n) {
            if (bfp8)
                bfp8_scores<n>(k, k_at(next), h.dim / TILE, scratch.query, h.group, first, scratch.logits);
            else
                bf16_scores<n>(reinterpret_cast<const uint16_t*>(k), h.dim, scratch.query, first,
                               begin, end, scratch.logits);
        });
        for (int head = 0; head < h.group; head++) {
            const float decay =
                weigh(scratch.logits + head * PAGE, begin, end, args.softmax,
                      bfp8 ? WEIGHT_SCALE : 1.f, scratch.max[head], scratch.sum[head]);
            if (decay != 1.f) rescale(head, decay);
        }
        for_head_blocks(h.group, [&](int first, auto n) {
            if (bfp8)
                bfp8_values<n>(v, v_at(next), h.v_dim / TILE, scratch.logits, h.group, first, scratch.out);
            else
                bf16_values<n>(reinterpret_cast<const uint16_t*>(v), h.v_dim, scratch.logits,
                               first, begin, end, scratch.out);
        });
    }
    std::memcpy(partial.max, scratch.max, h.group * sizeof(float));
    std::memcpy(partial.sum, scratch.sum, h.group * sizeof(float));
    store_out(h, item.format, scratch.out, partial.out);
}

}  // namespace
}  // namespace hma
