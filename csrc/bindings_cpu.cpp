// rope_fused._cpu: raw addresses, strides and sizes in, kernels out. No torch headers, so one build
// serves every torch version. Python (rope_fused/native.py) allocates every tensor and keeps it
// alive during the call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/output_cache.h"

namespace py = pybind11;
using namespace rope_fused;

namespace {

using Address = uintptr_t;  // 0 stands for "none"

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <size_t N>
void copy(const std::array<int64_t, N>& from, int64_t (&to)[N]) {
  std::copy(from.begin(), from.end(), to);
}

Rows make_rows(Address x, std::array<int64_t, 4> x_stride, Address y,
               std::array<int64_t, 4> y_stride, int64_t heads, Address norm, bool token_scaled) {
  Rows rows;
  rows.x = at<const void>(x);
  rows.y = at<void>(y);
  copy(x_stride, rows.x_stride);
  copy(y_stride, rows.y_stride);
  rows.heads = heads;
  rows.norm = at<const void>(norm);
  rows.token_scaled = token_scaled;
  return rows;
}

RowsBackward make_rows_backward(const Rows& grad, Address x, std::array<int64_t, 4> x_stride,
                                Address norm_grad) {
  RowsBackward rows;
  rows.grad = grad;
  rows.x = at<const void>(x);
  copy(x_stride, rows.x_stride);
  rows.norm_grad = at<double>(norm_grad);
  return rows;
}

// Factors that are not finite would turn into plausible angles; a tensor on the CPU can be looked
// at.
void require_finite(const char* name, const double* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(values[i])) {
      throw py::value_error(std::string(name) + " must be finite, got " +
                            std::to_string(values[i]) + " at flat index " + std::to_string(i));
    }
  }
}

Rotation make_rotation(int dtype, std::array<int64_t, 3> shape, int64_t offset, bool interleaved,
                       bool conjugate, std::array<int64_t, 2> tables, Address inv_freq,
                       Address turns, Address scale, Address table_index,
                       std::array<int64_t, 2> table_index_stride, Address positions,
                       bool positions_int64, std::array<int64_t, 3> position_stride,
                       Address axis_map, Address token_scale,
                       std::array<int64_t, 2> token_scale_stride, double norm_eps, bool norm_all,
                       int threads) {
  require_finite("inv_freq", at<const double>(inv_freq), tables[0] * tables[1]);
  require_finite("attention_factor", at<const double>(scale), tables[0] * tables[1]);
  Rotation r;
  r.dtype = static_cast<DType>(dtype);
  r.batch = shape[0];
  r.seqlen = shape[1];
  r.head_dim = shape[2];
  r.tables = tables[0];
  r.pairs = tables[1];
  r.offset = offset;
  r.interleaved = interleaved;
  r.conjugate = conjugate;
  r.turns = at<const int64_t>(turns);
  r.scale = at<const double>(scale);
  r.table_index = at<const int32_t>(table_index);
  copy(table_index_stride, r.table_index_stride);
  r.positions = at<const void>(positions);
  r.positions_int64 = positions_int64;
  copy(position_stride, r.position_stride);
  r.axis_map = at<const int32_t>(axis_map);
  r.token_scale = at<const void>(token_scale);
  copy(token_scale_stride, r.token_scale_stride);
  r.norm_eps = norm_eps;
  r.norm_all = norm_all;
  r.threads = threads;
  return r;
}

TableRotation make_table_rotation(int dtype, std::array<int64_t, 3> shape, int64_t pairs,
                                  int64_t offset, bool interleaved, bool transpose, Address cos,
                                  std::array<int64_t, 3> cos_stride, Address sin,
                                  std::array<int64_t, 3> sin_stride, int threads) {
  TableRotation r;
  r.dtype = static_cast<DType>(dtype);
  r.batch = shape[0];
  r.seqlen = shape[1];
  r.head_dim = shape[2];
  r.pairs = pairs;
  r.offset = offset;
  r.interleaved = interleaved;
  r.transpose = transpose;
  r.cos = at<const void>(cos);
  r.sin = at<const void>(sin);
  copy(cos_stride, r.cos_stride);
  copy(sin_stride, r.sin_stride);
  r.threads = threads;
  return r;
}

