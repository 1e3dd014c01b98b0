// rope_fused._cpu: raw addresses, strides and sizes in, kernels out. No torch headers, so one build
// serves every torch version. Python (rope_fused/native.py) allocates every tensor and keeps it
// alive during the call.
#include <cmath>
#include <string>
#include <vector>

#include "bindings.h"
#include "cpu/kernels.h"
#include "cpu/output_cache.h"

using namespace rope_fused;

namespace {

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

void require_finite(const Rotation& rotation) {
  const int64_t count = rotation.tables * rotation.pairs;
  require_finite("inv_freq", rotation.inv_freq, count);
  require_finite("attention_factor", rotation.scale, count);
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
  // Why rope_fused._cuda was left out, or nothing.
#ifdef ROPE_FUSED_WITHOUT_CUDA
  m.attr("without_cuda") = ROPE_FUSED_WITHOUT_CUDA;
#else
  m.attr("without_cuda") = "";
#endif
  m.attr("compiler") = __VERSION__;
#ifdef ROPE_FUSED_COMPILER_FLAGS
  m.attr("flags") = ROPE_FUSED_COMPILER_FLAGS;
#else
  m.attr("flags") = "";
#endif

  bind_parameters(m);
#if defined(ROPE_FUSED_OUTPUT_CACHE)
  py::class_<OutputBuffer>(m, "OutputBuffer", py::buffer_protocol())
      .def(py::init<size_t>(), py::arg("bytes"))
      .def_buffer(&OutputBuffer::info);
#endif
  m.def(
      "rotate",
      [](const Rotation& rotation, const std::vector<Rows>& rows, bool large) {
        require_finite(rotation);
        py::gil_scoped_release nogil;
        kernels().rotate(rotation, rows.data(), static_cast<int>(rows.size()), large);
      },
      py::arg("rotation"), py::arg("rows"), py::arg("large"));
  m.def(
      "rotate_backward",
      [](const Rotation& rotation, const std::vector<RowsBackward>& rows, int64_t chunks,
         Address inv_freq, Address scale, Address token_scale) {
        require_finite(rotation);
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
