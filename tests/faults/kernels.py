"""Faults of the kernels: C++, CUDA and Triton."""

from .fault import of

SHARED = [
    *of(
        "csrc/rotate.h",
        (
            "the quarter turn is split off an eighth too late",
            "const Word quadrant = (phase + (1u << 29)) >> 30;",
            "const Word quadrant = (phase + (1u << 28)) >> 30;",
            "accuracy::test_cos_and_sin[theta-1e+04-cpu-float32-half-int64]",
        ),
        (
            "Taylor's coefficient in place of the minimax one",
            "0.00833197866388f",
            "0.00833333333333f",
            "accuracy::test_cos_and_sin[theta-1e+04-cpu-float32-half-int64]",
        ),
        (
            "the second member turns the other way",
            "return {a * cos - b * sin, b * cos + a * sin};",
            "return {a * cos - b * sin, b * cos - a * sin};",
            "rotate::test_matches_reference[cpu-d6-float32-forward]",
        ),
        (
            "only the lower half of a position counts in float64",
            "return static_cast<uint64_t>(position) * turns;",
            "return static_cast<uint64_t>(static_cast<uint32_t>(position)) * turns;",
            "positions::test_positions_beyond_32_bits[cpu-float64]",
            "positions::test_positions[cpu-negative-int64]",
        ),
    ),
    *of(
        "csrc/table_pair.h",
        (
            "the second product is not rounded",
            "rounded<T>(a * cos_a) - rounded<T>(b * sin_a),",
            "rounded<T>(a * cos_a) - b * sin_a,",
            "hf_precision::test_apply_rotary_pos_emb[bfloat16-1-contiguous]",
        ),
        (
            "the adjoint reads the sine of the other half",
            "return {rounded<T>(a * cos_a) + rounded<T>(b * sin_b),",
            "return {rounded<T>(a * cos_a) + rounded<T>(b * sin_a),",
            "hf_precision::test_tables_with_unequal_halves[cpu]",
        ),
    ),
]

