// How the work of a batch is divided among the warps, decided on the GPU once a step.
//
// A unit is one request, one KV head and up to HEADS of its query heads. Its pages are cut into tiles
// (tiles.cuh), of nearly equal size in both formats, BFP8 first. All tiles of all units stand in one
// row, and each warp of the attention kernel takes an equally long span of it, whatever the lengths
// of the requests are. Pages that a sliding window hides are not in the table that is divided
// (hma_kernels/triton/visible.py); of a BF16 page at either end of the window one half may be hidden,
// and still counts. What a warp has of a unit is a segment. A unit that is one warp's alone is
// finished by that warp; else its warps leave partial states, which a second kernel merges.
#pragma once

#include <hma/params.h>
#include <hma/tiles.cuh>
#include <hma/warp.cuh>

namespace hma {

constexpr int MIN_TILES = 2;  // of a warp, unless there are fewer

struct Segment {
  int32_t tiles;                 // 0: none
  int32_t request, kv_head;
  int32_t first_head;            // among the query heads of the KV head
  int32_t begin, end;            // visible positions are begin..end-1
  int32_t bfp8_tiles;            // of `tiles`
  int32_t bfp8_entry;            // of indices and pos: the first tile's
  int32_t bf16_entry;            // the page of the first BF16 tile
  int32_t bf16_half;             // 1 if that tile is its second half
  int32_t partial;               // where its state is left; -1: it is the whole unit
  int32_t unused;
};

struct Span {
  int32_t first, count;  // segments, some of which may be empty
};

// The warps that share a unit. `first_partial` is the first one's partial state, and the others'
// are those of 2 * warp. count is 0 where a unit has no tiles.
struct UnitWarps {
  int32_t first_warp, count, first_partial, unused;
};

// HEADS query heads in a unit. All parts begin at multiples of 16 bytes.
template <int HEADS, int V_DIM>
class Workspace {
 public:
  HMA_DEVICE explicit Workspace(const DecodeParams& p, int warps_per_block)
      : warps(p.blocks * warps_per_block),
        head_blocks((p.gqa_group_size + HEADS - 1) / HEADS),
        units(p.batch_size * p.kv_heads * head_blocks),
        memory(p.workspace) {}

  HMA_DEVICE Span* spans() const { return reinterpret_cast<Span*>(memory); }
  HMA_DEVICE UnitWarps* unit_warps() const {
    return reinterpret_cast<UnitWarps*>(memory + units_at(warps));
  }
  HMA_DEVICE Segment* segments() const {
    return reinterpret_cast<Segment*>(memory + segments_at(warps, units));
  }
  // [2 * warps, HEADS, 2]: maximum logit (units of log 2) and sum of weights. A warp has at most two
  // partial states: its span's first segment, and its last.
  HMA_DEVICE float* states() const {
    return reinterpret_cast<float*>(memory + states_at(warps, units));
  }
  // [2 * warps, HEADS, V_DIM] weighted sums of V, not divided by the sum of weights
  HMA_DEVICE float* out() const {
    return reinterpret_cast<float*>(memory + out_at(warps, units));
  }

  HMA_HOST_DEVICE static int64_t bytes(int64_t warps, int64_t units) {
    return out_at(warps, units) + 2 * warps * HEADS * V_DIM * 4;
  }

  const int warps, head_blocks, units;

 private:
  HMA_HOST_DEVICE static int64_t units_at(int64_t warps) {
    return (warps * int64_t(sizeof(Span)) + 15) / 16 * 16;
  }
  HMA_HOST_DEVICE static int64_t segments_at(int64_t warps, int64_t units) {
    return units_at(warps) + units * int64_t(sizeof(UnitWarps));
  }
  HMA_HOST_DEVICE static int64_t states_at(int64_t warps, int64_t units) {
    return segments_at(warps, units) + (warps + units) * int64_t(sizeof(Segment));
  }
  HMA_HOST_DEVICE static int64_t out_at(int64_t warps, int64_t units) {
    return states_at(warps, units) + 2 * warps * HEADS * 2 * 4;
  }

  uint8_t* memory;
};

// THREADS_A_UNIT threads divide a unit: a long request has many warps.
template <int HEADS, int V_DIM, int WARPS>
class Schedule {
  static constexpr int BF16_TILES = PAGE / Bf16<32>::TOKENS;  // of a page

 public:
  static constexpr int THREADS_A_UNIT = 32;

