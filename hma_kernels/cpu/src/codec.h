// BFP8 codec over strips (a row of tiles), single rows, and values.
#pragma once

#include "groups.h"

namespace hma {
namespace {

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

HMA_INLINE RowBytes row_of(uint8_t* tile, int row) {
    return {{tile + exponent_at(row, 0), tile + exponent_at(row, 1)},
            {tile + data_at(row, 0), tile + data_at(row, 1)}};
}

HMA_INLINE ConstRowBytes row_of(const uint8_t* tile, int row) {
    return {{tile[exponent_at(row, 0)], tile[exponent_at(row, 1)]},
            {tile + data_at(row, 0), tile + data_at(row, 1)}};
}

// pack_row of `columns` <= 32 values and zeros.
template <Type type, Rounding rounding>
void pack_edge(const void* x, int64_t at, int64_t columns, const RowBytes& to) {
    alignas(64) char row[TILE * 4] = {};
    constexpr int64_t size = size_of(type);
    if (columns) std::memcpy(row, static_cast<const char*>(x) + at * size, columns * size);
    pack_row<type, rounding>(row, 0, to);
}

// A few tiles side by side: the rows of x are read (or written) in pieces of hundreds of bytes,
// while the tiles stay in the first cache.
struct Tiles {
    int64_t first, count;   // tiles' index
    int64_t at;             // of the first one's first value in x
    int64_t rows, columns;  // that exist from there on
};

// Calls body for all tiles of strips first..last-1 of x. What the body needs in its loops it holds
// by value: stores of bytes may alias anything.
template <class Body>
HMA_INLINE void for_tiles(const Matrix& x, int64_t first, int64_t last, Body body) {
    constexpr int64_t SIDE_BY_SIDE = 4;
    const int64_t high = (x.height + TILE - 1) / TILE, wide = (x.width + TILE - 1) / TILE;
    for (int64_t strip = first; strip < last; strip++) {
        const int64_t row = strip % high * TILE;
        const int64_t at = strip / high * x.outer_stride + row * x.row_stride;
        for (int64_t column = 0; column < wide; column += SIDE_BY_SIDE) {
            const int64_t count = wide - column < SIDE_BY_SIDE ? wide - column : SIDE_BY_SIDE;
            body(Tiles{strip * wide + column, count, at + column * TILE, x.height - row,
                       x.width - column * TILE});
        }
    }
}

template <Type type, Rounding rounding>
void pack_strips(PackArgs args, int64_t first, int64_t last) {
    for_tiles(args.x, first, last, [args](Tiles tiles) {
        uint8_t* const to = args.tiles + tiles.first * TILE_BYTES;
        const void* const x = args.x.data;
        const int64_t stride = args.x.row_stride;
        if (tiles.rows >= TILE && tiles.columns >= tiles.count * TILE) {
            for (int face = 0; face < 2; face++)
                for (int row = face * 16; row < face * 16 + 16; row++)
                    for (int64_t i = 0; i < tiles.count; i++) {
                        const int64_t at = tiles.at + row * stride + i * TILE;
                        // The same row of the next tiles: 32 streams are too many to be guessed.
                        const char* next =
                            static_cast<const char*>(x) + (at + tiles.count * TILE) * size_of(type);
                        __builtin_prefetch(next);
                        if (type == Type::f32) __builtin_prefetch(next + 64);
                        pack_row<type, rounding>(x, at, row_of(to + i * TILE_BYTES, row));
                    }
            return;
        }
        for (int row = 0; row < TILE; row++) {
            for (int64_t i = 0; i < tiles.count; i++) {
                const int64_t left = row < tiles.rows ? tiles.columns - i * TILE : 0;
                pack_edge<type, rounding>(x, tiles.at + row * stride + i * TILE,
                                          left < TILE ? left : TILE,
                                          row_of(to + i * TILE_BYTES, row));
            }
        }
    });
}

void pack(const PackArgs& args, int64_t first, int64_t last) {
    specialize(args.x.type, args.rounding, [&](auto type, auto rounding) {
        pack_strips<type, rounding>(args, first, last);
    });
}

template <Type type>
void unpack_strips(UnpackArgs args, int64_t first, int64_t last) {
    for_tiles(args.out, first, last, [args](Tiles tiles) {
        const uint8_t* const from = args.tiles + tiles.first * TILE_BYTES;
        const int64_t stride = args.out.row_stride;
        for (int face = 0; face < 2; face++)
            for (int row = face * 16; row < face * 16 + 16; row++)
                for (int64_t i = 0; i < tiles.count; i++)
                    unpack_row<type>(row_of(from + i * TILE_BYTES, row), args.out.data,
                                     tiles.at + row * stride + i * TILE);
    });
}

void unpack(const UnpackArgs& args, int64_t first, int64_t last) {
    if (args.out.type == Type::f32)
        unpack_strips<Type::f32>(args, first, last);
    else
        unpack_strips<Type::bf16>(args, first, last);
}

template <Type type>
void write_each(WriteRowsArgs args, int64_t first, int64_t last) {
    const int64_t tiles = args.width / TILE;
    for (int64_t i = first; i < last; i++) {
        uint8_t* tile = args.pages + args.page_ids[i] * args.page_stride;
        const int row = int(args.page_rows[i]);
        for (int64_t head = 0; head < args.heads; head++) {
            const int64_t at = i * args.row_stride + head * args.head_stride;
            for (int64_t d = 0; d < tiles; d++, tile += TILE_BYTES)
                pack_row<type, Rounding::device>(args.x, at + d * TILE, row_of(tile, row));
        }
    }
}

void write_rows(const WriteRowsArgs& args, int64_t first, int64_t last) {
    specialize(args.type, Rounding::device,
               [&](auto type, auto) { write_each<type>(args, first, last); });
}

template <Type type, Rounding rounding>
void round_rows(RoundArgs args, int64_t first, int64_t last) {
    uint8_t exponents[2], data[TILE];
    const auto round_trip = [&](const void* x, int64_t at, int64_t columns, void* out, int64_t to) {
        const RowBytes row = {{exponents, exponents + 1}, {data, data + GROUP}};
        if (columns < TILE)
            pack_edge<type, rounding>(x, at, columns, row);
        else
            pack_row<type, rounding>(x, at, row);
        unpack_row<type>({{exponents[0], exponents[1]}, {data, data + GROUP}}, out, to);
    };
    for (int64_t i = first; i < last; i++) {
        const int64_t from = i * args.x.row_stride, to = i * args.x.width;
        int64_t column = 0;
        for (; column + TILE <= args.x.width; column += TILE)
            round_trip(args.x.data, from + column, TILE, args.out, to + column);
        if (column == args.x.width) continue;
        alignas(64) char edge[TILE * 4];
        round_trip(args.x.data, from + column, GROUP, edge, 0);
        std::memcpy(static_cast<char*>(args.out) + (to + column) * size_of(type), edge,
                    GROUP * size_of(type));
    }
}

void round(const RoundArgs& args, int64_t first, int64_t last) {
    specialize(args.x.type, args.rounding, [&](auto type, auto rounding) {
        round_rows<type, rounding>(args, first, last);
    });
}

}  // namespace
}  // namespace hma
