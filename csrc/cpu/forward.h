// Forward kernels on the CPU.
//
// A block of tokens is one unit of work: its angles are computed once, into the stack, and reused
// by every head of q and k. The rest is one read and one write of each element, so the aim is
// memory speed. Arithmetic is float32 (float64 for float64 tensors) with one rounding at the store;
// -ffp-contract=off keeps the bits equal on every processor.
#pragma once

#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "rotate.h"
#include "table_pair.h"

namespace ROPE_FUSED_ISA {

using rope_fused::kMaxPairs;
using rope_fused::Rotation;
using rope_fused::Rows;
using rope_fused::TableRotation;

constexpr int64_t kAhead = 12;  // rows that are prefetched while one is rotated
constexpr int64_t kBlockTokens = 32;
constexpr int64_t kBlockPairs = 2048;  // angles of a block, kept in the L1 and L2 caches

// One head: rotate its slice by the given cos and sin (attention factor and token scale folded in),
// carry the rest.
template <class T, bool kInterleaved, bool kUnit, bool kNorm, bool kStream,
          class A = typename Compute<T>::type>
INLINE void rotate_head(const Rotation& r, const T* x, int64_t x_step, T* y, int64_t y_step,
                        const A* cos, const A* sin, const A* weight, A rstd, A token_scale) {
  const Slots<kUnit> in{x_step}, out{y_step};
  const int64_t begin = r.offset, end = r.offset + 2 * r.pairs;
  int64_t j = 0;
  if constexpr (kUnit) {
    using M = Members<T, kInterleaved>;
    constexpr int64_t kStep = M::kParts * kLanes<A>;
    for (; j + kStep <= r.pairs; j += kStep) {
      const int64_t ia = begin + (kInterleaved ? 2 * j : j), ib = ia + r.pairs;
      Vector<A> a[M::kParts], b[M::kParts], ya[M::kParts], yb[M::kParts];
      M::load(x + ia, x + ib, a, b);
      if constexpr (kNorm) {
        Vector<A> weight_a[M::kParts], weight_b[M::kParts];
        if constexpr (kInterleaved) {
          Packed<A>::load_pairs(weight + ia, weight_a[0], weight_b[0]);
        } else {
          load_arranged<T, false>(weight + ia, weight_a);
          load_arranged<T, false>(weight + ib, weight_b);
        }
        for (int i = 0; i < M::kParts; ++i) {
          a[i] = a[i] * rstd * weight_a[i];
          b[i] = b[i] * rstd * weight_b[i];
        }
      }
      for (int i = 0; i < M::kParts; ++i) {
        const Vector<A> c = read<Vector<A>>(cos + j + i * kLanes<A>),
                        s = read<Vector<A>>(sin + j + i * kLanes<A>);
        ya[i] = a[i] * c - b[i] * s;
        yb[i] = b[i] * c + a[i] * s;
      }
      // Angles and factors are finite (Python has looked), so without a norm weight every NaN stems
      // from x, whose lower half is zero, or from inf * 0, the default NaN, whose lower half is
      // too.
      M::template store<!kNorm, kStream>(y + ia, y + ib, ya, yb);
    }
  }
  for (; j < r.pairs; ++j) {
    const int64_t ia = begin + (kInterleaved ? 2 * j : j),
                  ib = kInterleaved ? ia + 1 : ia + r.pairs;
    A a = load(x[in(ia)]), b = load(x[in(ib)]);
    if constexpr (kNorm) {
      a = a * rstd * weight[ia];
      b = b * rstd * weight[ib];
    }
    const Pair<A> turned = rotate(a, b, cos[j], sin[j]);
    store(y[out(ia)], turned.a);
    store(y[out(ib)], turned.b);
  }
  const auto carry = [&](int64_t from, int64_t to) {
    if (!kNorm && token_scale == A(1)) {
      if (x == y) return;
      VECTORIZE
      for (int64_t d = from; d < to; ++d) y[out(d)] = x[in(d)];  // bit copies
    } else {
      VECTORIZE
      for (int64_t d = from; d < to; ++d) {
        A value = load(x[in(d)]);
        if constexpr (kNorm) value = value * rstd * weight[d];
        store(y[out(d)], value * token_scale);
      }
    }
  };
  if (begin > 0) carry(0, begin);
  if (end < r.head_dim) carry(end, r.head_dim);
}

template <class T, bool kInterleaved, bool kUnit, bool kStream, class A = typename Compute<T>::type>
INLINE void rotate_token(const Rotation& r, const Rows& rows, int64_t b, int64_t t, const A* cos,
                         const A* sin, A token_scale) {
  const T* x = static_cast<const T*>(rows.x) + b * rows.x_stride[0] + t * rows.x_stride[1];
  T* y = static_cast<T*>(rows.y) + b * rows.y_stride[0] + t * rows.y_stride[1];
  const int64_t x_head = rows.x_stride[2], x_step = rows.x_stride[3];
  const int64_t y_head = rows.y_stride[2], y_step = rows.y_stride[3];
  const A* weight = static_cast<const A*>(rows.norm);
  if (weight == nullptr) {
    for (int64_t h = 0; h < rows.heads; ++h) {
      rotate_head<T, kInterleaved, kUnit, false, kStream>(
          r, x + h * x_head, x_step, y + h * y_head, y_step, cos, sin, weight, A(1), token_scale);
    }
    return;
  }
  A rstd = r.norm_all ? rstd_of<T, kUnit>(r, x, x_head, x_step, rows.heads) : A(0);
  for (int64_t h = 0; h < rows.heads; ++h) {
    if (!r.norm_all) rstd = rstd_of<T, kUnit>(r, x + h * x_head, x_head, x_step, 1);
    rotate_head<T, kInterleaved, kUnit, true, kStream>(
        r, x + h * x_head, x_step, y + h * y_head, y_step, cos, sin,
        weight + (r.norm_all ? h * r.head_dim : 0), rstd, token_scale);
  }
}

// Head h of `tokens` tokens from `begin` on, which follow each other in "bhsd"; token_scale: null,
// or one for each. Every few pages another head begins, where the processor's own prefetching has
// to start anew: on Zen 4, with one thread, ours makes long sequences 1.3 times as fast.
template <class T, bool kInterleaved, bool kUnit, bool kStream, class A = typename Compute<T>::type>
INLINE void rotate_run(const Rotation& r, const Rows& rows, int64_t b, int64_t h, int64_t begin,
                       int64_t tokens, const A* cos, const A* sin, const A* token_scale) {
  const int64_t x_token = rows.x_stride[1], y_token = rows.y_stride[1];
  const int64_t x_step = rows.x_stride[3], y_step = rows.y_stride[3];
  const T* x = static_cast<const T*>(rows.x) + b * rows.x_stride[0] + h * rows.x_stride[2];
  T* y = static_cast<T*>(rows.y) + b * rows.y_stride[0] + h * rows.y_stride[2];
  x += begin * x_token;
  y += begin * y_token;
  const A* weight = static_cast<const A*>(rows.norm);
  const auto each = [&](auto normed) {
    for (int64_t t = 0; t < tokens; ++t, x += x_token, y += y_token) {
      if constexpr (kUnit) {
        for (int64_t d = 0; d < r.head_dim; d += 64 / sizeof(T)) {
          __builtin_prefetch(x + kAhead * x_token + d);
          if constexpr (!kStream) __builtin_prefetch(y + kAhead * y_token + d, 1);
        }
      }
      A rstd = 1;
      if constexpr (normed.value) rstd = rstd_of<T, kUnit>(r, x, 0, x_step, 1);
      rotate_head<T, kInterleaved, kUnit, normed.value, kStream>(
          r, x, x_step, y, y_step, cos + t * r.pairs, sin + t * r.pairs, weight, rstd,
          token_scale == nullptr ? A(1) : token_scale[t]);
    }
  };
  weight == nullptr ? each(std::false_type{}) : each(std::true_type{});
}

template <class T, bool kInterleaved, bool kUnit, bool kStream, class A = typename Compute<T>::type>
void rotate_typed(const Rotation& r, const Rows* rows, int count) {
  const int64_t block = least(kBlockTokens, kBlockPairs / r.pairs);
  const int64_t blocks = (r.seqlen + block - 1) / block;
#pragma omp parallel for schedule(static) num_threads(r.threads) if (r.threads > 1)
  for (int64_t n = 0; n < r.batch * blocks; ++n) {
    const int64_t b = n / blocks, begin = n % blocks * block, end = least(begin + block, r.seqlen);
    alignas(64) A cos[kBlockPairs], sin[kBlockPairs], scaled_cos[kBlockPairs],
        scaled_sin[kBlockPairs];
    A token_scale[kBlockTokens];
    Factors<A> factors;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t at = (t - begin) * r.pairs;
      angles_of_token<A>(r, b, t, factors.at(r, table_row(r, b, t)), cos + at, sin + at);
      if constexpr (kUnit) {
        arrange<T, kInterleaved>(cos + at, r.pairs);
        arrange<T, kInterleaved>(sin + at, r.pairs);
      }
      token_scale[t - begin] = token_scale_of<A>(r, b, t);
      if (r.token_scale != nullptr) {
        for (int64_t j = at; j < at + r.pairs; ++j) {
          scaled_cos[j] = cos[j] * token_scale[t - begin];
          scaled_sin[j] = sin[j] * token_scale[t - begin];
        }
      }
    }
    for (int k = 0; k < count; ++k) {
      const Rows& q = rows[k];
      const bool scaled = q.token_scaled && r.token_scale != nullptr;
      const A *cos_q = scaled ? scaled_cos : cos, *sin_q = scaled ? scaled_sin : sin;
      // Walk memory in its own order: heads inside tokens ("bshd") or tokens inside heads ("bhsd").
      if (q.x_stride[2] <= q.x_stride[1] || (r.norm_all && q.norm != nullptr)) {
        for (int64_t t = begin; t < end; ++t) {
          const int64_t at = (t - begin) * r.pairs;
          rotate_token<T, kInterleaved, kUnit, kStream>(r, q, b, t, cos_q + at, sin_q + at,
                                                        scaled ? token_scale[t - begin] : A(1));
        }
      } else {
        for (int64_t h = 0; h < q.heads; ++h) {
          rotate_run<T, kInterleaved, kUnit, kStream>(r, q, b, h, begin, end - begin, cos_q, sin_q,
                                                      scaled ? token_scale : nullptr);
        }
      }
    }
    if constexpr (kStream) end_streams();
  }
}

