// The kernels' parameters as Python makes them: what rope_fused._cpu and rope_fused._cuda share.
// Raw addresses, strides and sizes; Python allocates every tensor and keeps it alive during the
// call.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "params.h"

namespace rope_fused {

namespace py = pybind11;

using Address = uintptr_t;  // 0 stands for "none"

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <size_t N>
void copy(const std::array<int64_t, N>& from, int64_t (&to)[N]) {
  std::copy(from.begin(), from.end(), to);
}

inline Rows make_rows(Address x, std::array<int64_t, 4> x_stride, Address y,
                      std::array<int64_t, 4> y_stride, int64_t heads, Address norm,
                      bool token_scaled) {
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

inline RowsBackward make_rows_backward(const Rows& grad, Address x, std::array<int64_t, 4> x_stride,
                                       Address norm_grad) {
  RowsBackward rows;
  rows.grad = grad;
  rows.x = at<const void>(x);
  copy(x_stride, rows.x_stride);
  rows.norm_grad = at<double>(norm_grad);
  return rows;
}

inline Rotation make_rotation(int dtype, std::array<int64_t, 3> shape, int64_t offset,
                              bool interleaved, bool conjugate, std::array<int64_t, 2> tables,
                              Address inv_freq, Address turns, Address scale, Address table_index,
                              std::array<int64_t, 2> table_index_stride, Address positions,
                              bool positions_int64, std::array<int64_t, 3> position_stride,
                              Address axis_map, Address token_scale,
                              std::array<int64_t, 2> token_scale_stride, double norm_eps,
                              bool norm_all, int threads) {
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
  r.inv_freq = at<const double>(inv_freq);
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

inline TableRotation make_table_rotation(int dtype, std::array<int64_t, 3> shape, int64_t pairs,
                                         int64_t offset, bool interleaved, bool transpose,
                                         Address cos, std::array<int64_t, 3> cos_stride,
                                         Address sin, std::array<int64_t, 3> sin_stride,
                                         int threads) {
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

// Local to a module: both may be loaded.
inline void bind_parameters(py::module_& m) {
  py::class_<Rows>(m, "Rows", py::module_local())
      .def(py::init(&make_rows), py::arg("x"), py::arg("x_stride"), py::arg("y"),
           py::arg("y_stride"), py::arg("heads"), py::arg("norm"), py::arg("token_scaled"));
  py::class_<RowsBackward>(m, "RowsBackward", py::module_local())
      .def(py::init(&make_rows_backward), py::arg("grad"), py::arg("x"), py::arg("x_stride"),
           py::arg("norm_grad"));
  py::class_<Rotation>(m, "Rotation", py::module_local())
      .def(py::init(&make_rotation), py::kw_only(), py::arg("dtype"), py::arg("shape"),
           py::arg("offset"), py::arg("interleaved"), py::arg("conjugate"), py::arg("tables"),
           py::arg("inv_freq"), py::arg("turns"), py::arg("scale"), py::arg("table_index"),
           py::arg("table_index_stride"), py::arg("positions"), py::arg("positions_int64"),
           py::arg("position_stride"), py::arg("axis_map"), py::arg("token_scale"),
           py::arg("token_scale_stride"), py::arg("norm_eps"), py::arg("norm_all"),
           py::arg("threads"));
  py::class_<TableRotation>(m, "TableRotation", py::module_local())
      .def(py::init(&make_table_rotation), py::kw_only(), py::arg("dtype"), py::arg("shape"),
           py::arg("pairs"), py::arg("offset"), py::arg("interleaved"), py::arg("transpose"),
           py::arg("cos"), py::arg("cos_stride"), py::arg("sin"), py::arg("sin_stride"),
           py::arg("threads"));
}

}  // namespace rope_fused
