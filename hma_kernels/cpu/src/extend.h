// Attention of new rows over a cached prefix and causally over themselves, in float or double.
//
// Lanes are queries (row * gqa_group_size + head); a tile of 32 keys is unpacked once into T and its
// elements are broadcast: scores[key][lane] += K[key][d] * Q[d][lane], and
// out[d][lane] += V[key][d] * weight[key][lane]. So the softmax needs no sum across lanes.
#pragma once

#include "codec.h"
#include "vec.h"

namespace hma {
namespace {

template <class T, int REGS>
struct Extend {
    using R = Reg<T>;
    static constexpr int LANES = REGS * WIDTH<T>;
    static constexpr int KEYS = 4;  // keys (or output dims) that share a load of the lanes

    const ExtendArgs& args;
    const ExtendRequest& request;
    const ExtendItem& item;
    const Heads& heads;
    T *query, *out, *tile, *weights, *max, *sum;
    int64_t position[LANES];
    int lanes;

    // query [dim][LANES], out [v_dim][LANES], tile [PAGE][dim or v_dim], weights [PAGE][LANES]
    static int64_t elements(const Heads& h) {
        const int64_t widest = h.dim > h.v_dim ? h.dim : h.v_dim;
        return (h.dim + h.v_dim + PAGE + 2) * LANES + PAGE * widest;
    }

    static int64_t scratch(const Heads& h) { return elements(h) * sizeof(T); }

    Extend(const ExtendArgs& a, const ExtendRequest& r, const ExtendItem& i, void* memory)
        : args(a), request(r), item(i), heads(a.heads) {
        query = static_cast<T*>(memory);
        out = query + heads.dim * LANES;
        weights = out + heads.v_dim * LANES;
        max = weights + PAGE * LANES;
        sum = max + LANES;
        tile = sum + LANES;
        lanes = int(item.last - item.first);
    }

    int64_t row(int lane) const { return (item.first + lane) / heads.gqa_group_size; }
    int64_t head(int lane) const {
        return int64_t(item.kv_head) * heads.gqa_group_size +
               (item.first + lane) % heads.gqa_group_size;
    }

    void start() {
        const T factor = softmax_factor(args.softmax);
        for (int i = 0; i < LANES; i++) {
            position[i] = request.first_position + row(i < lanes ? i : lanes - 1);
            max[i] = T(-1e30);
            sum[i] = 0;
            const int64_t at = i < lanes ? (request.first_row + row(i)) * args.q.row_stride +
                                               head(i) * args.q.head_stride
                                         : 0;
            for (int d = 0; d < heads.dim; d++)
                query[d * LANES + i] =
                    i < lanes ? T(element(args.q.data, args.q.type, at + d)) * factor : T(0);
        }
        for (int64_t i = 0; i < int64_t(heads.v_dim) * LANES; i++) out[i] = 0;
    }

    void load_bfp8(const uint8_t* tiles, int dim) {
        for (int key = 0; key < PAGE; key++) {
            for (int d = 0; d < dim; d += TILE) {
                const ConstRowBytes row = row_of(tiles + d / TILE * TILE_BYTES, key);
                if constexpr (std::is_same_v<T, float>) {
                    unpack_row<Type::f32>(row, tile, key * dim + d);
                } else {
                    alignas(64) float values[TILE];
                    unpack_row<Type::f32>(row, values, 0);
                    for (int i = 0; i < TILE; i++) tile[key * dim + d + i] = values[i];
                }
            }
        }
    }

    // Rows first..last-1 of x, 0 in the others.
    void load_rows(const void* x, Type type, int64_t start, int64_t stride, int first, int last,
                   int dim) {
        std::memset(tile, 0, first * dim * sizeof(T));
        std::memset(tile + last * dim, 0, (PAGE - last) * dim * sizeof(T));
        const auto copy = [&](auto constant) {
            for (int key = first; key < last; key++)
                for (int d = 0; d < dim; d++)
                    tile[key * dim + d] = element(x, constant, start + key * stride + d);
        };
        switch (type) {
            case Type::f32: return copy(std::integral_constant<Type, Type::f32>{});
            case Type::bf16: return copy(std::integral_constant<Type, Type::bf16>{});
            case Type::f16: return copy(std::integral_constant<Type, Type::f16>{});
        }
    }

    void load_page(Format format, const VisiblePage& page, const uint8_t* base, int64_t stride,
                   int dim) {
        const uint8_t* from = base + page.id * stride;
        if (format == BFP8) {
            load_bfp8(from + int64_t(item.kv_head) * (dim / TILE) * TILE_BYTES, dim);
            // What hidden rows hold may be infinite, and their weight is 0.
            std::memset(tile, 0, page.first * dim * sizeof(T));
            std::memset(tile + page.last * dim, 0, (PAGE - page.last) * dim * sizeof(T));
        } else {
            load_rows(from, Type::bf16, int64_t(item.kv_head) * PAGE * dim, dim, page.first,
                      page.last, dim);
        }
    }

    void load_new(const Query& x, int64_t first, int count, int dim) {
        load_rows(x.data, x.type,
                  (request.first_row + first) * x.row_stride + item.kv_head * x.head_stride,
                  x.row_stride, 0, count, dim);
    }

