// Which part of the batch a block works on, by the schedule of hma_kernels/triton/schedule.py.
#pragma once

#include <hma/params.h>
#include <hma/warp.cuh>

namespace hma {

struct PageRange {
  int64_t first;  // an entry of PagedKVParams::indices and pos
  int count;
};

struct WorkItem {
  int item, request, kv_head;
  int first_head;  // among the query heads of the KV head
  int begin, end;  // visible positions are begin..end-1
  PageRange bfp8, bf16;

  // Returns whether the block has an item; if so, loads all but the page ranges.
  HMA_DEVICE bool load(const DecodeParams& p, int heads_per_block) {
    item = block_x();
    request = p.item_request[item];
    if (request >= p.batch_size) return false;
    kv_head = block_y();
    first_head = block_z() * heads_per_block;
    end = int(p.seq_lens[request]);
    begin = p.sliding_window >= 0 && end - 1 > p.sliding_window ? end - 1 - p.sliding_window : 0;
    return true;
  }

  // The items of a request differ in length by one page at most. BFP8 pages are counted first.
  HMA_DEVICE void load_pages(const DecodeParams& p) {
    const int64_t bfp8_start = p.bfp8.indptr[request], bf16_start = p.bf16.indptr[request];
    const int64_t bfp8_pages = p.bfp8.indptr[request + 1] - bfp8_start;
    const int64_t pages = bfp8_pages + p.bf16.indptr[request + 1] - bf16_start;
    const int64_t first_item = p.item_indptr[request];
    const int64_t items = p.item_indptr[request + 1] - first_item;
    const int64_t first = pages * (item - first_item) / items;
    const int64_t last = pages * (item - first_item + 1) / items;
    const int64_t last_bfp8 = last < bfp8_pages ? last : bfp8_pages;
    const int64_t first_bf16 = first > bfp8_pages ? first : bfp8_pages;
    bfp8 = {bfp8_start + first, int(last_bfp8 - first)};
    bf16 = {bf16_start + first_bf16 - bfp8_pages, int(last - first_bf16)};
  }
};

}  // namespace hma
