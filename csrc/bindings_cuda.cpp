// rope_fused._cuda: raw addresses, strides, sizes and a stream in, launches out. No torch headers;
// loading it does not touch the driver.
#include <vector>

#include "bindings.h"
#include "cuda/kernels.h"

using namespace rope_fused;

static ProjectedRows make_projected_rows(Address weight, int64_t weight_step, Address bias,
                                         Address norm, Address y, int64_t y_step, Address kept,
                                         int64_t kept_step, int64_t heads) {
  ProjectedRows rows;
  rows.weight = at<const void>(weight);
  rows.weight_step = weight_step;
  rows.bias = at<const void>(bias);
  rows.norm = at<const void>(norm);
  rows.y = at<void>(y);
  rows.y_step = y_step;
  rows.kept = at<void>(kept);
  rows.kept_step = kept_step;
  rows.heads = heads;
  return rows;
}

PYBIND11_MODULE(_cuda, m) {
  m.doc() =
      "CUDA kernels of rope_fused: raw addresses, no checks. Use rope_fused.apply_rope and "
      "qkv_rope.";
  m.attr("max_pairs") = cuda::kMaxPairs;
  m.attr("max_head_dim") = cuda::kMaxHeadDim;
  m.attr("architectures") = ROPE_FUSED_CUDA_ARCHITECTURES;
  m.attr("compiler") = ROPE_FUSED_CUDA_COMPILER;
  m.attr("projected_head_dims") =
      std::vector<int>(std::begin(cuda::kProjectedHeadDims), std::end(cuda::kProjectedHeadDims));
  bind_parameters(m);
  py::class_<ProjectedRows>(m, "ProjectedRows", py::module_local())
      .def(py::init(&make_projected_rows), py::kw_only(), py::arg("weight"), py::arg("weight_step"),
           py::arg("bias"), py::arg("norm"), py::arg("y"), py::arg("y_step"), py::arg("kept"),
           py::arg("kept_step"), py::arg("heads"));

  m.def(
      "rotate",
      [](const Rotation& rotation, const std::vector<Rows>& rows, int device, Address stream) {
        py::gil_scoped_release nogil;
        cuda::rotate(rotation, rows.data(), static_cast<int>(rows.size()),
                     {device, at<void>(stream)});
      },
      py::arg("rotation"), py::arg("rows"), py::kw_only(), py::arg("device"), py::arg("stream"));
  m.def(
      "rotate_backward",
      [](const Rotation& rotation, const std::vector<RowsBackward>& rows, Address per_token,
         int64_t tile, Address partial, int64_t chunks, Address token_scale, int device,
         Address stream) {
        py::gil_scoped_release nogil;
        cuda::rotate_backward(
            rotation, rows.data(), static_cast<int>(rows.size()),
            {at<void>(per_token), tile, at<double>(partial), chunks, at<double>(token_scale)},
            {device, at<void>(stream)});
      },
      py::arg("rotation"), py::arg("rows"), py::kw_only(), py::arg("per_token"), py::arg("tile"),
      py::arg("partial"), py::arg("chunks"), py::arg("token_scale"), py::arg("device"),
      py::arg("stream"));
  m.def(
      "rotate_tables",
      [](const TableRotation& rotation, const std::vector<Rows>& rows, int device, Address stream) {
        py::gil_scoped_release nogil;
        cuda::rotate_tables(rotation, rows.data(), static_cast<int>(rows.size()),
                            {device, at<void>(stream)});
      },
      py::arg("rotation"), py::arg("rows"), py::kw_only(), py::arg("device"), py::arg("stream"));
  m.def(
      "project",
      [](const Rotation& rotation, const std::vector<ProjectedRows>& rows, Address x,
         int64_t x_step, int64_t tokens, int64_t d_model, int device, Address stream) {
        py::gil_scoped_release nogil;
        Projection projection{at<const void>(x), x_step, tokens, d_model, {}};
        std::copy_n(rows.begin(), std::min<size_t>(3, rows.size()), projection.rows);
        cuda::project(projection, rotation, {device, at<void>(stream)});
      },
      py::arg("rotation"), py::arg("rows"), py::kw_only(), py::arg("x"), py::arg("x_step"),
      py::arg("tokens"), py::arg("d_model"), py::arg("device"), py::arg("stream"));
}
