// The arguments of the kernels. Python mirrors these structs (hma_kernels/cuda/library.py).
#pragma once

#include <cstdint>

namespace hma {

// The pages of one format in one layer, and which of them each request has: request b owns entries
// indptr[b]..indptr[b+1]-1 of indices and pos.
struct PagedKVParams {
  const uint8_t* k;          // page 0; a page holds PAGE tokens of each KV head, head by head
  const uint8_t* v;
  int64_t k_page_bytes;      // from one page to the next
  int64_t v_page_bytes;
  const int64_t* indptr;     // [batch_size + 1]
  const int64_t* indices;    // page ids
  const int64_t* pos;        // position of a page's first token
};

struct DecodeParams {
  const void* query;            // [batch_size, heads, head_dim]
  int64_t query_stride;         // elements from one request to the next
  int64_t query_head_stride;    // elements from one head to the next
  PagedKVParams bfp8;
  PagedKVParams bf16;
  const int64_t* seq_lens;      // [batch_size] tokens to attend to
  void* out;                    // [batch_size, heads, v_head_dim], contiguous, of the query's type
  const float* sinks;           // [heads]; null: none
  uint8_t* workspace;           // schedule.cuh says what is in it
  int32_t batch_size;
  int32_t kv_heads;
  int32_t gqa_group_size;       // query heads per KV head
  int32_t sliding_window;       // -1: none
  float scale;
  float logit_cap;              // 0: none
  int32_t blocks;               // that the attention kernel is started with
};

}  // namespace hma
