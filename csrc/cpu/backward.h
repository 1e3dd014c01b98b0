// Backward kernel with reductions: RMSNorm before the rotation, gradients of the factors. A
// backward that needs neither is the forward kernel with the conjugate angle.
//
//   h = x rstd w (or x), r = R(t) h, y = token_scale scale_j r, gradient g of y:
//   dh         = token_scale scale_j R(-t) g
//   d inv_freq = sum position token_scale scale_j (g_b r_a - g_a r_b)       (negated for the
//   conjugate) d scale    = sum token_scale (g_a r_a + g_b r_b) d token    = sum scale_j (g_a r_a +
//   g_b r_b), plus g h over the dimensions that are not rotated dx         = rstd (w dh - n mean(dh
//   h)),  n = x rstd;   dw = sum dh n
//
// mean(dh h) needs no division by w, because dh h summed over a pair is token_scale scale_j (g .
// r). Sums over tokens go to double partials, one per chunk of tokens, chunks counted by size
// alone.
#pragma once

#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "rotate.h"

namespace ROPE_FUSED_ISA {

using rope_fused::FactorGrads;
using rope_fused::Rows;
using rope_fused::RowsBackward;

// The angles of one token, without and with its factors.
template <class A>
struct Token {
  alignas(64) A cos[kMaxPairs], sin[kMaxPairs], scale[kMaxPairs];
  A token_scale;
};

// g . r and g x r of each pair of one operand, summed over its heads.
struct PairSums {
  alignas(64) double dot[kMaxPairs], cross[kMaxPairs];
  double carried;  // g . h over the dimensions that are not rotated
};

template <class T, bool kInterleaved, bool kUnit, bool kNorm, class A = typename Compute<T>::type>
struct Head {
  const Rotation& r;
  const Token<A>& token;
  const T *g, *x;
  T* dx;
  Slots<kUnit> at_g, at_x, at_dx;
  const A* weight;
  A rstd;

  INLINE_MEMBER A input(int64_t d) const {
    const A value = load(x[at_x(d)]);
    if constexpr (kNorm) return value * rstd * weight[d];
    return value;
  }

  // Adds this head to the sums; returns token_scale * sum of scale_j (g . r), which is sum of dh h.
  INLINE_MEMBER double reduce(PairSums& sums) const {
    double total = 0, carried = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < r.pairs; ++j) {
      const int64_t ia = r.offset + (kInterleaved ? 2 * j : j);
      const int64_t ib = r.offset + (kInterleaved ? 2 * j + 1 : j + r.pairs);
      const Pair<A> turned = rotate(input(ia), input(ib), token.cos[j], token.sin[j]);
      const double ga = load(g[at_g(ia)]), gb = load(g[at_g(ib)]);
      const double dot = ga * turned.a + gb * turned.b;
      sums.dot[j] += dot;
      sums.cross[j] += gb * turned.a - ga * turned.b;
      total += dot * static_cast<double>(token.scale[j]);
    }
    for (int64_t d = 0; d < r.offset; ++d)
      carried += static_cast<double>(load(g[at_g(d)])) * input(d);
    for (int64_t d = r.offset + 2 * r.pairs; d < r.head_dim; ++d) {
      carried += static_cast<double>(load(g[at_g(d)])) * input(d);
    }
    sums.carried += carried;
    return (total + carried) * static_cast<double>(token.token_scale);
  }

  INLINE_MEMBER void write(int64_t d, A dh, A mean, double* weight_grad) const {
    if constexpr (kNorm) {
      const A n = load(x[at_x(d)]) * rstd;
      if (weight_grad != nullptr) weight_grad[d] += static_cast<double>(dh) * n;
      store(dx[at_dx(d)], rstd * (dh * weight[d] - n * mean));
    } else {
      store(dx[at_dx(d)], dh);
    }
  }

  // Turns the gradient back and, when normed, through the norm; `mean` is that of dh h over the
  // normed group.
  INLINE_MEMBER void finish(A mean, double* weight_grad) const {
    VECTORIZE
    for (int64_t j = 0; j < r.pairs; ++j) {
      const int64_t ia = r.offset + (kInterleaved ? 2 * j : j);
      const int64_t ib = r.offset + (kInterleaved ? 2 * j + 1 : j + r.pairs);
      const A factor = token.scale[j] * token.token_scale;
      const Pair<A> dh = rotate<A>(load(g[at_g(ia)]), load(g[at_g(ib)]), factor * token.cos[j],
                                   -factor * token.sin[j]);
      write(ia, dh.a, mean, weight_grad);
      write(ib, dh.b, mean, weight_grad);
    }
    const auto carry = [&](int64_t from, int64_t to) {
      for (int64_t d = from; d < to; ++d) {
        if (!kNorm && token.token_scale == A(1)) {
          dx[at_dx(d)] = g[at_g(d)];
        } else {
          write(d, load(g[at_g(d)]) * token.token_scale, mean, weight_grad);
        }
      }
    };
    carry(0, r.offset);
    carry(r.offset + 2 * r.pairs, r.head_dim);
  }
};

