// Which part of the batch a block works on.
//
// A unit is one request, one KV head and a block's worth of its query heads; its pages are those of
// the request. All pages of all units stand in one row, unit after unit, and each block takes an
// equally long span of it. So blocks end together, whatever the requests' lengths are, and a unit
// belongs to one block or to several with consecutive numbers.
#pragma once

#include <hma/params.h>
#include <hma/warp.cuh>

namespace hma {

struct PageRange {
  int64_t first;  // an entry of PagedKVParams::indices and pos
  int count;
};

// Pages of both formats of all requests before `request`.
HMA_DEVICE int64_t pages_before(const DecodeParams& p, int request) {
  return p.bfp8.indptr[request] + p.bf16.indptr[request];
}

// The row of all pages, cut into spans. A span is not shorter than `min_pages` unless the row is.
struct Spans {
  int64_t pages;
  int blocks;  // that have a span

  HMA_DEVICE Spans(const DecodeParams& p, int units_per_request, int min_pages)
      : pages(pages_before(p, p.batch_size) * units_per_request) {
    const int64_t enough = pages / min_pages > 1 ? pages / min_pages : 1;
    blocks = enough < p.blocks ? int(enough) : p.blocks;
  }

  HMA_DEVICE int64_t start(int block) const { return pages * block / blocks; }

  HMA_DEVICE int block_of(int64_t page) const { return int(((page + 1) * blocks - 1) / pages); }
};

// What one block does of one unit.
struct Segment {
  int request, kv_head;
  int first_head;  // among the query heads of the KV head
  int begin, end;  // visible positions are begin..end-1
  PageRange bfp8, bf16;
  int first_block, last_block;  // those that share the unit
  bool opens_span;              // it is the first of its block
  bool unit_opens_span;         // the unit's first segment is

  HMA_DEVICE bool whole() const { return first_block == last_block; }

  // The segment at `page`, which is one of `request`'s, and ends at `span_end` at the latest.
  // Returns where it ends. BFP8 pages are counted first.
  HMA_DEVICE int64_t load(const DecodeParams& p, const Spans& spans, int head_blocks,
                          int heads_per_block, int64_t page, int64_t span_start,
                          int64_t span_end) {
    const int64_t bfp8_start = p.bfp8.indptr[request], bf16_start = p.bf16.indptr[request];
    const int64_t bfp8_pages = p.bfp8.indptr[request + 1] - bfp8_start;
    const int64_t pages = bfp8_pages + p.bf16.indptr[request + 1] - bf16_start;
    const int64_t request_start = (bfp8_start + bf16_start) * p.kv_heads * head_blocks;
    end = int(p.seq_lens[request]);
    begin = p.sliding_window >= 0 && end - 1 > p.sliding_window ? end - 1 - p.sliding_window : 0;
    const int64_t unit = (page - request_start) / pages;
    kv_head = int(unit) / head_blocks;
    first_head = int(unit) % head_blocks * heads_per_block;
    const int64_t unit_start = request_start + unit * pages, unit_end = unit_start + pages;
    const int64_t segment_end = unit_end < span_end ? unit_end : span_end;
    first_block = spans.block_of(unit_start);
    last_block = spans.block_of(unit_end - 1);
    opens_span = page == span_start;
    unit_opens_span = unit_start == spans.start(first_block);
    const int64_t first = page - unit_start, last = segment_end - unit_start;
    const int64_t last_bfp8 = last < bfp8_pages ? last : bfp8_pages;
    const int64_t first_bf16 = first > bfp8_pages ? first : bfp8_pages;
    bfp8 = {bfp8_start + first, int(last_bfp8 - first)};
    bf16 = {bf16_start + first_bf16 - bfp8_pages, int(last - first_bf16)};
    return segment_end;
  }
};

}  // namespace hma
