// What the host tells the decode kernel. Python mirrors this struct (hma_kernels/cuda/library.py).
#pragma once

#include <cstdint>

namespace hma {

// One format's page memory in one layer, and the pages of each request: entries
// start[b]..start[b+1]-1 of ids and positions.
struct PageLists {
  const uint8_t* k;           // page 0; a page holds kv_heads pieces of 32 tokens
  const uint8_t* v;
  int64_t k_page_bytes;       // from one page to the next
  int64_t v_page_bytes;
  const int64_t* ids;
  const int64_t* positions;   // of a page's first token
  const int64_t* start;       // [batch + 1]
};

struct DecodeParams {
  const void* query;          // [batch, heads, head_dim]
  int64_t query_stride;       // elements from one request to the next
  int64_t head_stride;        // elements from one head to the next
  PageLists bfp8;
  PageLists bf16;
  const int64_t* lengths;     // [batch] tokens to attend to
  const int32_t* item_start;  // [batch + 1] first item of each request
  const int32_t* item_request;  // [items]; batch or more where there is no item
  float* partial;             // [items, heads, v_head_dim] not divided by the sum
  float* maxima;              // [items, heads] in units of log 2
  float* sums;                // [items, heads]
  int32_t batch;
  int32_t kv_heads;
  int32_t grouped;            // query heads to a KV head
  int32_t window;             // -1: none
  float scale;
  float logit_cap;            // 0: none
};

}  // namespace hma
