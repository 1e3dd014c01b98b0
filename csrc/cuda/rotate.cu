// Forward kernel: RMSNorm (where there is a weight), rotation and factors of q and k, in one grid.
//
// A group of lanes takes a token: each lane finds the angles of its column once and reuses them for
// every head of q and k. The rest is one read and one write of each element.
#include "cuda/grid.h"

namespace rope_fused::cuda {
namespace {

struct RotateCall {
  Rotation rotation;
  Rows rows[2];
  int count;
  Grid grid;
};

template <class T, Access kAccess, bool kNorm>
struct RotateOperand {
  using A = ComputeType<T>;
  using Lane = Column<T, kAccess>;

  const Rotation& r;
  const Rows& rows;
  const Lane& column;
  const T* x;
  T* y;

  ROPE_FUSED_DEVICE RotateOperand(const Rotation& r, const Rows& rows, const Lane& column,
                                  const TokenAt& token)
      : r(r), rows(rows), column(column) {
    x = static_cast<const T*>(rows.x) + token.b * rows.x_stride[0] + token.t * rows.x_stride[1];
    y = static_cast<T*>(rows.y) + token.b * rows.y_stride[0] + token.t * rows.y_stride[1];
  }

  ROPE_FUSED_DEVICE void read(int64_t first, int64_t last,
                              Raw<T, kAccess> (&raw)[kFlight<kAccess>]) const {
#pragma unroll
    for (int i = 0; i < kFlight<kAccess>; ++i) {
      if (first + i < last)
        raw[i] = column.read(x + (first + i) * rows.x_stride[2], rows.x_stride[3]);
    }
  }

  ROPE_FUSED_DEVICE A rstd(A squares, int64_t heads) const {
    const A mean = squares / static_cast<A>(heads * r.head_dim);
    return A(1) / sqrt(mean + static_cast<A>(r.norm_eps));
  }

  ROPE_FUSED_DEVICE static A squares(const Raw<T, kAccess>& raw) {
    const Values<T> value = Lane::unpack(raw);
    A sum = 0;
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) sum += value.a[i] * value.a[i] + value.b[i] * value.b[i];
    return sum;
  }

  // 1 / RMS over all heads of the token.
  ROPE_FUSED_DEVICE A rstd_of_token(int lanes) const {
    A sum = 0;
    for (int64_t h = 0; h < rows.heads; h += kFlight<kAccess>) {
      Raw<T, kAccess> raw[kFlight<kAccess>]{};
      read(h, rows.heads, raw);
#pragma unroll
      for (int i = 0; i < kFlight<kAccess>; ++i) sum += squares(raw[i]);
    }
    return rstd(group_sum(sum, lanes), rows.heads);
  }

  ROPE_FUSED_DEVICE void finish(int64_t h, const Raw<T, kAccess>& raw, const Angles<T>& angles,
                                const Values<T>& weight, A rstd, bool scaled, A token_scale) const {
    T* to = y + h * rows.y_stride[2];
    if (!kNorm && !scaled && !column.rotated) {
      return column.write(to, rows.y_stride[3], raw);  // bit copies
    }
    Values<T> value = Lane::unpack(raw);
    if constexpr (kNorm) {
#pragma unroll
      for (int i = 0; i < kWidth<T>; ++i) {
        value.a[i] = value.a[i] * rstd * weight.a[i];
        value.b[i] = value.b[i] * rstd * weight.b[i];
      }
    }
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) {
      if (column.rotated) {
        const Pair<A> turned = ::rotate(value.a[i], value.b[i], angles.cos[i], angles.sin[i]);
        value.a[i] = turned.a;
        value.b[i] = turned.b;
      } else if (scaled) {
        value.a[i] *= token_scale;
        value.b[i] *= token_scale;
      }
    }
    column.write(to, rows.y_stride[3], Lane::pack(value));
  }
};

