// The Python module hma_kernels.cpu._ext. Tensors come as addresses, with strides in elements:
// their shapes and dtypes are checked in Python, which knows bfloat16. What can only be seen in
// their contents (page ids, row numbers) is checked here.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "attention.h"
#include "dispatch.h"
#include "pool.h"

namespace nb = nanobind;

namespace hma {
namespace {

using Address = uintptr_t;
using Int64s = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Words = nb::ndarray<const uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using WordsOut = nb::ndarray<uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using MatrixTuple = std::tuple<Address, int, int64_t, int64_t, int64_t, int64_t, int64_t>;
using QueryTuple = std::tuple<Address, int, int64_t, int64_t>;
using PagesTuple = std::tuple<Address, Address, int64_t, int64_t>;  // k, v, their page strides
using TableTuple = std::tuple<Int64s, Int64s, Int64s, int64_t>;     // indptr, indices, pos, pages

// Elements that one thread should have at least; less is done by the caller alone.
constexpr int64_t GRAIN = 1 << 14;

std::span<const int64_t> view(const Int64s& array) { return {array.data(), array.size()}; }

Matrix matrix(const MatrixTuple& x) {
    const auto& [data, type, outer, height, width, outer_stride, row_stride] = x;
    return {reinterpret_cast<void*>(data), Type(type), outer, height, width, outer_stride,
            row_stride};
}

Query query(const QueryTuple& x) {
    const auto& [data, type, row_stride, head_stride] = x;
    return {reinterpret_cast<const void*>(data), Type(type), row_stride, head_stride};
}

Pages pages(const PagesTuple& bfp8, const PagesTuple& bf16) {
    Pages result{};
    for (int format = 0; format < 2; format++) {
        const auto& [k, v, k_stride, v_stride] = format == BFP8 ? bfp8 : bf16;
        result.k[format] = reinterpret_cast<const uint8_t*>(k);
        result.v[format] = reinterpret_cast<const uint8_t*>(v);
        result.k_stride[format] = k_stride;
        result.v_stride[format] = v_stride;
    }
    return result;
}

// sinks: 0 for none
Softmax softmax(double scale, double logit_cap, Address sinks) {
    return {scale, logit_cap, reinterpret_cast<const float*>(sinks)};
}

PageList page_list(const TableTuple& table) {
    const auto& [indptr, indices, pos, count] = table;
    return {view(indptr), view(indices), view(pos), count};
}

// task(first, last) over 0..count, in parts of at least GRAIN elements.
template <class Task>
void split(int64_t count, int64_t elements_each, const Task& task) {
    Pool& pool = Pool::instance();
    const auto turn = pool.lock();
    const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, elements_each));
    const int64_t parts = std::min<int64_t>(4 * pool.threads(), (count + grain - 1) / grain);
    pool.run(parts, [&](int64_t part, void*) {
        task(count * part / parts, count * (part + 1) / parts);
    });
}

int64_t up(int64_t size) { return (size + TILE - 1) / TILE; }

void pack(const MatrixTuple& x, bool host, Address tiles) {
    const PackArgs args{matrix(x), host ? Rounding::host : Rounding::device,
                        reinterpret_cast<uint8_t*>(tiles)};
    const nb::gil_scoped_release release;
    split(args.x.outer * up(args.x.height), up(args.x.width) * TILE * TILE,
          [&](int64_t first, int64_t last) { kernels().pack(args, first, last); });
}

void unpack(Address tiles, const MatrixTuple& out) {
    const UnpackArgs args{reinterpret_cast<const uint8_t*>(tiles), matrix(out)};
    const nb::gil_scoped_release release;
    split(args.out.outer * up(args.out.height), args.out.width * TILE,
          [&](int64_t first, int64_t last) { kernels().unpack(args, first, last); });
}

void write_rows(Address x, int type, std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t> shape,
                Address pages, int64_t page_stride, int64_t page_count, const Int64s& page_ids,
                const Int64s& page_rows) {
    const auto& [rows, heads, width, row_stride, head_stride] = shape;
    for (int64_t i = 0; i < rows; i++) {
        const int64_t id = page_ids(i), row = page_rows(i);
        if (id < 0 || id >= page_count || row < 0 || row >= PAGE)
            throw nb::index_error(("page " + std::to_string(id) + " row " + std::to_string(row) +
                                   " is not in " + std::to_string(page_count) + " pages of 32 rows")
                                      .c_str());
    }
    const WriteRowsArgs args{reinterpret_cast<const void*>(x), Type(type), rows, heads, width,
                             row_stride, head_stride, page_ids.data(), page_rows.data(),
                             reinterpret_cast<uint8_t*>(pages), page_stride};
    const nb::gil_scoped_release release;
    split(rows, heads * width,
          [&](int64_t first, int64_t last) { kernels().write_rows(args, first, last); });
}

