// Work lists of attention, and running them on all threads.
#pragma once

#include <span>
#include <vector>

#include "types.h"

namespace hma {

// One format's page list of a batch, as hma_kernels.PageTable has it.
struct PageList {
    std::span<const int64_t> indptr, indices, pos;
    int64_t pages;  // indices are below it
};

// The pages each request sees: rows at start <= position < stop.
struct VisiblePages {
    std::vector<VisiblePage> list[2];
    std::vector<int64_t> indptr[2];

    // Throws std::out_of_range for an index that is no page.
    VisiblePages(const PageList (&table)[2], std::span<const int64_t> start,
                 std::span<const int64_t> stop);
};

// Split-KV work list of one decode step: every request's pages cut into items of at most a few
// dozen, so that a long request is shared by all threads and a short one costs one item a head.
class DecodePlan {
  public:
    // Request b's queries are rows q_indptr[b]..q_indptr[b+1]-1, at least one.
    DecodePlan(const Heads& heads, const PageList (&table)[2], std::span<const int64_t> seq_lens,
               std::span<const int64_t> q_indptr, int64_t window);

    // out: [rows][kv_heads*gqa_group_size][v_dim] contiguous, of the query's type.
    void run(const Pages& pages, const Query& q, const Softmax& softmax, void* out) const;

  private:
    void merge(int64_t request, int kv_head, const float* state, const float* sinks, Type type,
               void* out) const;

    Heads heads_;
    int64_t batch_, window_;
    std::vector<DecodeRows> rows_;
    int most_rows_ = 1;  // of a request
    VisiblePages visible_;
    std::vector<DecodeItem> items_;
    std::vector<int32_t> slots_;  // [batch * kv_heads + 1]: each one's items are consecutive slots
};

// Decode or prefill attention in double, or prefill attention in float; see ExtendArgs.
// q_indptr: request b owns new rows q_indptr[b]..; prefix: cached tokens, which new rows follow or,
// in decode, are the last of.
void extend(ExtendArgs args, const PageList (&table)[2], std::span<const int64_t> prefix,
            std::span<const int64_t> q_indptr, bool exact);

}  // namespace hma
