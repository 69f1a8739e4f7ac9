// BFP8 codec over strips (a row of tiles). The rules are those of reference.py, byte for byte.
#pragma once

#include "vec.h"

namespace hma {
namespace {

struct Group {
    uint8_t exponent;
    U8 bytes;
};

template <class V>
HMA_INLINE V group_max(V v) {
    using I = Vec<std::make_signed_t<std::remove_reference_t<decltype(v[0])>>, 16>;
    v = vmax(v, (V)__builtin_shuffle(v, I{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}));
    v = vmax(v, (V)__builtin_shuffle(v, I{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11}));
    v = vmax(v, (V)__builtin_shuffle(v, I{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13}));
    return vmax(v, (V)__builtin_shuffle(v, I{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14}));
}

// float32 bits, half to even.
HMA_INLINE Group encode_host(U32 bits) {
    const I32 magnitude = (I32)(bits & 0x7fffffffu);
    const I32 most = group_max(magnitude) >> 23;
    const I32 exponent = magnitude >> 23;
    const I32 shift = vmin(most - exponent, I32{} + 31);
    const I32 mantissa = ((magnitude & 0x7fffff) | 0x800000) >> shift;
    I32 q = (mantissa + 0xffff + (mantissa >> 17 & 1)) >> 17;
    q = exponent == 0 ? I32{} : vmin(q, I32{} + 127);
    const I32 sign = (I32)(bits >> 24 & 0x80u);
    return {uint8_t(most[0]), narrow_u8(q == 0 ? q : q | sign)};
}

// bfloat16 bits, half away from zero; a NaN counts as an infinity.
HMA_INLINE Group encode_device(U16 bits) {
    using I16 = Vec<int16_t, 16>;
    const I16 magnitude = vmin((I16)(bits & uint16_t(0x7fff)), I16{} + int16_t(0x7f80));
    const I32 most = widen((U16)group_max(magnitude)) >> 7;
    const I32 wide = widen((U16)magnitude);
    const I32 exponent = wide >> 7;
    const I32 mantissa = exponent == 0 ? I32{} : (wide & 0x7f) | 0x80;
    const I32 shift = vmin(most - exponent, I32{} + 8);
    I32 q = vmin((mantissa + ((I32{} + 1) << shift)) >> (shift + 1), I32{} + 127);
    const I32 sign = widen(U16(bits >> 8 & uint16_t(0x80)));
    return {uint8_t(most[0]), narrow_u8(q == 0 ? q : q | sign)};
}

// The 16 values' bfloat16 bits. E < lz (nothing a packer emits) is +0, E == lz a denormal.
HMA_INLINE U16 decode_group(uint8_t exponent, U8 bytes) {
    const I32 byte = widen(bytes);
    const I32 q = byte & 0x7f;
    const Vec<float, 16> value = __builtin_convertvector(q, Vec<float, 16>);
    // float(q) has exponent field 133 - lz.
    const I32 sign = byte >> 7 << 15;
    const I32 bits = ((I32)value >> 16) + ((int(exponent) - 133) << 7);
    return narrow_u16(q == 0 ? sign : (bits < 0 ? I32{} : bits | sign));
}

HMA_INLINE U32 f32_bits(const void* x, Type type, int64_t at) {
    if (type == Type::f32) return load<U32>(static_cast<const float*>(x) + at);
    const U16 half = load<U16>(static_cast<const uint16_t*>(x) + at);
    if (type == Type::bf16) return (U32)widen(half) << 16;
    U32 bits;
    for (int i = 0; i < GROUP; i++) {
        const float f = f16_to_f32(half[i]);
        bits[i] = load<uint32_t>(&f);
    }
    return bits;
}

template <Type type, Rounding rounding>
HMA_INLINE Group encode(const void* x, int64_t at) {
    if constexpr (rounding == Rounding::host) return encode_host(f32_bits(x, type, at));
    if constexpr (type == Type::bf16)
        return encode_device(load<U16>(static_cast<const uint16_t*>(x) + at));
    return encode_device(narrow_u16((I32)(f32_bits(x, type, at) >> 16)));
}

// Calls body(type, rounding) with both as constants.
template <class Body>
HMA_INLINE void specialize(Type type, Rounding rounding, Body body) {
    const auto with_type = [&](auto constant) {
        if (rounding == Rounding::host)
            body(constant, std::integral_constant<Rounding, Rounding::host>{});
        else
            body(constant, std::integral_constant<Rounding, Rounding::device>{});
    };
    switch (type) {
        case Type::f32: return with_type(std::integral_constant<Type, Type::f32>{});
        case Type::bf16: return with_type(std::integral_constant<Type, Type::bf16>{});
        case Type::f16: return with_type(std::integral_constant<Type, Type::f16>{});
    }
}

// Where group `half` (0 left, 1 right) of a tile's row lies.
HMA_INLINE int exponent_at(int row, int half) { return (row / 16 * 2 + half) * 16 + row % 16; }
HMA_INLINE int data_at(int row, int half) {
    return EXPONENT_BYTES + (row / 16 * 2 + half) * FACE_BYTES + row % 16 * GROUP;
}

template <Type type, Rounding rounding>
HMA_INLINE void pack_row(const void* x, int64_t at, uint8_t* tile, int row) {
    for (int half = 0; half < 2; half++) {
        const Group group = encode<type, rounding>(x, at + half * GROUP);
        tile[exponent_at(row, half)] = group.exponent;
        store(tile + data_at(row, half), group.bytes);
    }
}

void pack(const PackArgs& args, int64_t first, int64_t last) {
    const Matrix& x = args.x;
    const int64_t high = (x.height + TILE - 1) / TILE, wide = (x.width + TILE - 1) / TILE;
    specialize(x.type, args.rounding, [&](auto type, auto rounding) {
        for (int64_t strip = first; strip < last; strip++) {
            const int64_t start = strip / high * x.outer_stride;
            for (int64_t column = 0; column < wide; column++) {
                uint8_t* tile = args.tiles + (strip * wide + column) * TILE_BYTES;
                const int64_t columns = x.width - column * TILE;
                for (int row = 0; row < TILE; row++) {
                    const int64_t at_row = strip % high * TILE + row;
                    const int64_t at = start + at_row * x.row_stride + column * TILE;
                    if (at_row < x.height && columns >= TILE) {
                        pack_row<type, rounding>(x.data, at, tile, row);
                        continue;
                    }
                    alignas(64) char edge[TILE * 4] = {};
                    const int64_t size = size_of(type);
                    if (at_row < x.height)
                        std::memcpy(edge, static_cast<const char*>(x.data) + at * size,
                                    columns * size);
                    pack_row<type, rounding>(edge, 0, tile, row);
                }
            }
        }
    });
}

HMA_INLINE void store_group(const Matrix& out, int64_t at, U16 bits) {
    if (out.type == Type::bf16)
        store(static_cast<uint16_t*>(out.data) + at, bits);
    else
        store(static_cast<float*>(out.data) + at, widen(bits) << 16);
}

void unpack(const UnpackArgs& args, int64_t first, int64_t last) {
    const Matrix& out = args.out;
    const int64_t high = out.height / TILE, wide = out.width / TILE;
    for (int64_t strip = first; strip < last; strip++) {
        const int64_t start = strip / high * out.outer_stride;
        for (int64_t column = 0; column < wide; column++) {
            const uint8_t* tile = args.tiles + (strip * wide + column) * TILE_BYTES;
            for (int row = 0; row < TILE; row++) {
                const int64_t at =
                    start + (strip % high * TILE + row) * out.row_stride + column * TILE;
                for (int half = 0; half < 2; half++)
                    store_group(out, at + half * GROUP,
                                decode_group(tile[exponent_at(row, half)],
                                             load<U8>(tile + data_at(row, half))));
            }
        }
    }
}

void write_rows(const WriteRowsArgs& args, int64_t first, int64_t last) {
    const int64_t tiles = args.width / TILE;
    specialize(args.type, Rounding::device, [&](auto type, auto) {
        for (int64_t i = first; i < last; i++) {
            uint8_t* page = args.pages + args.page_ids[i] * args.page_stride;
            for (int64_t head = 0; head < args.heads; head++) {
                for (int64_t tile = 0; tile < tiles; tile++)
                    pack_row<type, Rounding::device>(
                        args.x, i * args.row_stride + head * args.head_stride + tile * TILE,
                        page + (head * tiles + tile) * TILE_BYTES, args.page_rows[i]);
            }
        }
    });
}

void round(const RoundArgs& args, int64_t first, int64_t last) {
    const Matrix& x = args.x;
    const Matrix out{args.out, x.type, 1, x.height, x.width, 0, x.width};
    specialize(x.type, args.rounding, [&](auto type, auto rounding) {
        for (int64_t row = first; row < last; row++) {
            for (int64_t column = 0; column < x.width; column += GROUP) {
                const Group group = encode<type, rounding>(x.data, row * x.row_stride + column);
                store_group(out, row * x.width + column,
                            decode_group(group.exponent, group.bytes));
            }
        }
    });
}

}  // namespace
}  // namespace hma