INLINE bool unit_steps(const Rows* rows, int count) {
  bool unit = true;
  for (int k = 0; k < count; ++k) {
    unit = unit && rows[k].x_stride[3] == 1 && rows[k].y_stride[3] == 1;
  }
  return unit;
}

// Whether outputs can be written past the caches: whole vectors at aligned addresses, and not over
// the input, whose lines are in the caches already.
template <class T>
INLINE bool can_stream(const Rotation& r, const Rows* rows, int count) {
  constexpr auto kSize = static_cast<int64_t>(sizeof(T));
  int64_t offsets = (r.offset | r.pairs) * kSize;
  for (int k = 0; k < count; ++k) {
    if (rows[k].x == rows[k].y) return false;
    offsets |= static_cast<int64_t>(reinterpret_cast<uintptr_t>(rows[k].y));
    for (int i = 0; i < 3; ++i) offsets |= rows[k].y_stride[i] * kSize;
  }
  return offsets % kVectorBytes == 0;
}

void rotate_rows(const Rotation& r, const Rows* rows, int count, bool large) {
  with_type(r.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_flags(
        [&](auto interleaved, auto unit, auto stream) {
          constexpr bool kStream = unit.value && stream.value;
          rotate_typed<T, interleaved.value, unit.value, kStream>(r, rows, count);
        },
        r.interleaved, unit_steps(rows, count), large && can_stream<T>(r, rows, count));
  });
}

