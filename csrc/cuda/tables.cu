// Rotation by given tables, with transformers' roundings: this file is compiled without the fusion
// of products and sums.
#include "cuda/grid.h"
#include "table_pair.h"

namespace rope_fused::cuda {
namespace {

struct TablesCall {
  TableRotation rotation;
  Rows rows[2];
  int count;
  Grid grid;
};

template <class T, Access kAccess>
__global__ void __launch_bounds__(kMaxThreads, 1)
    tables_kernel(const __grid_constant__ TablesCall call) {
  using A = ComputeType<T>;
  using Lane = Column<T, kAccess>;
  const TableRotation& r = call.rotation;
  const int lanes = call.grid.columns.lanes;
  const int64_t group = threadIdx.x / lanes + int64_t{blockIdx.x} * (blockDim.x / lanes);
  const TokenAt token = token_at(group, call.grid.tokens, r.seqlen);
  const Lane column(call.grid.columns, threadIdx.x % lanes, token.live);

  // A table's row is read as if it were a head, whose rotated slice it is.
  const auto read = [&](const void* table, const int64_t* stride) {
    if (!column.rotated) return Values<T>{};
    const T* row = static_cast<const T*>(table) + token.b * stride[0] + token.t * stride[1];
    return Lane::unpack(column.read(row - r.offset * stride[2], stride[2]));
  };
  const Values<T> cos = read(r.cos, r.cos_stride), sin = read(r.sin, r.sin_stride);

  for (int n = 0; n < call.count; ++n) {
    const Rows& rows = call.rows[n];
    const T* x =
        static_cast<const T*>(rows.x) + token.b * rows.x_stride[0] + token.t * rows.x_stride[1];
    T* y = static_cast<T*>(rows.y) + token.b * rows.y_stride[0] + token.t * rows.y_stride[1];
    const HeadRange heads(rows.heads, call.grid.slices);
    for (int64_t h = heads.first; h < heads.last; h += kFlight<kAccess>) {
      Raw<T, kAccess> raw[kFlight<kAccess>];
#pragma unroll
      for (int u = 0; u < kFlight<kAccess>; ++u) {
        if (h + u < heads.last)
          raw[u] = column.read(x + (h + u) * rows.x_stride[2], rows.x_stride[3]);
      }
#pragma unroll
      for (int u = 0; u < kFlight<kAccess>; ++u) {
        if (h + u >= heads.last) break;
        if (column.rotated) {
          Values<T> value = Lane::unpack(raw[u]);
#pragma unroll
          for (int i = 0; i < kWidth<T>; ++i) {
            const Pair<A> turned = r.transpose
                                       ? table_pair<T, true>(value.a[i], value.b[i], cos.a[i],
                                                             cos.b[i], sin.a[i], sin.b[i])
                                       : table_pair<T, false>(value.a[i], value.b[i], cos.a[i],
                                                              cos.b[i], sin.a[i], sin.b[i]);
            value.a[i] = turned.a;
            value.b[i] = turned.b;
          }
          raw[u] = Lane::pack(value);
        }
        column.write(y + (h + u) * rows.y_stride[2], rows.y_stride[3], raw[u]);
      }
    }
  }
}

template <class T>
bool aligned_table(const void* data, const int64_t (&stride)[3]) {
  return aligned<T>(data, {stride[0], stride[1], 0, stride[2]});
}

template <class T>
void tables_typed(const TableRotation& r, const Rows* rows, int count, const Stream& stream) {
  const Operands operands = look_at<T>(rows, count);
  const bool vectors = operands.aligned && aligned_table<T>(r.cos, r.cos_stride) &&
                       aligned_table<T>(r.sin, r.sin_stride);
  TablesCall call{r, {}, count, make_grid<T>(r, vectors, !operands.in_place, operands.heads, true)};
  std::copy(rows, rows + count, call.rows);
  with_access<T>(call.grid, [&](auto access) {
    launch<tables_kernel<T, access.value>>(call.grid, call, stream);
  });
}

}  // namespace

void rotate_tables(const TableRotation& r, const Rows* rows, int count, const Stream& stream) {
  with_type(r.dtype, [&](auto zero) { tables_typed<decltype(zero)>(r, rows, count, stream); });
}

}  // namespace rope_fused::cuda