CPU = [
    *of(
        "csrc/cpu/rows.h",
        (
            "strides of batch and token are exchanged in the positions",
            "axis * r.position_stride[0] + b * r.position_stride[1] + t * r.position_stride[2];",
            "axis * r.position_stride[0] + t * r.position_stride[1] + b * r.position_stride[2];",
            "positions::test_positions[cpu-random-int64]",
        ),
        (
            "the conjugate turns forward",
            "const A sign = r.conjugate ? A(-1) : A(1);",
            "const A sign = A(1);",
            "rotate::test_matches_reference[cpu-bshd-float32-conjugate]",
        ),
        (
            "one norm over all heads is divided by one head's size",
            "const A mean = sum / static_cast<A>(heads * r.head_dim);",
            "const A mean = sum / static_cast<A>(r.head_dim);",
            "projection::test_matches_reference[cpu-norm-all-float32]",
        ),
        (
            "the factors of the last table row are kept when the row changes",
            "if (wanted != row) {",
            "if (row < 0 && wanted != row) {",
            "positions::test_cu_seqlens[cpu-three-int64]",
        ),
    ),
    *of(
        "csrc/cpu/forward.h",
        (
            "the vectors turn the first member the other way",
            "ya[i] = a[i] * c - b[i] * s;",
            "ya[i] = a[i] * c + b[i] * s;",
            "rotate::test_matches_reference[cpu-d128-bfloat16-forward]",
        ),
        (
            "the last dimension behind the slice is left out",
            "if (end < r.head_dim) carry(end, r.head_dim);",
            "if (end < r.head_dim) carry(end, r.head_dim - 1);",
            "rotate::test_matches_reference[cpu-partial-half-float32-forward]",
        ),
        (
            "every head is normed by the weights of the first",
            "weight + (r.norm_all ? h * r.head_dim : 0), rstd, token_scale);",
            "weight + 0 * h, rstd, token_scale);",
            "projection::test_matches_reference[cpu-norm-all-float32]",
        ),
        (
            "k takes q's factor per token, and q none",
            "const bool scaled = q.token_scaled && r.token_scale != nullptr;",
            "const bool scaled = !q.token_scaled && r.token_scale != nullptr;",
            "factors::test_q_scale_leaves_k_alone[cpu]",
        ),
    ),
    *of(
        "csrc/cpu/simd.h",
        (
            "bfloat16 ties are rounded away from zero",
            "const Words nearest = bits + 0x7fffu + ((bits >> 16) & 1u);",
            "const Words nearest = bits + 0x8000u;",
            "hf_precision::test_apply_rotary_pos_emb[bfloat16-1-contiguous]",
        ),
    ),
    *of(
        "csrc/cpu/backward.h",
        (
            "the gradient of the frequencies has the opposite sign",
            "sums.cross[j] += gb * turned.a - ga * turned.b;",
            "sums.cross[j] += ga * turned.b - gb * turned.a;",
            "gradients::test_first_order_against_float64[cpu-float32-half-at-0]",
        ),
        (
            "the factor per token enters the gradient of the frequencies twice",
            "position * factor * static_cast<double>(token.scale[j]) * sums.cross[j];",
            "position * factor * factor * static_cast<double>(token.scale[j]) * sums.cross[j];",
            "autograd::test_apply_rope_in_every_argument[cpu-bshd-1]",
        ),
        (
            "the conjugate is forgotten in the gradient of the frequencies",
            "static_cast<double>(position_of(r, axis, b, t)) * (r.conjugate ? -1.0 : 1.0);",
            "static_cast<double>(position_of(r, axis, b, t));",
            "autograd::test_apply_rope_in_every_argument[cpu-conjugate-1]",
        ),
        (
            "the norm's backward forgets the mean",
            "store(dx[at_dx(d)], rstd * (dh * weight[d] - n * mean));",
            "store(dx[at_dx(d)], rstd * (dh * weight[d] - n * mean * 0));",
            "autograd::test_qkv_rope_in_every_argument[cpu-norm-1]",
        ),
        (
            "dimensions that do not rotate are left out of the gradient of the factor per token",
            "double sum = sums.carried;",
            "double sum = 0;",
            "autograd::test_apply_rope_in_every_argument[cpu-partial-1]",
        ),
    ),
]

CUDA = [
    *of(
        "csrc/cuda/rotate.cu",
        (
            "the second half of what does not rotate misses the factor per token",
            "value.b[i] *= token_scale;",
            "value.b[i] *= 1;",
            "factors::test_q_scale_leaves_k_alone[cuda]",
        ),
        (
            "the next head's statistics",
            "rstd = operand.rstd(sums[i], 1);",
            "rstd = operand.rstd(sums[0], 1);",
            "projection::test_matches_reference[cuda-qk-norm-float32]",
        ),
    ),
    *of(
        "csrc/cuda/column.cuh",
        (
            "a lane's second vector of interleaved pairs is one pair off",
            "return i < half ? index * half + i : (all.pairs + index * kCount) / 2 + i - half;",
            "return i < half ? index * half + i : (all.pairs + index * kCount) / 2 + i - half - 1;",
            "rotate::test_matches_reference[cuda-d128-interleaved-float32-forward]",
        ),
        (
            "the dimension at the offset counts as one before the slice",
            "return e < all.offset ? e : e + 2 * all.pairs;",
            "return e <= all.offset ? e : e + 2 * all.pairs;",
            "rotate::test_matches_reference[cuda-offset-interleaved-float32-forward]",
        ),
        (
            "a sum over lanes stops a step early",
            "for (int step = within / 2; step > 0; step /= 2) {",
            "for (int step = within / 2; step > 1; step /= 2) {",
            "cuda_kernels::test_norm_over_any_number_of_lanes[dense-head-136]",
        ),
    ),
    *of(
        "csrc/cuda/backward.cu",
        (
            "the sums of q replace those of k",
            "*of_dot = (add ? *of_dot : A(0)) + operand.token_scale * dot[i];",
            "*of_dot = operand.token_scale * dot[i];",
            "cuda_kernels::test_tiles_and_chunks[1-None-one-table]",
        ),
        (
            "the last token of a chunk is left out",
            "for (int64_t n = first; n < last; ++n) {",
            "for (int64_t n = first; n < last - 1; ++n) {",
            "cuda_kernels::test_tiles_and_chunks[1-None-one-table]",
        ),
    ),
]