template <class T, bool kInterleaved, bool kUnit, bool kTranspose,
          class A = typename Compute<T>::type>
INLINE void table_head(const TableRotation& r, const T* x, int64_t x_step, T* y, int64_t y_step,
                       const A* cos, const A* sin) {
  const Slots<kUnit> in{x_step}, out{y_step};
  const int64_t begin = r.offset, end = r.offset + 2 * r.pairs;
  int64_t j = 0;
  if constexpr (kUnit) {
    using M = Members<T, kInterleaved>;
    constexpr int64_t kStep = M::kParts * kLanes<A>;
    for (; j + kStep <= r.pairs; j += kStep) {
      const int64_t ia = begin + (kInterleaved ? 2 * j : j), ib = ia + r.pairs;
      Vector<A> a[M::kParts], b[M::kParts];
      M::load(x + ia, x + ib, a, b);
      for (int i = 0; i < M::kParts; ++i) {
        const int64_t at = j + i * kLanes<A>;
        const Pair<Vector<A>> turned = table_pair<T, kTranspose>(
            a[i], b[i], read<Vector<A>>(cos + at), read<Vector<A>>(cos + r.pairs + at),
            read<Vector<A>>(sin + at), read<Vector<A>>(sin + r.pairs + at));
        a[i] = turned.a;
        b[i] = turned.b;
      }
      M::template store<false, false>(y + ia, y + ib, a, b);
    }
  }
  for (; j < r.pairs; ++j) {
    const int64_t ia = begin + (kInterleaved ? 2 * j : j),
                  ib = kInterleaved ? ia + 1 : ia + r.pairs;
    const Pair<A> turned = table_pair<T, kTranspose>(load(x[in(ia)]), load(x[in(ib)]), cos[j],
                                                     cos[r.pairs + j], sin[j], sin[r.pairs + j]);
    store(y[out(ia)], turned.a);
    store(y[out(ib)], turned.b);
  }
  if (x == y) return;
  for (int64_t d = 0; d < begin; ++d) y[out(d)] = x[in(d)];
  for (int64_t d = end; d < r.head_dim; ++d) y[out(d)] = x[in(d)];
}

