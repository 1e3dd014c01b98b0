// Backward kernels with reductions: RMSNorm before the rotation, gradients of the factors. A
// backward that needs neither is the forward kernel with the conjugate angle; csrc/cpu/backward.h
// has the formulas.
//
// No atomics, so that every run gives the same bits. The first kernel turns the gradients back and
// leaves the sums over the heads of each token; the second adds those up over tokens, in float64,
// chunk by chunk. Both work on a tile of tokens, whose sums stay in the L2 cache in between.
#include "cuda/grid.h"

namespace rope_fused::cuda {
namespace {

// The sums of a token: [cross of each pair | dot of each pair | norm of q | norm of k].
struct SumsOf {
  int64_t pairs, norm[2], width;  // `norm`: where the gradient of the norm weight of q, of k begins

  SumsOf(const Rotation& r, const RowsBackward* rows, int count) : pairs(r.pairs), norm{}, width() {
    width = 2 * pairs;
    for (int n = 0; n < count; ++n) {
      norm[n] = width;
      const Rows& grad = rows[n].grad;
      if (grad.norm != nullptr) width += r.head_dim * (r.norm_all ? grad.heads : 1);
    }
  }
};

struct BackwardCall {
  Rotation rotation;
  RowsBackward rows[2];
  int64_t norm[2];  // as in SumsOf
  int count;
  bool add;  // to the sums that an earlier launch has left
  Grid grid;
  int64_t first, last;  // tokens of the tile
  void* sums;           // [tile, width], compute type
  int64_t width;
  double* token_scale;  // [tokens]
};

template <class T, Access kAccess, bool kNorm>
struct BackwardOperand {
  using A = ComputeType<T>;
  using Lane = Column<T, kAccess>;

  const Rotation& r;
  const RowsBackward& rows;
  const Lane& column;
  const Angles<T>& angles;
  const T *g, *x;
  T* dx;
  A token_scale;

  ROPE_FUSED_DEVICE BackwardOperand(const Rotation& r, const RowsBackward& rows, const Lane& column,
                                    const TokenAt& token, const Angles<T>& angles)
      : r(r), rows(rows), column(column), angles(angles), token_scale(1) {
    const Rows& grad = rows.grad;
    g = static_cast<const T*>(grad.x) + token.b * grad.x_stride[0] + token.t * grad.x_stride[1];
    dx = static_cast<T*>(grad.y) + token.b * grad.y_stride[0] + token.t * grad.y_stride[1];
    x = static_cast<const T*>(rows.x) + token.b * rows.x_stride[0] + token.t * rows.x_stride[1];
    if (scaled() && token.live) token_scale = token_scale_of<A>(r, token);
  }

  ROPE_FUSED_DEVICE bool scaled() const {
    return rows.grad.token_scaled && r.token_scale != nullptr;
  }

  ROPE_FUSED_DEVICE Raw<T, kAccess> read_g(int64_t h) const {
    return column.read(g + h * rows.grad.x_stride[2], rows.grad.x_stride[3]);
  }
  ROPE_FUSED_DEVICE Raw<T, kAccess> read_x(int64_t h) const {
    return column.read(x + h * rows.x_stride[2], rows.x_stride[3]);
  }

  // The gradient of what was rotated.
  ROPE_FUSED_DEVICE Values<T> turned_back(const Values<T>& g) const {
    Values<T> dh;
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) {
      if (column.rotated) {
        const A factor = angles.scale[i] * token_scale;
        const Pair<A> back =
            ::rotate(g.a[i], g.b[i], factor * angles.cos[i], -factor * angles.sin[i]);
        dh.a[i] = back.a;
        dh.b[i] = back.b;
      } else {
        dh.a[i] = g.a[i] * token_scale;
        dh.b[i] = g.b[i] * token_scale;
      }
    }
    return dh;
  }

  // sum x^2 and sum dh w x of one head's column.
  ROPE_FUSED_DEVICE static void norm_sums(const Values<T>& x, const Values<T>& dh,
                                          const Values<T>& weight, A& squares, A& inner) {
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) {
      squares += x.a[i] * x.a[i] + x.b[i] * x.b[i];
      inner += dh.a[i] * weight.a[i] * x.a[i] + dh.b[i] * weight.b[i] * x.b[i];
    }
  }
};

