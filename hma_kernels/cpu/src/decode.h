// Decode attention of one work item: the query heads of one KV head over pages of one format.
//
// Scores of a page come before the values of the page before it, and its softmax after these, so
// that no step needs what the step right before it has just computed.
#pragma once

#include <cmath>

#include "decode_bf16.h"
#include "decode_bfp8.h"
#include "decode_pairs.h"

namespace hma {
namespace {

// Query heads that share one pass over a page.
constexpr int HEADS = 4;
constexpr float NOTHING = -1e30f;  // below every logit, and finite: exp2(-inf - NOTHING) is 0
constexpr float NEGLIGIBLE = -64;  // log2; smaller weights count as 0
constexpr float SLACK = 4;         // log2; how far logits may pass the maximum before it is raised

// Per row's head: query, softmax state, accumulators; logits of two pages; which rows exist.
struct Scratch {
    float* query;  // BF16 [head][dim]; BFP8 [group][head][GROUP], bfloat16 for VDPBF16PS
    F* out;        // [head][v_dim/W]
    F* sum;        // [head], in lanes
    float* max;
    float* logits[2];  // [head][PAGE]
    int32_t* visible;  // [PAGE]: all bits or none

    static int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }
    static int64_t floats(int64_t count) { return padded(count * sizeof(float)); }

    static int64_t bytes(const Heads& h, int rows) {
        const int64_t heads = int64_t(rows) * h.gqa_group_size;
        return floats(heads * h.dim) + floats(heads * h.v_dim) + padded(heads * sizeof(F)) +
               floats(heads) + 2 * floats(heads * PAGE) + floats(PAGE);
    }