template <class T, bool kInterleaved, bool kUnit, bool kTranspose,
          class A = typename Compute<T>::type>
void tables_typed(const TableRotation& r, const Rows* rows, int count) {
#pragma omp parallel for schedule(static) num_threads(r.threads) if (r.threads > 1)
  for (int64_t n = 0; n < r.batch * r.seqlen; ++n) {
    const int64_t b = n / r.seqlen, t = n % r.seqlen;
    // First the entries of the pairs' first members, then those of their second ones.
    alignas(64) A cos[2 * kMaxPairs], sin[2 * kMaxPairs];
    const T* c = static_cast<const T*>(r.cos) + b * r.cos_stride[0] + t * r.cos_stride[1];
    const T* s = static_cast<const T*>(r.sin) + b * r.sin_stride[0] + t * r.sin_stride[1];
    for (int64_t j = 0; j < 2 * r.pairs; ++j) {
      const int64_t at = kInterleaved ? 2 * (j % r.pairs) + j / r.pairs : j;
      cos[j] = load(c[at * r.cos_stride[2]]);
      sin[j] = load(s[at * r.sin_stride[2]]);
    }
    if constexpr (kUnit) {
      for (A* table : {cos, cos + r.pairs, sin, sin + r.pairs}) {
        arrange<T, kInterleaved>(table, r.pairs);
      }
    }
    for (int k = 0; k < count; ++k) {
      const Rows& q = rows[k];
      const T* x = static_cast<const T*>(q.x) + b * q.x_stride[0] + t * q.x_stride[1];
      T* y = static_cast<T*>(q.y) + b * q.y_stride[0] + t * q.y_stride[1];
      for (int64_t h = 0; h < q.heads; ++h, x += q.x_stride[2], y += q.y_stride[2]) {
        table_head<T, kInterleaved, kUnit, kTranspose>(r, x, q.x_stride[3], y, q.y_stride[3], cos,
                                                       sin);
      }
    }
  }
}

void rotate_tables(const TableRotation& r, const Rows* rows, int count) {
  with_type(r.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_flags(
        [&](auto interleaved, auto unit, auto transpose) {
          tables_typed<T, interleaved.value, unit.value, transpose.value>(r, rows, count);
        },
        r.interleaved, unit_steps(rows, count), r.transpose);
  });
}

}  // namespace ROPE_FUSED_ISA