template <class T, Access kAccess, bool kNorm>
__global__ void __launch_bounds__(kMaxThreads, 1)
    backward_kernel(const __grid_constant__ BackwardCall call) {
  using A = ComputeType<T>;
  using Operand = BackwardOperand<T, kAccess, kNorm>;
  using Lane = Column<T, kAccess>;
  constexpr int kCount = kWidth<T>;
  const Rotation& r = call.rotation;
  const int lanes = call.grid.columns.lanes;
  const int64_t group = threadIdx.x / lanes + int64_t{blockIdx.x} * (blockDim.x / lanes);
  const TokenAt token = token_at(call.first + group, call.last, r.seqlen);
  const Lane column(call.grid.columns, threadIdx.x % lanes, token.live);
  A* sums = static_cast<A*>(call.sums) + group * call.width;
  Angles<T> angles;
  find_angles(r, column, token, angles);

  for (int n = call.count - 1; n >= 0; --n) {
    const RowsBackward& rows = call.rows[n];
    const int64_t heads = rows.grad.heads;
    const Operand operand(r, rows, column, token, angles);
    A dot[kCount]{}, cross[kCount]{};
    A carried = 0, rstd = 1, mean = 0;
    Values<T> weight, weight_grad{};
    const auto statistics = [&](A squares, A inner, int64_t count) {
      squares = group_sum(squares, lanes);
      inner = group_sum(inner, lanes);
      const A size = static_cast<A>(count * r.head_dim);
      rstd = A(1) / sqrt(squares / size + static_cast<A>(r.norm_eps));
      mean = rstd * inner / size;
    };
    if constexpr (kNorm) {
      if (r.norm_all) {
        A squares = 0, inner = 0;
#pragma unroll 1
        for (int64_t h = 0; h < heads; ++h) {
          read_weights(column, rows.grad.norm, h * r.head_dim, weight);
          Operand::norm_sums(Lane::unpack(operand.read_x(h)),
                             operand.turned_back(Lane::unpack(operand.read_g(h))), weight, squares,
                             inner);
        }
        statistics(squares, inner, heads);
      } else {
        read_weights(column, rows.grad.norm, 0, weight);
      }
    }
#pragma unroll 1
    for (int64_t h = 0; h < heads; ++h) {
      const Raw<T, kAccess> raw_g = operand.read_g(h), raw_x = operand.read_x(h);
      const Values<T> g = Lane::unpack(raw_g), x = Lane::unpack(raw_x);
      Values<T> dh = operand.turned_back(g);
      if constexpr (kNorm) {
        if (r.norm_all) {
          read_weights(column, rows.grad.norm, h * r.head_dim, weight);
        } else {
          A squares = 0, inner = 0;
          Operand::norm_sums(x, dh, weight, squares, inner);
          statistics(squares, inner, 1);
        }
      }
      Values<T> grads;  // of the norm weight, by this head
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const A n_a = x.a[i] * rstd, n_b = x.b[i] * rstd;
        const A h_a = kNorm ? n_a * weight.a[i] : n_a, h_b = kNorm ? n_b * weight.b[i] : n_b;
        if (column.rotated) {
          const Pair<A> turned = ::rotate(h_a, h_b, angles.cos[i], angles.sin[i]);
          dot[i] += g.a[i] * turned.a + g.b[i] * turned.b;
          cross[i] += g.b[i] * turned.a - g.a[i] * turned.b;
        } else {
          carried += g.a[i] * h_a + g.b[i] * h_b;
        }
        if constexpr (kNorm) {
          grads.a[i] = dh.a[i] * n_a;
          grads.b[i] = dh.b[i] * n_b;
          dh.a[i] = rstd * (dh.a[i] * weight.a[i] - n_a * mean);
          dh.b[i] = rstd * (dh.b[i] * weight.b[i] - n_b * mean);
        }
      }
      const bool copied = !kNorm && !column.rotated && !operand.scaled();
      column.write(operand.dx + h * rows.grad.y_stride[2], rows.grad.y_stride[3],
                   copied ? raw_g : Lane::pack(dh));
      if constexpr (kNorm) {
        A* to = sums + call.norm[n] + (r.norm_all ? h * r.head_dim : 0);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          weight_grad.a[i] = r.norm_all ? grads.a[i] : weight_grad.a[i] + grads.a[i];
          weight_grad.b[i] = r.norm_all ? grads.b[i] : weight_grad.b[i] + grads.b[i];
          if (r.norm_all || h == heads - 1) {
            if (column.has_a(i)) to[column.dim_a(i)] = weight_grad.a[i];
            if (column.has_b(i)) to[column.dim_b(i)] = weight_grad.b[i];
          }
        }
      }
    }

    A total = carried;
    const bool add = call.add || n < call.count - 1;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!column.rotated || !column.has_a(i)) continue;
      A* of_cross = sums + column.pair(i);
      A* of_dot = of_cross + r.pairs;
      *of_cross = (add ? *of_cross : A(0)) + operand.token_scale * cross[i];
      *of_dot = (add ? *of_dot : A(0)) + operand.token_scale * dot[i];
      total += angles.scale[i] * dot[i];
    }
    if (operand.scaled()) {
      total = group_sum(total, lanes);
      if (token.live && threadIdx.x % lanes == 0) call.token_scale[token.index] = total;
    }
  }
}