void round(const MatrixTuple& x, bool host, Address out) {
    const RoundArgs args{matrix(x), host ? Rounding::host : Rounding::device,
                         reinterpret_cast<void*>(out)};
    const nb::gil_scoped_release release;
    split(args.x.height, args.x.width,
          [&](int64_t first, int64_t last) { kernels().round(args, first, last); });
}

void extend_attention(std::tuple<int, int, int, int> heads, const PagesTuple& bfp8,
                      const PagesTuple& bf16, const TableTuple& bfp8_table,
                      const TableTuple& bf16_table, const Int64s& prefix, const Int64s& q_indptr,
                      const QueryTuple& q, const QueryTuple& k, const QueryTuple& v, double scale,
                      double logit_cap, Address sinks, int64_t window, bool exact, bool decode,
                      Address out) {
    const auto& [kv_heads, gqa_group_size, dim, v_dim] = heads;
    const ExtendArgs args{{kv_heads, gqa_group_size, dim, v_dim},
                          pages(bfp8, bf16),
                          query(q),
                          query(k),
                          query(v),
                          !decode,
                          window,
                          softmax(scale, logit_cap, sinks),
                          reinterpret_cast<void*>(out)};
    const PageList table[2] = {page_list(bfp8_table), page_list(bf16_table)};
    const nb::gil_scoped_release release;
    extend(args, table, view(prefix), view(q_indptr), exact);
}

// In the calling thread alone: it runs beside a forward pass, whose threads the pool's are.
void hash(const Int64s& addresses, int64_t length, const Words& keys, const Words& start,
          WordsOut& out) {
    const int64_t count = addresses.size();
    if (length < 64 || keys.size() != 18 * 8 || start.size() != 8 || int64_t(out.size()) != 8 * count)
        throw std::invalid_argument("hash: wrong sizes");
    const HashArgs args{addresses.data(), length, keys.data(), start.data(), out.data()};
    const nb::gil_scoped_release release;
    kernels().hash(args, 0, count);
}

void set_threads(int threads) {
    if (threads < 1) throw std::invalid_argument("threads is " + std::to_string(threads) + "; needs 1 or more");
    const nb::gil_scoped_release release;
    Pool::instance().resize(threads);
}

}  // namespace
}  // namespace hma

NB_MODULE(_ext, m) {
    using namespace hma;
    // A server that dies in the middle of a step still holds its plan.
    nb::set_leak_warnings(false);
    m.def("isa", [] { return std::string(kernels().name); });
    m.def("available_isas", available);
    m.def("set_isa", hma::select);
    m.def("threads", [] { return Pool::instance().threads(); });
    m.def("set_threads", set_threads);
    m.def("pack", pack);
    m.def("unpack", unpack);
    m.def("write_rows", write_rows);
    m.def("round", hma::round);
    m.def("hash", hma::hash);
    m.def("extend_attention", extend_attention);
    nb::class_<DecodePlan>(m, "DecodePlan")
        .def("__init__",
             [](DecodePlan* self, std::tuple<int, int, int, int> heads, const TableTuple& bfp8,
                const TableTuple& bf16, const Int64s& seq_lens, const Int64s& q_indptr,
                int64_t window) {
                 const auto& [kv_heads, gqa_group_size, dim, v_dim] = heads;
                 const PageList table[2] = {page_list(bfp8), page_list(bf16)};
                 new (self) DecodePlan({kv_heads, gqa_group_size, dim, v_dim}, table, view(seq_lens),
                                       view(q_indptr), window);
             })
        .def("run", [](const DecodePlan& self, const PagesTuple& bfp8, const PagesTuple& bf16,
                       const QueryTuple& q, double scale, double logit_cap, Address sinks,
                       Address out) {
            const nb::gil_scoped_release release;
            self.run(pages(bfp8, bf16), query(q), softmax(scale, logit_cap, sinks),
                     reinterpret_cast<void*>(out));
        });
}
