// The CUDA kernel's schedule.cuh on one thread of the host, and what it has decided, warp by warp.
#include <hma/decode.cuh>
#include <hma/schedule.cuh>

using Decode = hma::Decode<HMA_QUERY, HMA_HEAD_DIM, HMA_V_HEAD_DIM, HMA_HEAD_TILES, HMA_WARPS,
                           HMA_STAGES>;
using Schedule = hma::Schedule<Decode::HEADS, HMA_V_HEAD_DIM, HMA_WARPS>;

struct Row {
  int32_t warp;
  hma::Segment segment;
};

extern "C" int hma_row_bytes() { return sizeof(Row); }
extern "C" int hma_shared_bytes() { return Decode::SHARED_BYTES; }

static int64_t units_of(const hma::DecodeParams& params) {
  return Decode::Space(params, HMA_WARPS).units;
}

extern "C" int64_t hma_workspace_bytes(const hma::DecodeParams* params) {
  return Decode::Space::bytes(int64_t(params->blocks) * HMA_WARPS, units_of(*params));
}

extern "C" void hma_divide(const hma::DecodeParams* params) { Schedule(*params).run(0, 1); }

// At most warps + units rows.
extern "C" int64_t hma_rows(const hma::DecodeParams* params, Row* rows) {
  const Decode::Space space(*params, HMA_WARPS);
  int64_t count = 0;
  for (int warp = 0; warp < space.warps; ++warp) {
    const hma::Span span = space.spans()[warp];
    for (int i = 0; i < span.count; ++i) {
      const hma::Segment segment = space.segments()[span.first + i];
      if (segment.tiles > 0) rows[count++] = {warp, segment};
    }
  }
  return count;
}