    // block[KEYS][REGS] += a[key][d] * b[d][lane] over d
    HMA_INLINE void scores() {
        const int dim = heads.dim;
        for (int key = 0; key < PAGE; key += KEYS) {
            R block[KEYS][REGS] = {};
            const T* k = tile + key * dim;
            for (int d = 0; d < dim; d++) {
                R q[REGS];
                for (int r = 0; r < REGS; r++) q[r] = load<R>(query + d * LANES + r * WIDTH<T>);
                for (int i = 0; i < KEYS; i++)
                    for (int r = 0; r < REGS; r++) block[i][r] = q[r] * k[i * dim + d] + block[i][r];
            }
            for (int i = 0; i < KEYS; i++)
                for (int r = 0; r < REGS; r++)
                    store(weights + (key + i) * LANES + r * WIDTH<T>, block[i][r]);
        }
    }

    HMA_INLINE void values() {
        const int dim = heads.v_dim;
        for (int d = 0; d < dim; d += KEYS) {
            R block[KEYS][REGS];
            for (int i = 0; i < KEYS; i++)
                for (int r = 0; r < REGS; r++)
                    block[i][r] = load<R>(out + (d + i) * LANES + r * WIDTH<T>);
            for (int key = 0; key < PAGE; key++) {
                R w[REGS];
                for (int r = 0; r < REGS; r++) w[r] = load<R>(weights + key * LANES + r * WIDTH<T>);
                for (int i = 0; i < KEYS; i++)
                    for (int r = 0; r < REGS; r++)
                        block[i][r] = w[r] * tile[key * dim + d + i] + block[i][r];
            }
            for (int i = 0; i < KEYS; i++)
                for (int r = 0; r < REGS; r++)
                    store(out + (d + i) * LANES + r * WIDTH<T>, block[i][r]);
        }
    }

    bool sees(int lane, int64_t key) const {
        return key <= position[lane] && (args.window < 0 || key >= position[lane] - args.window);
    }

    // Keys at positions start.., of which first..last-1 exist.
    void softmax(int64_t start, int first, int last) {
        for (int i = 0; i < PAGE * LANES; i += WIDTH<T>)
            store(weights + i, to_log2<T>(load<R>(weights + i), args.softmax));
        const bool all = first == 0 && last == PAGE && sees(0, start) && sees(0, start + PAGE - 1) &&
                         sees(lanes - 1, start) && sees(lanes - 1, start + PAGE - 1);
        if (!all) {
            for (int key = 0; key < PAGE; key++)
                for (int lane = 0; lane < LANES; lane++)
                    if (key < first || key >= last || !sees(lane, start + key))
                        weights[key * LANES + lane] = -__builtin_inf();
        }
        T decay[LANES];
        bool rescale = false;
        for (int r = 0; r < LANES; r += WIDTH<T>) {
            const R old = load<R>(max + r);
            R most = old;
            for (int key = 0; key < PAGE; key++)
                most = vmax(load<R>(weights + key * LANES + r), most);
            const R factor = exp2<T>(old - most);
            R added = {};
            for (int key = 0; key < PAGE; key++) {
                const R p = exp2<T>(load<R>(weights + key * LANES + r) - most);
                added += p;
                store(weights + key * LANES + r, p);
            }
            store(max + r, most);
            store(sum + r, load<R>(sum + r) * factor + added);
            store(decay + r, factor);
        }
        for (int i = 0; i < LANES; i++) rescale |= decay[i] != T(1);
        if (!rescale) return;
        for (int d = 0; d < heads.v_dim; d++)
            for (int r = 0; r < LANES; r += WIDTH<T>)
                store(out + d * LANES + r, load<R>(out + d * LANES + r) * load<R>(decay + r));
    }

    bool any_sees(int64_t start, int first, int last) const {
        if (start + first > position[lanes - 1]) return false;
        return args.window < 0 || start + last - 1 >= position[0] - args.window;
    }

    void finish() {
        const int64_t all_heads = int64_t(heads.kv_heads) * heads.gqa_group_size;
        for (int i = 0; i < lanes; i++) {
            const int64_t at = ((request.first_row + row(i)) * all_heads + head(i)) * heads.v_dim;
            T total = sum[i];
            if (const float* sinks = args.softmax.sinks)
                total += std::exp2(sinks[head(i)] * T(LOG2E) - max[i]);
            const T inverse = total == 0 ? T(0) : T(1) / total;
            for (int d = 0; d < heads.v_dim; d++)
                set_element(args.out, args.q.type, at + d, float(out[d * LANES + i] * inverse));
        }
    }

    void run() {
        start();
        const Pages& pages = args.pages;
        for (int f = 0; f < 2; f++) {
            const Format format = Format(f);
            for (int64_t i = 0; i < request.pages[format]; i++) {
                const VisiblePage& page = request.list[format][i];
                if (!any_sees(page.position, page.first, page.last)) continue;
                load_page(format, page, pages.k[format], pages.k_stride[format], heads.dim);
                scores();
                softmax(page.position, page.first, page.last);
                load_page(format, page, pages.v[format], pages.v_stride[format], heads.v_dim);
                values();
            }
        }
        for (int64_t first = 0; args.has_new_keys && first < request.rows; first += PAGE) {
            const int count = request.rows - first < PAGE ? int(request.rows - first) : PAGE;
            if (!any_sees(request.prefix + first, 0, count)) continue;
            load_new(args.k, first, count, heads.dim);
            scores();
            softmax(request.prefix + first, 0, count);
            load_new(args.v, first, count, heads.v_dim);
            values();
        }
        finish();
    }
};

template <class T, int REGS>
void extend(const ExtendArgs& args, const ExtendRequest& request, const ExtendItem& item,
            void* scratch) {
    Extend<T, REGS>(args, request, item, scratch).run();
}

}  // namespace
}  // namespace hma
