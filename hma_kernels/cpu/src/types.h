// Layout of pages and the plain structs that cross from the bindings to the kernels.
#pragma once

#include <cstdint>

namespace hma {

// A BFP8 tile: 64 shared exponents, then 4 faces of 16 rows x 16 bytes; hma_kernels/layout.py.
constexpr int GROUP = 16;
constexpr int TILE = 32;
constexpr int PAGE = 32;
constexpr int EXPONENT_BYTES = 64;
constexpr int FACE_BYTES = 256;
constexpr int TILE_BYTES = 1088;
constexpr double LOG2E = 1.442695040888963407359924681001892137;

enum class Type { f32, bf16, f16 };
enum class Rounding { device, host };

constexpr int64_t size_of(Type type) { return type == Type::f32 ? 4 : 2; }

// x [outer][height][width], strides in elements, columns adjacent.
struct Matrix {
    void* data;
    Type type;
    int64_t outer, height, width;
    int64_t outer_stride, row_stride;
};

struct PackArgs {
    Matrix x;
    Rounding rounding;
    uint8_t* tiles;  // [outer][ceil(height/32)][ceil(width/32)][1088]
};

struct UnpackArgs {
    const uint8_t* tiles;  // [outer][height/32][width/32][1088]
    Matrix out;            // f32 or bf16
};

struct WriteRowsArgs {
    const void* x;  // [rows][heads][width], strides in elements
    Type type;
    int64_t rows, heads, width, row_stride, head_stride;
    const int64_t* page_ids;  // [rows]
    const int64_t* page_rows;  // [rows], 0..31
    uint8_t* pages;
    int64_t page_stride;  // bytes; a page is [heads][width/32][1088]
};

struct RoundArgs {
    Matrix x;  // outer == 1
    Rounding rounding;
    void* out;  // [height][width], x's type
};

enum Format { BFP8 = 0, BF16 = 1 };

// One layer's pages of both formats, indexed by Format; strides in bytes.
struct Pages {
    const uint8_t* k[2];
    const uint8_t* v[2];
    int64_t k_stride[2], v_stride[2];
};

struct Heads {
    int kv_heads, gqa_group_size;  // query heads a KV head
    int dim, v_dim;       // multiples of 32
};

// A page of which rows first..last-1 are attended to; position is that of row 0.
struct VisiblePage {
    int64_t id, position;
    int8_t first, last;
};

struct Query {
    const void* data;  // [rows][kv_heads*gqa_group_size][dim], strides in elements
    Type type;
    int64_t row_stride, head_stride;
};

struct Softmax {
    double scale, logit_cap;
    const float* sinks;  // [kv_heads*gqa_group_size], a logit each that weighs no value; or null
};

// A request's queries: consecutive rows at its last positions, end-rows..end-1.
struct DecodeRows {
    int32_t first, rows;
    int64_t end;
};

// Pages first..last-1 of one format, for one request and one KV head.
struct DecodeItem {
    int32_t request, kv_head;
    Format format;
    int32_t first, last;
    int32_t slot;
};

struct DecodeArgs {
    Heads heads;
    Pages pages;
    const VisiblePage* list[2];
    const DecodeRows* rows;  // [requests]
    int64_t window;          // a row at p sees keys >= p - window; -1 is no limit
    Query q;
    Softmax softmax;
};

// Softmax state of one KV head's query heads, row by row, over some of their keys; logits in units
// of log2.
struct Partial {
    float* max;  // [rows*gqa_group_size]
    float* sum;  // [rows*gqa_group_size]
    float* out;  // [rows*gqa_group_size][v_dim], not yet divided by sum
};

// New rows of one request after its cached prefix.
struct ExtendRequest {
    const VisiblePage* list[2];  // rows below the prefix's length
    int64_t pages[2];
    int64_t prefix, first_row, rows;
    int64_t first_position;  // of its first new row
};

struct ExtendArgs {
    Heads heads;
    Pages pages;
    Query q, k, v;  // new rows; k and v [rows][kv_heads][dim]; rows of k may be absent (decode)
    bool has_new_keys;
    int64_t window;       // a row at p sees keys >= p - window; -1 is no limit
    Softmax softmax;
    void* out;  // [rows][kv_heads*gqa_group_size][v_dim] contiguous, q's type
};

// Query heads of one KV head, as lanes row*gqa_group_size + head: first..last-1.
struct ExtendItem {
    int32_t request, kv_head;
    int64_t first, last;
};

// Blocks of `length` bytes; `keys` is [18][8], `out` [blocks][8].
struct HashArgs {
    const int64_t* addresses;
    int64_t length;
    const uint64_t* keys;
    const uint64_t* start;
    uint64_t* out;
};

// What each instruction set provides. Ranges are split between threads by the caller.
struct Kernels {
    const char* name;
    void (*pack)(const PackArgs&, int64_t first_strip, int64_t last_strip);
    void (*unpack)(const UnpackArgs&, int64_t first_strip, int64_t last_strip);
    void (*write_rows)(const WriteRowsArgs&, int64_t first_row, int64_t last_row);
    void (*round)(const RoundArgs&, int64_t first_row, int64_t last_row);
    void (*hash)(const HashArgs&, int64_t first_block, int64_t last_block);
    int64_t (*decode_scratch)(const Heads&, int rows);  // bytes, 64-byte aligned, of one thread
    void (*decode)(const DecodeArgs&, const DecodeItem&, void* scratch, Partial);
    int extend_lanes[2];  // an ExtendItem's most lanes: float, double
    int64_t (*extend_scratch[2])(const Heads&);
    void (*extend[2])(const ExtendArgs&, const ExtendRequest&, const ExtendItem&, void* scratch);
};

namespace scalar { const Kernels& kernels(); }
namespace avx2 { const Kernels& kernels(); }
namespace avx512 { const Kernels& kernels(); }
namespace avx512_bf16 { const Kernels& kernels(); }

}  // namespace hma
