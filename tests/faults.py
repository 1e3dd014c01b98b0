"""Small faults that mutations.py plants, each with the tests that must notice it.

A fault is one that somebody might make: a sign, an index, a bound, a factor twice. Backends and
orders of derivatives fail apart from each other, so the tests are named with their parameters.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    """`old`, which occurs once in `file`, becomes `new`; each of `tests` then fails by a number."""

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _of(file, *faults):
    """Faults of one file: (what, old, new, *tests), where "x::y" stands for tests/test_x.py::y."""
    return [
        Fault(what, file, old, new, tuple(f"tests/test_{test}" for test in _paths(tests)))
        for what, old, new, *tests in faults
    ]


def _paths(tests):
    return [test.replace("::", ".py::", 1) for test in tests]


SHARED = [
    *_of(
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
            "rotate::test_matches_an_independent_formula[cpu-float64]",
        ),
        (
            "only the lower half of a position counts in float64",
            "return static_cast<uint64_t>(position) * turns;",
            "return static_cast<uint64_t>(static_cast<uint32_t>(position)) * turns;",
            "positions::test_positions_beyond_32_bits[cpu-float64]",
            "positions::test_positions[cpu-negative-int64]",
        ),
    ),
    *_of(
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
    *_of(
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
            "positions::test_mixed_packed_batch_equals_each_alone[cpu]",
        ),
    ),
    *_of(
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
            "cos, sin, weight + (r.norm_all ? h * r.head_dim : 0),",
            "cos, sin, weight + 0 * h,",
            "projection::test_matches_reference[cpu-norm-all-float32]",
        ),
        (
            "k takes q's factor per token, and q none",
            "const bool scaled = q.token_scaled && r.token_scale != nullptr;",
            "const bool scaled = !q.token_scaled && r.token_scale != nullptr;",
            "factors::test_q_scale_leaves_k_alone[cpu]",
        ),
    ),
    *_of(
        "csrc/cpu/simd.h",
        (
            "bfloat16 ties are rounded away from zero",
            "const Words nearest = bits + 0x7fffu + ((bits >> 16) & 1u);",
            "const Words nearest = bits + 0x8000u;",
            "hf_precision::test_apply_rotary_pos_emb[bfloat16-1-contiguous]",
        ),
    ),
    *_of(
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
    *_of(
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
            "cuda_kernels::test_norm_over_any_number_of_lanes[dense-head-72]",
        ),
    ),
    *_of(
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
    *_of(
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
    *_of(
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
    *_of(
        "triton_kernels/rows.py",
        (
            "the dimension at the offset counts as one before the slice",
            "column += tl.where(column >= OFFSET, 2 * PAIRS, 0)",
            "column += tl.where(column > OFFSET, 2 * PAIRS, 0)",
            "rotate::test_matches_reference[triton-odd-offset-float32-forward]",
        ),
        (
            "the axis of a pair is read from the batch",
            "positions + (axis * position_stride[0] + place),",
            "positions + (axis * position_stride[1] + place),",
            "positions::test_position_axes[triton-False]",
        ),
    ),
    *_of(
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
    *_of(
        "triton_kernels/backward.py",
        (
            "the factor per token is left out of the gradient of the attention factor",
            "dot *= multiplier[:, None]",
            "dot *= 1.0",
            "gradients::test_first_order_against_float64[triton-float32-half-at-0]",
        ),
        (
            "the norm's mean is taken over the rotated dimensions",
            "mean = (mean / HEAD_DIM)[:, :, None]",
            "mean = (mean / (2 * PAIRS))[:, :, None]",
            "autograd::test_qkv_rope_in_every_argument[triton-norm-partial-1]",
        ),
    ),
    *_of(
        "triton_kernels/epilogue.py",
        (
            "the slice is taken from the start of the head",
            "inside = (group % PER_HEAD == OFFSET // (2 * PAIRS))[None, :, None]",
            "inside = (group % PER_HEAD == 0)[None, :, None]",
            "triton_projection::test_options[partial, last slice]",
        ),
    ),
    *_of(
        "triton_kernels/projection.py",
        (
            "k gets the bias of q",
            "bias = _load_bias(bias, bias_k, feature, real)",
            "bias = _load_bias(bias, bias_q, feature, real)",
            "triton_projection::test_options[bias]",
        ),
    ),
]

OPERATORS = [
    *_of(
        "rope_fused/ops.py",
        (
            "the backward turns forward again",
            "return *rotate(dq, dk, rotation._replace(conjugate=not rotation.conjugate)), None",
            "return *rotate(dq, dk, rotation), None",
            "autograd::test_apply_rope_in_one_argument[cpu-none-1]",
        ),
        (
            "the gradients of the biases are dropped",
            "s if has else None for s, has in",
            "0 * s if has else None for s, has in",
            "autograd::test_qkv_rope_in_every_argument[cpu-bias-1]",
        ),
        (
            "a factor per token that the batch shares gets the mean of its gradients",
            "grad = grad.sum(0, keepdim=True)",
            "grad = grad.mean(0, keepdim=True)",
            "autograd::test_apply_rope_in_one_argument[cpu-q_scale-1]",
        ),
        (
            "the gradient of the sines of the adjoint is that of the formula",
            "turned = x * _quarter(g, interleaved) if transpose else g * _quarter(x, interleaved)",
            "turned = g * _quarter(x, interleaved)",
            "hf_precision::test_tables_are_differentiable",
        ),
    ),
    *_of(
        "rope_fused/composite.py",
        (
            "the attention factor is left out where a gradient is differentiated again",
            "d_freq = d_freq + position * factor * scale * (g_b * r_a - g_a * r_b).sum(-2)",
            "d_freq = d_freq + position * factor * (g_b * r_a - g_a * r_b).sum(-2)",
            "autograd::test_apply_rope_in_every_argument[cpu-bshd-2]",
        ),
    ),
    *_of(
        "rope_fused/operands.py",
        (
            "between two tables the attention factors multiply",
            "scale=to_scale / scale,",
            "scale=to_scale * scale,",
            "rerotate::test_equals_rotating_afresh[cpu-yarn-llama3-torch.float32]",
        ),
        (
            "a sequence of the original length is long already, with precision hf",
            "row = (lengths.amax() > spec.switch_length).long()",
            "row = (lengths.amax() >= spec.switch_length).long()",
            "hf_precision::test_frequencies_per_table[cpu]",
        ),
        (
            "angles of precision hf in float64",
            "angle = _per_dimension(positions.float() * freq, spec.interleaved)",
            "angle = _per_dimension(positions.double() * freq, spec.interleaved)",
            "hf_precision::test_apply_rope[cpu-yarn-float32]",
        ),
    ),
    *_of(
        "rope_fused/phase.py",
        (
            "1 / 2 pi in one float64",
            "tail = torch.round((rest - low) + (error + x * _INV_LO) * 2.0**64)",
            "tail = torch.round((rest - low) + error * 2.0**64)",
            "spec::test_turns_on_device",
        ),
    ),
    *_of(
        "rope_fused/packing.py",
        (
            "the first token of a sequence belongs to the one before",
            "torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)",
            "torch.searchsorted(cu_seqlens[1:].contiguous(), token)",
            "positions::test_cu_seqlens[cpu-three-int64]",
            "positions::test_cu_seqlens[cpu-empty-middle-int32]",
        ),
        (
            "a sequence of the original length is long already",
            "row = (lengths > switch_length).to(torch.int32)",
            "row = (lengths >= switch_length).to(torch.int32)",
            "positions::test_seq_lens_choose_the_table[cpu-lengths3]",
            "positions::test_length_found_from_positions[cpu]",
        ),
    ),
]

SPECS = [
    *_of(
        "rope_fused/scaling.py",
        (
            "the power of theta has the wrong denominator",
            "return [(log * (-2 * i) / dim).exp() for i in",
            "return [(log * (-2 * i) / (dim - 1)).exp() for i in",
            "scaling::test_default",
        ),
        (
            "the bounds of YaRN's ramp are exchanged",
            "for turns in (fast, slow)",
            "for turns in (slow, fast)",
            "scaling::test_yarn",
        ),
        (
            "truncate is ignored",
            "        if truncate:\n            low = low.to_integral_value",
            "        if True:\n            low = low.to_integral_value",
            "scaling::test_yarn",
        ),
        (
            "the temperature forgets mscale",
            "0.1 * mscale * math.log(factor) + 1.0",
            "0.1 * math.log(factor) + 1.0",
            "scaling::test_yarn_attention_factor",
        ),
        (
            "llama3's ramp runs the other way",
            "return (1 - gamma) * x / s + gamma * x",
            "return gamma * x / s + (1 - gamma) * x",
            "scaling::test_ntk_by_parts",
        ),
    ),
    *_of(
        "rope_fused/scaling_hf.py",
        (
            "YaRN's frequencies in another order of roundings",
            "return (1.0 / (factor * powers)) * (1 - kept) + (1.0 / powers) * kept",
            "return (1.0 / powers) * ((1 - kept) / factor + kept)",
            "scaling::test_hf_bits",
        ),
    ),
    *_of(
        "rope_fused/spec.py",
        (
            "specs of another base are equal, and share what is cached",
            "    rope_theta: float\n",
            "    rope_theta: float = dataclasses.field(compare=False)\n",
            "spec::test_value_semantics",
            "compile::test_two_specs_do_not_share_a_graph[cpu]",
        ),
        (
            "a sequence of the original length is long already, in the tables",
            "index = torch.as_tensor(seq_len, device=positions.device) > self.switch_length",
            "index = torch.as_tensor(seq_len, device=positions.device) >= self.switch_length",
            "spec::test_n_start",
        ),
    ),
    *_of(
        "rope_fused/positions.py",
        (
            "an axis of mRoPE goes on for a pair too many",
            "i % axes if i < axes * section[i % axes] else 0",
            "i % axes if i <= axes * section[i % axes] else 0",
            "spec::test_axis_maps",
        ),
        (
            "the temperature of Llama-4 counts from 0",
            "steps = torch.floor((positions.to(torch.int64) + int(offset)).to(wide) / length)",
            "steps = torch.floor(positions.to(torch.int64).to(wide) / length)",
            "spec::test_q_scale",
        ),
    ),
    *_of(
        "rope_fused/dialects.py",
        (
            "DeepSeek's temperature enters the softmax once",
            "self.softmax_multiplier = m * m",
            "self.softmax_multiplier = m",
            "configs::test_deepseek_mscale",
        ),
    ),
    *_of(
        "rope_fused/configs.py",
        (
            "the slice that rotates is at the wrong end of the head",
            "offset = head_dim - 2 * pairs if self.model.at_end else 0",
            "offset = 0 if self.model.at_end else head_dim - 2 * pairs",
            "configs::test_partial_rotary",
            "configs::test_families",
        ),
    ),
]

PATCHER = [
    *_of(
        "rope_fused/integrations/handler.py",
        (
            "a norm that multiplies by 1 + weight multiplies by the weight",
            "return 1.0 + weight.to(",
            "return 0.0 + weight.to(",
            "patch_matrix::test_tables_without_their_tags[gemma3_text]",
        ),
        (
            "the biases of a packed projection are dropped",
            "biases = (None,) * 3 if bias is None else bias.split(layers.rows)",
            "biases = (None,) * 3",
            "patch_matrix::test_a_packed_projection_with_a_bias",
        ),
        (
            "frequencies that were swapped in are ignored",
            'return override | {"spec": spec}',
            'return {"spec": spec}',
            "swap::test_a_patched_model_swaps_alike",
        ),
    ),
    *_of(
        "rope_fused/integrations/rotary.py",
        (
            "tables that somebody has edited pass for those of the configuration",
            "((ours - value).abs() <= 2**-8 * value.abs() + 2**-24).all()",
            "((ours - value).abs() <= 2**8 * value.abs() + 2**-24).all()",
            "patch::test_frequencies_edited_after_loading",
        ),
    ),
]

DISTRIBUTED = _of(
    "rope_fused/distributed.py",
    (
        "the second halves of a zigzag are in the order of the first",
        "tokens[world_size:].flip(0)",
        "tokens[world_size:]",
        "distributed::test_zigzag_by_hand",
        "distributed::test_sequence_shard[zigzag-2]",
    ),
    (
        "gradients of what is replicated are not summed over the ranks",
        "Partial() if role and placement.is_replicate() else placement",
        "placement",
        "distributed::test_qkv_rope_on_shards[qkv_rope-S0-R]",
    ),
)

CONTEXT = [
    *_of(
        "rope_fused/context/perplexity.py",
        (
            "tokens of two windows are scored twice",
            "found.append(Window(start, end, max(scored, start + 1)))",
            "found.append(Window(start, end, start + 1))",
            "evaluate::test_every_token_is_scored_once_with_enough_before_it",
        ),
        (
            "a window's length is remembered by the next",
            "    forget_lengths(model)\n",
            "",
            "evaluate::test_dynamic_ntk_remembers_no_earlier_window",
        ),
    ),
    *_of(
        "rope_fused/context/evolution.py",
        (
            "the random numbers start again after a stop",
            "rng.setstate((version, tuple(internal), gauss))",
            "(version, tuple(internal), gauss)",
            "search::test_evolution_that_was_stopped_ends_the_same",
        ),
    ),
    *_of(
        "rope_fused/context/gradient.py",
        (
            "the increments' slopes are summed from the wrong end",
            "slope[:-1].flip(0).cumsum(0).flip(0)",
            "slope[:-1].cumsum(0)",
            "search::test_a_step_is_adams",
        ),
    ),
    *_of(
        "rope_fused/context/swap.py",
        (
            "what was swapped in before is forgotten, not put back",
            "            _put(owner, override)\n\n\ndef set_rope",
            "            _put(owner, None)\n\n\ndef set_rope",
            "swap::test_swaps_nest_and_stay_until_reset",
        ),
        (
            "every token takes LongRoPE's short table",
            "return self.fixed, self.spec.table_index(position_ids)",
            "return self.fixed, None",
            "swap::test_a_swapped_model_is_the_one_built_with_that_block",
        ),
    ),
]

FAULTS = SHARED + CPU + CUDA + TRITON + OPERATORS + SPECS + PATCHER + DISTRIBUTED + CONTEXT