#if defined(ROPE_FUSED_OUTPUT_CACHE)
// The memory of one output, for as long as a tensor refers to it.
class OutputBuffer {
 public:
  explicit OutputBuffer(size_t bytes) : bytes_(bytes), block_(cache().take(bytes)) {}
  ~OutputBuffer() { cache().give(block_); }
  OutputBuffer(const OutputBuffer&) = delete;
  OutputBuffer& operator=(const OutputBuffer&) = delete;

  py::buffer_info info() const {
    const auto size = static_cast<py::ssize_t>(bytes_);
    return {block_.data, 1, py::format_descriptor<uint8_t>::format(), size};
  }

 private:
  static OutputCache& cache() {
    static OutputCache& kept = *new OutputCache;  // outlives the last tensor
    return kept;
  }

  size_t bytes_;
  Block block_;
};
#endif

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() =
      "CPU kernels of rope_fused: raw addresses, no checks. Use rope_fused.apply_rope and "
      "qkv_rope.";
  m.attr("max_pairs") = kMaxPairs;
  m.attr("isa") = kernels().isa;
  m.attr("compiler") = __VERSION__;
#ifdef ROPE_FUSED_COMPILER_FLAGS
  m.attr("flags") = ROPE_FUSED_COMPILER_FLAGS;
#else
  m.attr("flags") = "";
#endif

  py::class_<Rows>(m, "Rows").def(py::init(&make_rows), py::arg("x"), py::arg("x_stride"),
                                  py::arg("y"), py::arg("y_stride"), py::arg("heads"),
                                  py::arg("norm"), py::arg("token_scaled"));
  py::class_<RowsBackward>(m, "RowsBackward")
      .def(py::init(&make_rows_backward), py::arg("grad"), py::arg("x"), py::arg("x_stride"),
           py::arg("norm_grad"));
  py::class_<Rotation>(m, "Rotation")
      .def(py::init(&make_rotation), py::kw_only(), py::arg("dtype"), py::arg("shape"),
           py::arg("offset"), py::arg("interleaved"), py::arg("conjugate"), py::arg("tables"),
           py::arg("inv_freq"), py::arg("turns"), py::arg("scale"), py::arg("table_index"),
           py::arg("table_index_stride"), py::arg("positions"), py::arg("positions_int64"),
           py::arg("position_stride"), py::arg("axis_map"), py::arg("token_scale"),
           py::arg("token_scale_stride"), py::arg("norm_eps"), py::arg("norm_all"),
           py::arg("threads"));
  py::class_<TableRotation>(m, "TableRotation")
      .def(py::init(&make_table_rotation), py::kw_only(), py::arg("dtype"), py::arg("shape"),
           py::arg("pairs"), py::arg("offset"), py::arg("interleaved"), py::arg("transpose"),
           py::arg("cos"), py::arg("cos_stride"), py::arg("sin"), py::arg("sin_stride"),
           py::arg("threads"));

#if defined(ROPE_FUSED_OUTPUT_CACHE)
  py::class_<OutputBuffer>(m, "OutputBuffer", py::buffer_protocol())
      .def(py::init<size_t>(), py::arg("bytes"))
      .def_buffer(&OutputBuffer::info);
#endif
  m.def(
      "rotate",
      [](const Rotation& rotation, const std::vector<Rows>& rows) {
        py::gil_scoped_release nogil;
        kernels().rotate(rotation, rows.data(), static_cast<int>(rows.size()));
      },
      py::arg("rotation"), py::arg("rows"));
  m.def(
      "rotate_backward",
      [](const Rotation& rotation, const std::vector<RowsBackward>& rows, int64_t chunks,
         Address inv_freq, Address scale, Address token_scale) {
        FactorGrads grads;
        grads.chunks = chunks;
        grads.inv_freq = at<double>(inv_freq);
        grads.scale = at<double>(scale);
        grads.token_scale = at<double>(token_scale);
        py::gil_scoped_release nogil;
        kernels().rotate_backward(rotation, rows.data(), static_cast<int>(rows.size()), grads);
      },
      py::arg("rotation"), py::arg("rows"), py::kw_only(), py::arg("chunks"), py::arg("inv_freq"),
      py::arg("scale"), py::arg("token_scale"));
  m.def(
      "rotate_tables",
      [](const TableRotation& rotation, const std::vector<Rows>& rows) {
        py::gil_scoped_release nogil;
        kernels().rotate_tables(rotation, rows.data(), static_cast<int>(rows.size()));
      },
      py::arg("rotation"), py::arg("rows"));
}
