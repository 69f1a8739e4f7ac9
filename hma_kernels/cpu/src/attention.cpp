#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "pool.h"
#include "vec.h"

namespace hma {
namespace {

// An item of 32 pages is about 280 KB at head_dim 128: tens of microseconds.
constexpr int64_t MOST_PAGES = 32;
constexpr int64_t FEWEST_PAGES = 4;
constexpr int64_t ITEMS_A_THREAD = 16;

// The first position that a request's first row sees; rows at the end of `lens`, or after it.
std::vector<int64_t> window_start(std::span<const int64_t> lens, std::span<const int64_t> q_indptr,
                                  bool after, int64_t window) {
    std::vector<int64_t> start(lens.size(), 0);
    if (window >= 0)
        for (size_t i = 0; i < lens.size(); i++) {
            const int64_t rows = after ? 0 : q_indptr[i + 1] - q_indptr[i];
            start[i] = std::max<int64_t>(0, lens[i] - rows - window);
        }
    return start;
}

}  // namespace

VisiblePages::VisiblePages(const PageList (&table)[2], std::span<const int64_t> start,
                           std::span<const int64_t> stop) {
    for (int format = 0; format < 2; format++) {
        const PageList& from = table[format];
        indptr[format].push_back(0);
        list[format].reserve(from.indices.size());
        for (size_t request = 0; request < stop.size(); request++) {
            for (int64_t i = from.indptr[request]; i < from.indptr[request + 1]; i++) {
                const int64_t id = from.indices[i], position = from.pos[i];
                if (id < 0 || id >= from.pages)
                    throw std::out_of_range(std::string(format == BFP8 ? "bfp8" : "bf16") +
                                            " page id " + std::to_string(id) + " is not in 0.." +
                                            std::to_string(from.pages - 1));
                const int64_t first = std::clamp<int64_t>(start[request] - position, 0, PAGE);
                const int64_t last = std::clamp<int64_t>(stop[request] - position, 0, PAGE);
                if (first < last)
                    list[format].push_back({id, position, int8_t(first), int8_t(last)});
            }
            indptr[format].push_back(list[format].size());
        }
    }
}

DecodePlan::DecodePlan(const Heads& heads, const PageList (&table)[2],
                       std::span<const int64_t> seq_lens, std::span<const int64_t> q_indptr,
                       int64_t window)
    : heads_(heads),
      batch_(seq_lens.size()),
      window_(window),
      visible_(table, window_start(seq_lens, q_indptr, false, window), seq_lens) {
    for (int64_t i = 0; i < batch_; i++) {
        const int rows = int(q_indptr[i + 1] - q_indptr[i]);
        rows_.push_back({int32_t(q_indptr[i]), rows, seq_lens[i]});
        most_rows_ = std::max(most_rows_, rows);
    }
    const int64_t work =
        int64_t(visible_.list[0].size() + visible_.list[1].size()) * heads.kv_heads;
    const int64_t chunk = std::clamp(work / (Pool::instance().threads() * ITEMS_A_THREAD),
                                     FEWEST_PAGES, MOST_PAGES);
    slots_.assign(batch_ * heads.kv_heads + 1, 0);
    int32_t slot = 0;
    for (int64_t request = 0; request < batch_; request++) {
        for (int kv_head = 0; kv_head < heads.kv_heads; kv_head++) {
            for (int format = 0; format < 2; format++) {
                const auto& indptr = visible_.indptr[format];
                const int64_t end = indptr[request + 1];
                for (int64_t first = indptr[request]; first < end; first += chunk)
                    items_.push_back({int32_t(request), kv_head, Format(format), int32_t(first),
                                      int32_t(std::min(first + chunk, end)), slot++});
            }
            slots_[request * heads.kv_heads + kv_head + 1] = slot;
        }
    }
    // Neighbouring heads of a page together, and the longest items first.
    std::stable_sort(items_.begin(), items_.end(), [](const DecodeItem& a, const DecodeItem& b) {
        const int a_pages = a.last - a.first, b_pages = b.last - b.first;
        if (a_pages != b_pages) return a_pages > b_pages;
        return a.format != b.format ? a.format < b.format : a.first < b.first;
    });
}

void DecodePlan::run(const Pages& pages, const Query& q, const Softmax& softmax, void* out) const {
    const Kernels& isa = kernels();
    const DecodeArgs args{
        heads_, pages, {visible_.list[0].data(), visible_.list[1].data()}, rows_.data(), window_,
        q, softmax};
    const int64_t state_size = most_rows_ * heads_.gqa_group_size * (heads_.v_dim + 2);
    const int64_t units = batch_ * heads_.kv_heads;

    Pool& pool = Pool::instance();
    const auto turn = pool.lock();
    pool.reserve(isa.decode_scratch(heads_, most_rows_));
    // Merged by whichever thread finishes a unit's last item, in the order of the slots.
    static std::vector<float> state;
    static std::vector<std::atomic<int32_t>> unfinished;
    if (int64_t(state.size()) < slots_.back() * state_size)
        state.resize(slots_.back() * state_size);
    if (int64_t(unfinished.size()) < units) unfinished = std::vector<std::atomic<int32_t>>(units);
    for (int64_t unit = 0; unit < units; unit++) {
        unfinished[unit] = slots_[unit + 1] - slots_[unit];
        if (unfinished[unit] == 0)
            merge(unit / heads_.kv_heads, int(unit % heads_.kv_heads), nullptr, nullptr, q.type, out);
    }
    pool.run(items_.size(), [&](int64_t index, void* scratch) {
        const DecodeItem& item = items_[index];
        float* own = state.data() + item.slot * state_size;
        const int64_t heads = int64_t(rows_[item.request].rows) * heads_.gqa_group_size;
        isa.decode(args, item, scratch, {own, own + heads, own + 2 * heads});
        const int64_t unit = int64_t(item.request) * heads_.kv_heads + item.kv_head;
        if (unfinished[unit].fetch_sub(1, std::memory_order_acq_rel) == 1)
            merge(item.request, item.kv_head, state.data(), softmax.sinks, q.type, out);
    });
}

void DecodePlan::merge(int64_t request, int kv_head, const float* state, const float* sinks,
                       Type type, void* out) const {
    const DecodeRows& rows = rows_[request];
    const int64_t group = heads_.gqa_group_size, heads = rows.rows * group, dim = heads_.v_dim;
    const int64_t state_size = most_rows_ * group * (dim + 2);
    const int64_t unit = request * heads_.kv_heads + kv_head;
    const int32_t begin = slots_[unit], end = slots_[unit + 1];
    std::vector<float> merged(dim);
    for (int64_t head = 0; head < heads; head++) {
        const auto at = [&](int32_t slot) { return state + slot * state_size; };
        float max = -INFINITY, sum = 0;
        std::fill(merged.begin(), merged.end(), 0.f);
        for (int32_t slot = begin; slot < end; slot++) max = std::max(max, at(slot)[head]);
        for (int32_t slot = begin; slot < end; slot++) {
            const float factor = std::exp2(at(slot)[head] - max);
            sum += at(slot)[heads + head] * factor;
            const float* part = at(slot) + 2 * heads + head * dim;
            for (int64_t d = 0; d < dim; d++) merged[d] += part[d] * factor;
        }
        // Of a sink far above all logits this is infinite, and the result 0.
        if (sinks) sum += std::exp2(sinks[kv_head * group + head % group] * float(LOG2E) - max);
        const float inverse = sum == 0 ? 0 : 1 / sum;
        const int64_t row = rows.first + head / group;
        const int64_t to = ((row * heads_.kv_heads + kv_head) * group + head % group) * dim;
        for (int64_t d = 0; d < dim; d++) set_element(out, type, to + d, merged[d] * inverse);
    }
}

void extend(ExtendArgs args, const PageList (&table)[2], std::span<const int64_t> prefix,
            std::span<const int64_t> q_indptr, bool exact) {
    const Kernels& isa = kernels();
    const std::vector<int64_t> start =
        window_start(prefix, q_indptr, args.has_new_keys, args.window);
    const VisiblePages visible(table, start, prefix);
    std::vector<ExtendRequest> requests;
    std::vector<ExtendItem> items;
    for (size_t request = 0; request < prefix.size(); request++) {
        ExtendRequest r{};
        for (int format = 0; format < 2; format++) {
            const auto& indptr = visible.indptr[format];
            r.list[format] = visible.list[format].data() + indptr[request];
            r.pages[format] = indptr[request + 1] - indptr[request];
        }
        r.prefix = prefix[request];
        r.first_row = q_indptr[request];
        r.rows = q_indptr[request + 1] - r.first_row;
        r.first_position = args.has_new_keys ? r.prefix : r.prefix - r.rows;
        requests.push_back(r);
        const int64_t lanes = r.rows * args.heads.gqa_group_size, most = isa.extend_lanes[exact];
        for (int64_t first = 0; first < lanes; first += most)
            for (int head = 0; head < args.heads.kv_heads; head++)
                items.push_back({int32_t(request), head, first, std::min(first + most, lanes)});
    }
    // Later rows see more keys: longest first.
    std::stable_sort(items.begin(), items.end(), [&](const ExtendItem& a, const ExtendItem& b) {
        const auto keys = [&](const ExtendItem& item) {
            return requests[item.request].first_position + item.last / args.heads.gqa_group_size;
        };
        return keys(a) > keys(b);
    });
    Pool& pool = Pool::instance();
    const auto turn = pool.lock();
    pool.reserve(isa.extend_scratch[exact](args.heads));
    pool.run(items.size(), [&](int64_t index, void* scratch) {
        isa.extend[exact](args, requests[items[index].request], items[index], scratch);
    });
}

}  // namespace hma