    Scratch(void* memory, const Heads& h, int rows) {
        char* at = static_cast<char*>(memory);
        const int64_t heads = int64_t(rows) * h.gqa_group_size;
        const auto take = [&]<class T>(T*& to, int64_t size) {
            to = reinterpret_cast<T*>(at);
            at += size;
        };
        take(query, floats(heads * h.dim));
        take(out, floats(heads * h.v_dim));
        take(sum, padded(heads * sizeof(F)));
        take(max, floats(heads));
        for (auto& page : logits) take(page, floats(heads * PAGE));
        take(visible, floats(PAGE));
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

// Turns one page's logits, of which first..last-1 are visible, into weights times 2^LOG2 and adds
// these to `sum`. A maximum that logits pass by more than SLACK is raised; the head's `out` must be
// multiplied by what is returned.
template <int LOG2>
HMA_INLINE float weigh(float* logits, int first, int last, const Softmax& softmax, float& max,
                       F& sum) {
    F s[PAGE / W];
    F most = splat<float>(NOTHING);
    for (int i = 0; i < PAGE / W; i++) s[i] = to_log2<float>(load<F>(logits + i * W), softmax);
    if (first > 0 || last < PAGE) {
        for (int i = 0; i < PAGE; i++)
            if (i < first || i >= last) s[i / W][i % W] = -__builtin_inff();
    }
    for (int i = 0; i < PAGE / W; i++) most = vmax(s[i], most);
    float decay = 1;
    if (any_above(most, max + SLACK)) {
        const float raised = largest(most);
        decay = exp2<float>(splat<float>(max - raised))[0];
        max = raised;
        sum *= decay;
    }
    for (int i = 0; i < PAGE / W; i++) {
        const F x = s[i] - max;
        const F p = (F)((Reg<int32_t>)exp2_in_range<float, LOG2>(x) & ~(x < NEGLIGIBLE));
        sum += p;
        store(logits + i * W, p);
    }
    return decay;
}

// Floats are multiplied by softmax_factor, for which bfloat16 has no room.
template <Format format, class T>
void load_query(const DecodeArgs& args, const DecodeItem& item, T* query) {
    const Heads& h = args.heads;
    const DecodeRows& rows = args.rows[item.request];
    const int heads = rows.rows * h.gqa_group_size;
    const float factor = softmax_factor(args.softmax) * (format == BFP8 ? KEY_SCALE : 1.f);
    for (int head = 0; head < heads; head++) {
        const int64_t start =
            int64_t(rows.first + head / h.gqa_group_size) * args.q.row_stride +
            (int64_t(item.kv_head) * h.gqa_group_size + head % h.gqa_group_size) *
                args.q.head_stride;
        for (int group = 0; group < h.dim / GROUP; group++) {
            T values[GROUP];
            const int64_t from = start + group * GROUP;
            if constexpr (std::is_same_v<T, uint16_t>)
                std::memcpy(values, static_cast<const T*>(args.q.data) + from, sizeof values);
            else
                for (int i = 0; i < GROUP; i++)
                    values[i] = element(args.q.data, args.q.type, from + i) * factor;
            const int64_t to = format == BFP8 ? int64_t(group) * heads + head
                                              : int64_t(head) * (h.dim / GROUP) + group;
            std::memcpy(query + to * GROUP, values, sizeof values);
        }
    }
}

// The pages of one item. PAIRS: scores by decode_pairs.h.
template <Format format, bool PAIRS = false>
struct Decode {
    using Element = std::conditional_t<PAIRS, uint16_t, float>;
    static constexpr int LOG2 = format == BFP8 ? WEIGHT_LOG2 : 0;

    const DecodeArgs& args;
    const DecodeItem& item;
    const Scratch& scratch;
    const Heads& heads = args.heads;
    const DecodeRows& rows = args.rows[item.request];
    const int query_heads = rows.rows * heads.gqa_group_size;
    const VisiblePage* list = args.list[format];
    const int64_t out_vectors = heads.v_dim / W;  // a head
    bool all_visible = false;

    HMA_INLINE const uint8_t* at(const uint8_t* base, int64_t stride, int page, int dim) const {
        const int64_t bytes = format == BFP8 ? dim / TILE * TILE_BYTES : PAGE * dim * 2;
        return base + list[page].id * stride + item.kv_head * bytes;
    }
    HMA_INLINE const uint8_t* k(int page) const {
        return at(args.pages.k[format], args.pages.k_stride[format], page, heads.dim);
    }
    HMA_INLINE const uint8_t* v(int page) const {
        return at(args.pages.v[format], args.pages.v_stride[format], page, heads.v_dim);
    }
    // What to prefetch.
    HMA_INLINE int later(int page) const { return page + 1 < item.last ? page + 1 : item.last - 1; }
    HMA_INLINE float* logits(int page) const { return scratch.logits[page % 2]; }

    HMA_INLINE Element* query() const { return reinterpret_cast<Element*>(scratch.query); }

    HMA_INLINE void scores(int page) const {
        for_head_blocks(query_heads, [&](int first, auto n) {
            if constexpr (PAIRS)
                pair_scores<n>(k(page), k(later(page)), heads.dim / TILE, query(),
                               query_heads, first,
                               float(softmax_factor(args.softmax)) * SUM_SCALE, logits(page));
            else if constexpr (format == BFP8)
                bfp8_scores<n>(k(page), k(later(page)), heads.dim / TILE, query(),
                               query_heads, first, logits(page));
            else
                bf16_scores<n>(reinterpret_cast<const uint16_t*>(k(page)), heads.dim,
                               query(), first, list[page].first, list[page].last,
                               logits(page));
        });
    }

    HMA_INLINE void weights(int page) const {
        const VisiblePage& own = list[page];
        for (int head = 0; head < query_heads; head++) {
            int first = own.first, last = own.last;
            if (rows.rows > 1) {
                // In the page, what the head's row sees.
                const int64_t at = rows.end - rows.rows + head / heads.gqa_group_size - own.position;
                if (at + 1 < last) last = at < 0 ? 0 : int(at + 1);
                if (args.window >= 0 && at - args.window > first)
                    first = at - args.window < PAGE ? int(at - args.window) : PAGE;
            }
            const float decay = weigh<LOG2>(logits(page) + head * PAGE, first, last, args.softmax,
                                            scratch.max[head], scratch.sum[head]);
            if (decay == 1.f) continue;
            for (int64_t i = 0; i < out_vectors; i++)
                scratch.out[head * out_vectors + i] *= decay;
        }
    }

    void mark_visible(const VisiblePage& page) {
        const bool all = page.first == 0 && page.last == PAGE;
        if (all && all_visible) return;
        for (int row = 0; row < PAGE; row++)
            scratch.visible[row] = row >= page.first && row < page.last ? -1 : 0;
        all_visible = all;
    }

    HMA_INLINE void values(int page) {
        if constexpr (format == BFP8) mark_visible(list[page]);
        for_head_blocks(query_heads, [&](int first, auto n) {
            if constexpr (format == BFP8)
                bfp8_values<n>(v(page), v(later(page)), heads.v_dim / TILE, logits(page),
                               scratch.visible, first, scratch.out);
            else
                bf16_values<n>(reinterpret_cast<const uint16_t*>(v(page)), heads.v_dim,
                               logits(page), first, list[page].first, list[page].last,
                               scratch.out);
        });
    }

    void run(Partial partial) {
        load_query<format>(args, item, query());
        for (int head = 0; head < query_heads; head++) {
            scratch.max[head] = NOTHING;
            scratch.sum[head] = F{};
            for (int64_t i = 0; i < out_vectors; i++) scratch.out[head * out_vectors + i] = F{};
        }
        scores(item.first);
        weights(item.first);
        for (int page = item.first; page < item.last; page++) {
            const bool more = page + 1 < item.last;
            if (more) scores(page + 1);
            values(page);
            if (more) weights(page + 1);
        }
        const float out_scale = format == BFP8 ? SUM_SCALE : 1;
        for (int head = 0; head < query_heads; head++) {
            partial.max[head] = scratch.max[head];
            partial.sum[head] = std::ldexp(total(scratch.sum[head]), -LOG2);
            for (int64_t i = 0; i < out_vectors; i++)
                store(partial.out + head * heads.v_dim + i * W,
                      scratch.out[head * out_vectors + i] * out_scale);
        }
    }
};

void decode(const DecodeArgs& args, const DecodeItem& item, void* memory, Partial partial) {
    const Scratch scratch(memory, args.heads, args.rows[item.request].rows);
    if (item.format == BF16) return Decode<BF16>{args, item, scratch}.run(partial);
#if defined(HMA_AVX512_BF16)
    if (args.q.type == Type::bf16)
        return Decode<BFP8, true>{args, item, scratch}.run(partial);
#endif
    Decode<BFP8>{args, item, scratch}.run(partial);
}

}  // namespace
}  // namespace hma