  HMA_DEVICE explicit Schedule(const DecodeParams& params)
      : p(params), space(params, WARPS), units_per_request(p.kv_heads * space.head_blocks) {
    total = tiles_before(p.batch_size) * units_per_request;
    const int64_t enough = total / MIN_TILES > 1 ? total / MIN_TILES : 1;
    warps = enough < space.warps ? int(enough) : space.warps;
  }

  HMA_DEVICE void run(int thread, int threads) const {
    for (int i = thread; i < space.units * THREADS_A_UNIT; i += threads) {
      divide(i / THREADS_A_UNIT, i % THREADS_A_UNIT);
    }
    for (int warp = thread; warp < space.warps; warp += threads) {
      if (warp >= warps || total == 0) space.spans()[warp] = {0, 0};
    }
  }

 private:
  HMA_DEVICE int64_t tiles_before(int request) const {
    return p.bfp8.indptr[request] + p.bf16.indptr[request] * BF16_TILES;
  }

  HMA_DEVICE int64_t start(int64_t warp) const { return total * warp / warps; }

  HMA_DEVICE int warp_of(int64_t tile) const { return int(((tile + 1) * warps - 1) / total); }

  // A warp's segment of a unit is number warp + unit: both grow along the row.
  HMA_DEVICE void divide(int unit, int part) const {
    const int request = unit / units_per_request, within = unit % units_per_request;
    const int64_t before = tiles_before(request);
    const int64_t tiles = tiles_before(request + 1) - before;
    const int64_t unit_start = before * units_per_request + within * tiles;
    if (tiles == 0) {
      if (part > 0) return;
      space.unit_warps()[unit] = {0, 0, 0, 0};
      if (unit_start == 0 || unit_start == total) return;
      const int warp = warp_of(unit_start);
      if (start(warp) < unit_start) space.segments()[warp + unit] = {};
      return;
    }
    const int64_t unit_end = unit_start + tiles;
    const int first = warp_of(unit_start), last = warp_of(unit_end - 1);
    const int first_partial = 2 * first + (start(first) == unit_start ? 0 : 1);
    if (part == 0) space.unit_warps()[unit] = {first, last - first + 1, first_partial, 0};
    Segment made;
    made.request = request;
    made.kv_head = within / space.head_blocks;
    made.first_head = within % space.head_blocks * HEADS;
    made.end = int(p.seq_lens[request]);
    made.begin = p.sliding_window >= 0 && made.end - 1 > p.sliding_window
                     ? made.end - 1 - p.sliding_window
                     : 0;
    made.unused = 0;
    const int64_t bfp8_start = p.bfp8.indptr[request], bf16_start = p.bf16.indptr[request];
    const int64_t bfp8_tiles = p.bfp8.indptr[request + 1] - bfp8_start;
    for (int warp = first + part; warp <= last; warp += THREADS_A_UNIT) {
      const int64_t span_start = start(warp), span_end = start(warp + 1);
      const int64_t from = (span_start > unit_start ? span_start : unit_start) - unit_start;
      const int64_t to = (span_end < unit_end ? span_end : unit_end) - unit_start;
      const int64_t bf16_from = from > bfp8_tiles ? from - bfp8_tiles : 0;
      made.tiles = int(to - from);
      made.bfp8_tiles = int(from < bfp8_tiles ? (to < bfp8_tiles ? to : bfp8_tiles) - from : 0);
      made.bfp8_entry = int(bfp8_start + from);
      made.bf16_entry = int(bf16_start + bf16_from / BF16_TILES);
      made.bf16_half = int(bf16_from % BF16_TILES);
      made.partial = first == last ? -1 : warp == first ? first_partial : 2 * warp;
      space.segments()[warp + unit] = made;
      if (span_start >= unit_start) space.spans()[warp].first = warp + unit;
      if (span_end <= unit_end) {
        // The span's first unit is the one that its first tile is in.
        space.spans()[warp].count = unit - unit_of(span_start) + 1;
      }
    }
  }

  HMA_DEVICE int unit_of(int64_t tile) const {
    int low = 0, high = p.batch_size - 1;  // the last request that begins at or before the tile
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (tiles_before(middle) * units_per_request <= tile) low = middle;
      else high = middle - 1;
    }
    const int64_t before = tiles_before(low), tiles = tiles_before(low + 1) - before;
    return low * units_per_request + int((tile - before * units_per_request) / tiles);
  }

  const DecodeParams& p;
  const Workspace<HEADS, V_DIM> space;
  const int units_per_request;
  int64_t total;
  int warps;  // that have a span
};

}  // namespace hma
