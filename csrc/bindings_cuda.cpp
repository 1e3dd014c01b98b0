// rope_fused._cuda: raw addresses, strides, sizes and a stream in, launches out. No torch headers;
// loading it does not touch the driver.
#include <vector>

#include "bindings.h"
#include "cuda/kernels.h"

using namespace rope_fused;

PYBIND11_MODULE(_cuda, m) {
  m.doc() =
      "CUDA kernels of rope_fused: raw addresses, no checks. Use rope_fused.apply_rope and "
      "qkv_rope.";
  m.attr("max_pairs") = cuda::kMaxPairs;
  m.attr("max_head_dim") = cuda::kMaxHeadDim;
  m.attr("architectures") = ROPE_FUSED_CUDA_ARCHITECTURES;
  m.attr("compiler") = ROPE_FUSED_CUDA_COMPILER;
  bind_parameters(m);

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
}