struct FoldCall {
  Rotation rotation;
  int64_t first, last;
  const void* sums;
  int64_t width, chunks;
  double* partial;  // [chunks, tables * pairs of inv_freq | tables * pairs of scale | norms]
};

// Thread (chunk, c) adds column c of the sums up over the tokens of its chunk.
template <class A>
__global__ void __launch_bounds__(kThreads) fold_kernel(const __grid_constant__ FoldCall call) {
  const Rotation& r = call.rotation;
  const int64_t c = threadIdx.x + int64_t{blockIdx.x} * kThreads, chunk = blockIdx.y;
  if (c >= call.width) return;
  const int64_t tokens = call.last - call.first, tables = r.tables * r.pairs;
  const int64_t first = tokens * chunk / call.chunks, last = tokens * (chunk + 1) / call.chunks;
  double* partial = call.partial + chunk * (call.width + 2 * (tables - r.pairs));
  const bool cross = c < r.pairs, of_pair = c < 2 * r.pairs;
  const int64_t j = cross ? c : c - r.pairs;
  const int64_t axis = cross && r.axis_map != nullptr ? r.axis_map[j] : 0;
  const auto flush = [&](int64_t row, double sum) {
    int64_t at = c + 2 * (tables - r.pairs);
    if (of_pair) at = (cross ? 0 : tables) + row * r.pairs + j;
    partial[at] += sum;
  };
  int64_t row = 0;
  double sum = 0;
#pragma unroll 4
  for (int64_t n = first; n < last; ++n) {
    const TokenAt token = token_at(call.first + n, call.last, r.seqlen);
    double value = static_cast<const A*>(call.sums)[n * call.width + c];
    if (of_pair && r.tables > 1) {
      const int64_t own = table_row(r, token);
      if (own != row) {
        flush(row, sum);
        row = own;
        sum = 0;
      }
    }
    if (cross) {
      const double position = static_cast<double>(position_of(r, axis, token));
      value *= (r.conjugate ? -position : position) * r.scale[row * r.pairs + j];
    }
    sum += value;
  }
  flush(row, sum);
}

template <class T>
void backward_typed(const Rotation& r, const RowsBackward* rows, int count, const Sums& sums,
                    const Stream& stream) {
  const SumsOf layout(r, rows, count);
  bool vectors = true;
  for (int n = 0; n < count; ++n) {
    vectors = vectors && aligned<T>(rows[n].grad) && aligned<T>(rows[n].x, rows[n].x_stride);
  }
  Grid grid = make_grid<T>(r, vectors, true, 1, false);
  const int64_t tokens = grid.tokens;

  const auto turn_back = [&](int from, int operands, bool add, int64_t first, int64_t last) {
    BackwardCall call{r,
                      {},
                      {},
                      operands,
                      add,
                      grid,
                      first,
                      last,
                      sums.per_token,
                      layout.width,
                      sums.token_scale};
    for (int n = 0; n < operands; ++n) {
      call.rows[n] = rows[from + n];
      call.norm[n] = layout.norm[from + n];
    }
    with_access<T>(grid, [&](auto access) {
      if (call.rows[0].grad.norm != nullptr) {
        launch<backward_kernel<T, access.value, true>>(call.grid, call, stream);
      } else {
        launch<backward_kernel<T, access.value, false>>(call.grid, call, stream);
      }
    });
  };

  for (int64_t first = 0; first < tokens; first += sums.tile) {
    const int64_t last = std::min(tokens, first + sums.tile);
    grid.tokens = last - first;
    if (count == 2 && (rows[0].grad.norm == nullptr) != (rows[1].grad.norm == nullptr)) {
      turn_back(1, 1, false, first, last);
      turn_back(0, 1, true, first, last);
    } else {
      turn_back(0, count, false, first, last);
    }
    const FoldCall fold{r, first, last, sums.per_token, layout.width, sums.chunks, sums.partial};
    const dim3 blocks(static_cast<unsigned>((layout.width + kThreads - 1) / kThreads),
                      static_cast<unsigned>(sums.chunks));
    launch<fold_kernel<ComputeType<T>>>(blocks, kThreads, fold, stream);
  }
}

}  // namespace

void rotate_backward(const Rotation& r, const RowsBackward* rows, int count, const Sums& sums,
                     const Stream& stream) {
  with_type(r.dtype,
            [&](auto zero) { backward_typed<decltype(zero)>(r, rows, count, sums, stream); });
}

}  // namespace rope_fused::cuda
