// Scores and weighted values of one BFP8 page, for N query heads of one KV head.
//
// Scores:  s[t] = sum over groups of 2^(E-127) * (q . bytes), a group's scale applied to its dot
//          product: one multiply-add a head for a vector of rows.
// Values:  out += (p[t] * 2^(E-127)) * byte, the scale applied to the weight.
// While a page is read, the same bytes of a later one are prefetched.
#pragma once

#include "rows.h"

namespace hma {
namespace {

// Where row `row` of a page begins in group `group` of a head's dims.
HMA_INLINE const uint8_t* bytes_of(const uint8_t* page, int group, int row) {
    return page + group / 2 * TILE_BYTES + EXPONENT_BYTES +
           (row / 16 * 2 + group % 2) * FACE_BYTES + row % 16 * GROUP;
}
HMA_INLINE const uint8_t* exponents_of(const uint8_t* page, int group, int row) {
    return page + group / 2 * TILE_BYTES + (row / 16 * 2 + group % 2) * 16 + row % 16;
}

// query [group][head][GROUP], logits [head][PAGE]
template <int N>
HMA_INLINE void bfp8_scores(const uint8_t* k, const uint8_t* later, int tiles, const float* query,
                            int heads, int first, float* logits) {
    constexpr int AT_ONCE = 2;  // vectors of rows that share a load of the query
    for (int row = 0; row < PAGE; row += AT_ONCE * W) {
        F sum[N][AT_ONCE] = {};
        const float* q = query + first * GROUP;
        for (int group = 0; group < 2 * tiles; group++, q += heads * GROUP) {
            Keys keys[AT_ONCE];
            F scale[AT_ONCE];
            for (int b = 0; b < AT_ONCE; b++) {
                const uint8_t* data = bytes_of(k, group, row + b * W);
                keys[b] = load_keys(data);
                scale[b] = key_scales(exponents_of(k, group, row + b * W));
                if (row == 0) __builtin_prefetch(exponents_of(later, group, 0));
                for (int line = 0; line < W * GROUP; line += 64)
                    __builtin_prefetch(later + (data - k) + line);
            }
            F dot[N][AT_ONCE];
            times<4>([&](auto j) {
                times<4>([&](auto i) {
                    F value[AT_ONCE];
                    for (int b = 0; b < AT_ONCE; b++) value[b] = key<i>(keys[b].at[j]);
                    for (int h = 0; h < N; h++) {
                        const F part = in_register(splat<float>(q[h * GROUP + 4 * j + i]));
                        for (int b = 0; b < AT_ONCE; b++)
                            dot[h][b] = j + i ? value[b] * part + dot[h][b] : value[b] * part;
                    }
                });
            });
            for (int h = 0; h < N; h++)
                for (int b = 0; b < AT_ONCE; b++) sum[h][b] = dot[h][b] * scale[b] + sum[h][b];
        }
        for (int h = 0; h < N; h++)
            for (int b = 0; b < AT_ONCE; b++)
                store(logits + (first + h) * PAGE + row + b * W, in_row_order(sum[h][b]));
    }
}

// 16 columns of a page as bfp8_values reads them back, by broadcasting loads: cheaper than shuffles
// of registers.
template <int N>
struct Column {
    alignas(64) float weights[N * PAGE];  // times the rows' scales
    alignas(64) uint8_t bytes[Values::PREPARED ? PAGE * GROUP : 1];

    // A quarter of the work for rows first..first+W-1, whose bytes lie at `data`.
    HMA_INLINE void prepare(const uint8_t* data, int first, int quarter, F scale,
                            const float* from) {
        const int at = quarter * HMA_VECTOR_BYTES;
        if constexpr (Values::PREPARED)
            store_vector(bytes + first * GROUP + at, twos_complement(load_bytes(data + at)));
        static_assert(N <= 4);
        if (quarter < N)
            store(weights + quarter * PAGE + first, load<F>(from + quarter * PAGE + first) * scale);
    }
};

// 0 for a row that is hidden: its weight is 0, and its own scale may be infinite.
HMA_INLINE F visible_scales(const uint8_t* page, int group, int first, const int32_t* visible) {
    const F scale = scales(exponents_of(page, group, first));
    return (F)((Reg<int32_t>)scale & load<Reg<int32_t>>(visible + first));
}

// weights [head][PAGE], visible [PAGE]: all bits or none, out [head][2 * tiles * GROUP]. While a
// column is read, the next one is prepared.
template <int N>
HMA_INLINE void bfp8_values(const uint8_t* v, const uint8_t* later, int tiles,
                            const float* weights, const int32_t* visible, int first, F* out) {
    constexpr int VECTORS = GROUP / W;            // of a row
    constexpr int CHAINS = VECTORS == 1 ? 2 : 1;  // sums that hide the latency of multiply-adds
    const int groups = 2 * tiles, stride = groups * VECTORS;
    weights += first * PAGE;
    out += first * stride;
    Column<N> columns[2];
    for (int row = 0; row < PAGE; row += W) {
        const F scale = visible_scales(v, 0, row, visible);
        for (int quarter = 0; quarter < 4; quarter++)
            columns[0].prepare(bytes_of(v, 0, row), row, quarter, scale, weights);
    }
    for (int group = 0; group < groups; group++, out += VECTORS) {
        if (group % 2 == 0) {  // a tile is 17 lines of 64 bytes, the rows of a group are 8
            __builtin_prefetch(later);
            later += 64;
        }
        F sum[CHAINS][N][VECTORS] = {};
        for (int h = 0; h < N; h++)
            for (int i = 0; i < VECTORS; i++) sum[0][h][i] = out[h * stride + i];
        const float* weight = columns[group % 2].weights;
        const uint8_t* bytes = columns[group % 2].bytes;
        asm("" : "+r"(weight), "+r"(bytes) : "m"(columns));  // are read through these two
        const int next = group + 1 < groups ? group + 1 : group;
        for (int row = 0; row < PAGE; row += W, weight += W) {
            if (!Values::PREPARED) bytes = bytes_of(v, group, row);
            const F scale = visible_scales(v, next, row, visible);
#pragma GCC unroll 4
            for (int quarter = 0; quarter < 4; quarter++, bytes += HMA_VECTOR_BYTES) {
                const Values values(bytes);
                for (int r = 0; r < W / 4; r++) {
                    F value[VECTORS];
                    values.row(r, value);
                    for (int h = 0; h < N; h++)
                        for (int i = 0; i < VECTORS; i++)
                            add_product(sum[r % CHAINS][h][i], value[i],
                                        weight + h * PAGE + quarter * W / 4 + r);
                }
                columns[~group & 1].prepare(bytes_of(v, next, row), row, quarter, scale, weights);
            }
            for (int line = 0; line < W * GROUP; line += 64, later += 64)
                __builtin_prefetch(later);
        }
        for (int h = 0; h < N; h++)
            for (int i = 0; i < VECTORS; i++)
                out[h * stride + i] =
                    CHAINS == 2 ? sum[0][h][i] + sum[CHAINS - 1][h][i] : sum[0][h][i];
    }
}

}  // namespace
}  // namespace hma
