// Plain structs: the only contract between the bindings and the kernels. Strides are in elements.
#pragma once

#include <cstdint>

namespace rope_fused {

enum class DType : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// One of q, k, v seen as [batch, seqlen, heads, head_dim]. `norm` is an RMSNorm weight in the
// compute type (float, or double for float64 tensors), [head_dim] or [heads * head_dim]; null: not
// normed.
struct Rows {
  const void* x = nullptr;
  void* y = nullptr;
  int64_t x_stride[4] = {};
  int64_t y_stride[4] = {};
  int64_t heads = 0;
  const void* norm = nullptr;
  bool token_scaled = false;  // multiplied by Rotation::token_scale
};

// What q and k share: geometry, pairing and the angle of every token.
struct Rotation {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, seqlen = 0, head_dim = 0;
  int64_t pairs = 0, offset = 0;  // the rotated slice is [offset, offset + 2 * pairs)
  bool interleaved = false, conjugate = false;

  const double* inv_freq = nullptr;  // [tables, pairs]; only looked at
  const int64_t* turns = nullptr;    // [tables, pairs], bits of the uint64 fixed-point frequency
  const double* scale = nullptr;     // [tables, pairs], attention factor
  int64_t tables = 1;
  const int32_t* table_index = nullptr;  // row of the tables per token; null: row 0
  int64_t table_index_stride[2] = {};    // batch, token

  const void* positions = nullptr;  // null: 0 .. seqlen - 1
  bool positions_int64 = false;
  int64_t position_stride[3] = {};    // axis, batch, token
  const int32_t* axis_map = nullptr;  // [pairs], the position axis of each pair; null: one axis
  int64_t axes = 1;

  const void* token_scale = nullptr;  // compute type, per token; null: 1
  int64_t token_scale_stride[2] = {};

  double norm_eps = 0;
  bool norm_all = false;  // one RMS over all heads of a token rather than one per head
  int threads = 1;
};

// Backward of one of q, k: dy -> dx, given the input x when it was normed or a factor needs its
// gradient.
struct RowsBackward {
  Rows grad;                // x: incoming gradient, y: outgoing gradient
  const void* x = nullptr;  // what the forward was given
  int64_t x_stride[4] = {};
  double* norm_grad = nullptr;  // [chunks, norm size], or null
};

// Reductions. Partial sums are kept per chunk of tokens, so they do not depend on the number of
// threads.
struct FactorGrads {
  int64_t chunks = 0;
  double* inv_freq = nullptr;     // [chunks, tables, pairs], or null
  double* scale = nullptr;        // [chunks, tables, pairs], or null
  double* token_scale = nullptr;  // [batch, seqlen], or null
};

// The transformers formula on given tables: y = x * cos + rotate_half(x) * sin, every product and
// sum rounded to the tensors' own type. `transpose` applies the adjoint.
struct TableRotation {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, seqlen = 0, head_dim = 0;
  int64_t pairs = 0, offset = 0;
  bool interleaved = false, transpose = false;
  const void* cos = nullptr;  // [batch, seqlen, 2 * pairs]
  const void* sin = nullptr;
  int64_t cos_stride[3] = {};
  int64_t sin_stride[3] = {};
  int threads = 1;
};

// One of q, k, v of a projection: y = x weight^T + bias, of which q and k are then normed and
// rotated. Rows (of heads * head_dim numbers, those of the weight of d_model) lie `step` elements
// apart.
struct ProjectedRows {
  const void* weight = nullptr;
  int64_t weight_step = 0;
  const void* bias = nullptr;  // null: none
  const void* norm = nullptr;  // as in Rows, of one head
  void* y = nullptr;
  int64_t y_step = 0;
  void* kept = nullptr;  // gets the projection itself; null: nobody wants it
  int64_t kept_step = 0;
  int64_t heads = 0;  // 0: there is no such operand
};

struct Projection {
  const void* x = nullptr;  // [tokens, d_model]
  int64_t x_step = 0;
  int64_t tokens = 0, d_model = 0;
  ProjectedRows rows[3];  // q, k, v
};

}  // namespace rope_fused