template <class T, bool kInterleaved, bool kUnit, bool kNorm, class A = typename Compute<T>::type>
void backward_token(const Rotation& r, const RowsBackward& q, const Token<A>& token, int64_t b,
                    int64_t t, double* weight_grad, PairSums* sums) {
  const auto offset = [&](const int64_t* stride) { return b * stride[0] + t * stride[1]; };
  const T* g = static_cast<const T*>(q.grad.x) + offset(q.grad.x_stride);
  const T* x = static_cast<const T*>(q.x) + offset(q.x_stride);
  T* dx = static_cast<T*>(q.grad.y) + offset(q.grad.y_stride);
  const A* weight = static_cast<const A*>(q.grad.norm);
  const int64_t group = kNorm && r.norm_all ? q.grad.heads : 1;
  for (int64_t first = 0; first < q.grad.heads; first += group) {
    const A rstd =
        kNorm ? rstd_of<T, kUnit>(r, x + first * q.x_stride[2], q.x_stride[2], q.x_stride[3], group)
              : A(1);
    const auto head = [&](int64_t h) {
      const int64_t column = r.norm_all ? h * r.head_dim : 0;
      return Head<T, kInterleaved, kUnit, kNorm>{r,
                                                 token,
                                                 g + h * q.grad.x_stride[2],
                                                 x + h * q.x_stride[2],
                                                 dx + h * q.grad.y_stride[2],
                                                 {q.grad.x_stride[3]},
                                                 {q.x_stride[3]},
                                                 {q.grad.y_stride[3]},
                                                 kNorm ? weight + column : nullptr,
                                                 rstd};
    };
    double total = 0;
    for (int64_t h = first; h < first + group; ++h) total += head(h).reduce(*sums);
    const A mean = static_cast<A>(total / static_cast<double>(group * r.head_dim));
    for (int64_t h = first; h < first + group; ++h) {
      head(h).finish(
          mean, weight_grad == nullptr ? nullptr : weight_grad + (r.norm_all ? h * r.head_dim : 0));
    }
  }
}

template <class T, bool kInterleaved, class A = typename Compute<T>::type>
void backward_typed(const Rotation& r, const RowsBackward* rows, int count,
                    const FactorGrads& grads) {
  const int64_t tokens = r.batch * r.seqlen;
#pragma omp parallel for schedule(dynamic) num_threads(r.threads) if (r.threads > 1)
  for (int64_t chunk = 0; chunk < grads.chunks; ++chunk) {
    Token<A> token;
    PairSums sums;
    for (int64_t n = tokens * chunk / grads.chunks; n < tokens * (chunk + 1) / grads.chunks; ++n) {
      const int64_t b = n / r.seqlen, t = n % r.seqlen, row = table_row(r, b, t);
      angles_of_token<A>(r, b, t, nullptr, token.cos, token.sin);
      for (int64_t j = 0; j < r.pairs; ++j)
        token.scale[j] = static_cast<A>(r.scale[row * r.pairs + j]);
      for (int k = 0; k < count; ++k) {
        const RowsBackward& q = rows[k];
        token.token_scale = q.grad.token_scaled ? token_scale_of<A>(r, b, t) : A(1);
        for (int64_t j = 0; j < r.pairs; ++j) sums.dot[j] = sums.cross[j] = 0;
        sums.carried = 0;
        const bool norm = q.grad.norm != nullptr;
        const bool unit = q.grad.x_stride[3] == 1 && q.grad.y_stride[3] == 1 && q.x_stride[3] == 1;
        double* weight_grad =
            q.norm_grad == nullptr
                ? nullptr
                : q.norm_grad + chunk * r.head_dim * (r.norm_all ? q.grad.heads : 1);
        if (norm && unit) {
          backward_token<T, kInterleaved, true, true>(r, q, token, b, t, weight_grad, &sums);
        } else if (norm) {
          backward_token<T, kInterleaved, false, true>(r, q, token, b, t, weight_grad, &sums);
        } else if (unit) {
          backward_token<T, kInterleaved, true, false>(r, q, token, b, t, nullptr, &sums);
        } else {
          backward_token<T, kInterleaved, false, false>(r, q, token, b, t, nullptr, &sums);
        }
        const int64_t at = (chunk * r.tables + row) * r.pairs;
        const double factor = static_cast<double>(token.token_scale);
        if (grads.inv_freq != nullptr) {
          for (int64_t j = 0; j < r.pairs; ++j) {
            const int64_t axis = r.axis_map == nullptr ? 0 : r.axis_map[j];
            const double position =
                static_cast<double>(position_of(r, axis, b, t)) * (r.conjugate ? -1.0 : 1.0);
            grads.inv_freq[at + j] +=
                position * factor * static_cast<double>(token.scale[j]) * sums.cross[j];
          }
        }
        if (grads.scale != nullptr) {
          for (int64_t j = 0; j < r.pairs; ++j) grads.scale[at + j] += factor * sums.dot[j];
        }
        if (grads.token_scale != nullptr && q.grad.token_scaled) {
          double sum = sums.carried;
          for (int64_t j = 0; j < r.pairs; ++j)
            sum += static_cast<double>(token.scale[j]) * sums.dot[j];
          grads.token_scale[n] = sum;
        }
      }
    }
  }
}

void rotate_backward(const Rotation& r, const RowsBackward* rows, int count,
                     const FactorGrads& grads) {
  with_type(r.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (r.interleaved) {
      backward_typed<T, true>(r, rows, count, grads);
    } else {
      backward_typed<T, false>(r, rows, count, grads);
    }
  });
}

}  // namespace ROPE_FUSED_ISA