template <class T, Access kAccess, bool kNorm>
__global__ void __launch_bounds__(kMaxThreads, 1)
    rotate_kernel(const __grid_constant__ RotateCall call) {
  using A = ComputeType<T>;
  const Rotation& r = call.rotation;
  const int lanes = call.grid.columns.lanes;
  const int64_t group = threadIdx.x / lanes + int64_t{blockIdx.x} * (blockDim.x / lanes);
  const TokenAt token = token_at(group, call.grid.tokens, r.seqlen);
  const Column<T, kAccess> column(call.grid.columns, threadIdx.x % lanes, token.live);
  Angles<T> angles;
  find_angles(r, column, token, angles);
#pragma unroll
  for (int i = 0; i < kWidth<T>; ++i) {
    angles.cos[i] *= angles.scale[i];
    angles.sin[i] *= angles.scale[i];
  }

  // The last operand first: q, which alone is multiplied by the token's own factor, comes last.
  for (int n = call.count - 1; n >= 0; --n) {
    const Rows& rows = call.rows[n];
    const RotateOperand<T, kAccess, kNorm> operand(r, rows, column, token);
    const HeadRange heads(rows.heads, call.grid.slices);
    const bool scaled = rows.token_scaled && r.token_scale != nullptr;
    A token_scale = 1, rstd = 1;
    if (scaled && token.live) {
      token_scale = token_scale_of<A>(r, token);
#pragma unroll
      for (int i = 0; i < kWidth<T>; ++i) {
        angles.cos[i] *= token_scale;
        angles.sin[i] *= token_scale;
      }
    }
    Values<T> weight;
    if constexpr (kNorm) {
      if (r.norm_all) {
        rstd = operand.rstd_of_token(lanes);
      } else {
        read_weights(column, rows.norm, 0, weight);
      }
    }
    for (int64_t h = heads.first; h < heads.last; h += kFlight<kAccess>) {
      Raw<T, kAccess> raw[kFlight<kAccess>]{};
      operand.read(h, heads.last, raw);
      A sums[kFlight<kAccess>];
      if constexpr (kNorm) {
        if (!r.norm_all) {
#pragma unroll
          for (int i = 0; i < kFlight<kAccess>; ++i) {
            sums[i] = group_sum(RotateOperand<T, kAccess, kNorm>::squares(raw[i]), lanes);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kFlight<kAccess>; ++i) {
        if (h + i >= heads.last) break;
        if constexpr (kNorm) {
          if (r.norm_all) {
            read_weights(column, rows.norm, (h + i) * r.head_dim, weight);
          } else {
            rstd = operand.rstd(sums[i], 1);
          }
        }
        operand.finish(h + i, raw[i], angles, weight, rstd, scaled, token_scale);
      }
    }
  }
}

template <class T>
void rotate_typed(const Rotation& r, const Rows* rows, int count, const Stream& stream) {
  const Operands operands = look_at<T>(rows, count);
  const bool norm = rows[0].norm != nullptr;
  const bool rest = !operands.in_place || norm || r.token_scale != nullptr;
  // A norm over all heads reads heads that another slice of them may have overwritten by then.
  const bool over = std::any_of(rows, rows + count, [](const Rows& q) { return q.x == q.y; });
  const bool slice = !(norm && r.norm_all && over);
  RotateCall call{r, {}, count, make_grid<T>(r, operands.aligned, rest, operands.heads, slice)};
  std::copy(rows, rows + count, call.rows);
  with_access<T>(call.grid, [&](auto access) {
    if (norm) {
      launch<rotate_kernel<T, access.value, true>>(call.grid, call, stream);
    } else {
      launch<rotate_kernel<T, access.value, false>>(call.grid, call, stream);
    }
  });
}

}  // namespace

void rotate(const Rotation& r, const Rows* rows, int count, const Stream& stream) {
  // A norm of one operand alone is two launches; it does not occur in models.
  if (count == 2 && (rows[0].norm == nullptr) != (rows[1].norm == nullptr)) {
    rotate(r, rows, 1, stream);
    return rotate(r, rows + 1, 1, stream);
  }
  with_type(r.dtype, [&](auto zero) { rotate_typed<decltype(zero)>(r, rows, count, stream); });
}

}  // namespace rope_fused::cuda