TRITON = [
    *of(
        "triton_kernels/phase.py",
        (
            "the upper half of a position is dropped from the phase",
            "return tl.umulhi(p_lo, t_lo) + p_lo * t_hi + p_hi * t_lo",
            "return tl.umulhi(p_lo, t_lo) + p_lo * t_hi",
            "positions::test_positions[triton-negative-int64]",
        ),
        (
            "the pairs turn the other way",
            "return a * cos - b * sin, b * cos + a * sin",
            "return a * cos + b * sin, b * cos - a * sin",
            "rotate::test_matches_an_independent_formula[triton-float32]",
        ),
    ),
    *of(
        "triton_kernels/rows.py",
        (
            "the dimension at the offset counts as one before the slice",
            "column += tl.where(column >= dims.OFFSET, 2 * dims.PAIRS, 0)",
            "column += tl.where(column > dims.OFFSET, 2 * dims.PAIRS, 0)",
            "rotate::test_matches_reference[triton-odd-offset-float32-forward]",
        ),
        (
            "the axis of a pair is read from the batch",
            "(axis * angles.stride.axis + place),",
            "(axis * angles.stride.batch + place),",
            "positions::test_position_axes[triton-False]",
        ),
    ),
    *of(
        "triton_kernels/rotate.py",
        (
            "the factor per token is left out of the sine",
            "sin *= multiplier",
            "sin *= 1.0",
            "factors::test_q_scale_leaves_k_alone[triton]",
        ),
        (
            "the adjoint by tables reads the sine of the other half",
            "ya = _rounded(a * cos_a, DTYPE, WIDE) + _rounded(b * sin_b, DTYPE, WIDE)",
            "ya = _rounded(a * cos_a, DTYPE, WIDE) + _rounded(b * sin_a, DTYPE, WIDE)",
            "hf_precision::test_tables_with_unequal_halves[triton]",
        ),
    ),
    *of(
        "triton_kernels/backward.py",
        (
            "the factor per token is left out of the gradient of the attention factor",
            "dot *= multiplier[:, None]",
            "dot *= 1.0",
            "gradients::test_first_order_against_float64[triton-float32-half-at-0]",
        ),
        (
            "the norm's mean is taken over the rotated dimensions",
            "mean = (mean / dims.HEAD_DIM)[:, :, None]",
            "mean = (mean / (2 * dims.PAIRS))[:, :, None]",
            "gradients::test_projection_gradients_against_float64[triton-head-partial-float32]",
        ),
    ),
    *of(
        "triton_kernels/epilogue.py",
        (
            "the slice is taken from the start of the head",
            "inside = (group % PER_HEAD == dims.OFFSET // (2 * dims.PAIRS))[None, :, None]",
            "inside = (group % PER_HEAD == 0)[None, :, None]",
            "triton_projection::test_options[partial, last slice]",
        ),
    ),
    *of(
        "triton_kernels/projection.py",
        (
            "k gets the bias of q",
            "bias = _load_bias(bias, bias_k, feature, real)",
            "bias = _load_bias(bias, bias_q, feature, real)",
            "triton_projection::test_options[bias]",
        ),
    ),
]

FAULTS = SHARED + CPU + CUDA + TRITON
