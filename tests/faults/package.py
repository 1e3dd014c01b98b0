"""Faults of the package: operators, specs, the patcher, distribution, context extension."""

from .fault import of

OPERATORS = [
    *of(
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
    *of(
        "rope_fused/composite.py",
        (
            "the attention factor is left out where a gradient is differentiated again",
            "d_freq = d_freq + position * factor * scale * (g_b * r_a - g_a * r_b).sum(-2)",
            "d_freq = d_freq + position * factor * (g_b * r_a - g_a * r_b).sum(-2)",
            "autograd::test_gradients_on_the_graph_are_the_same[cpu-bshd]",
        ),
    ),
    *of(
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
    *of(
        "rope_fused/phase.py",
        (
            "1 / 2 pi in one float64",
            "tail = torch.round((rest - low) + (error + x * _INV_LO) * 2.0**64)",
            "tail = torch.round((rest - low) + error * 2.0**64)",
            "spec::test_turns_on_device",
        ),
    ),
    *of(
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
    *of(
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
    *of(
        "rope_fused/scaling_hf.py",
        (
            "YaRN's frequencies in another order of roundings",
            "return (1.0 / (factor * powers)) * (1 - kept) + (1.0 / powers) * kept",
            "return (1.0 / powers) * ((1 - kept) / factor + kept)",
            "scaling::test_hf_bits",
        ),
    ),
    *of(
        "rope_fused/spec.py",
        (
            "specs of another base are equal, and share what is cached",
            "    rope_theta: float\n",
            "    rope_theta: float = dataclasses.field(compare=False)\n",
            "spec::test_what_makes_the_numbers_makes_the_identity",
        ),
        (
            "a sequence of the original length is long already, in the tables",
            "index = torch.as_tensor(seq_len, device=positions.device) > self.switch_length",
            "index = torch.as_tensor(seq_len, device=positions.device) >= self.switch_length",
            "spec::test_n_start",
        ),
    ),
    *of(
        "rope_fused/positions.py",
        (
            "all axes of mRoPE go as far as the first",
            "i % axes if i < axes * section[i % axes] else 0",
            "i % axes if i < axes * section[0] else 0",
            "spec::test_axis_maps",
        ),
        (
            "the temperature of Llama-4 counts from 0",
            "steps = torch.floor((positions.to(torch.int64) + int(offset)).to(wide) / length)",
            "steps = torch.floor(positions.to(torch.int64).to(wide) / length)",
            "spec::test_q_scale",
        ),
    ),
    *of(
        "rope_fused/dialects.py",
        (
            "DeepSeek's temperature enters the softmax once",
            "self.softmax_multiplier = m * m",
            "self.softmax_multiplier = m",
            "configs::test_deepseek_mscale",
        ),
    ),
    *of(
        "rope_fused/configs.py",
        (
            "the slice that rotates is at the wrong end of the head",
            "offset = head_dim - 2 * pairs if self.model.at_end else 0",
            "offset = 0 if self.model.at_end else head_dim - 2 * pairs",
            "configs::test_golden",
        ),
    ),
]

PATCHER = [
    *of(
        "rope_fused/integrations/handler.py",
        (
            "a norm that multiplies by 1 + weight multiplies by the weight",
            "return 1.0 + weight.to(",
            "return 0.0 + weight.to(",
            "patch_matrix::test_mechanisms[gemma3_text]",
        ),
        (
            "models that turn by the opposite angle are projected by the usual one",
            "            positions = -positions\n",
            "            positions = 1 * positions\n",
            "patch_matrix::test_mechanisms[nanochat]",
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
    *of(
        "rope_fused/integrations/rotary.py",
        (
            "tables that somebody has edited pass for those of the configuration",
            "((ours - value).abs() <= 2**-8 * value.abs() + 2**-24).all()",
            "((ours - value).abs() <= 2**8 * value.abs() + 2**-24).all()",
            "patch::test_frequencies_edited_alone[exact]",
        ),
    ),
    *of(
        "rope_fused/integrations/layouts.py",
        (
            "pairs that come out in halves stay as they are",
            "t.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)",
            "t.unflatten(-1, (-1, 2)).flatten(-2)",
            "patch_matrix::test_mechanisms[deepseek_v3]",
        ),
    ),
]

DISTRIBUTED = of(
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
    *of(
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
    *of(
        "rope_fused/context/evolution.py",
        (
            "the random numbers start again after a stop",
            "rng.setstate((version, tuple(internal), gauss))",
            "(version, tuple(internal), gauss)",
            "search::test_evolution_that_was_stopped_ends_the_same",
        ),
    ),
    *of(
        "rope_fused/context/gradient.py",
        (
            "the increments' slopes are summed from the wrong end",
            "slope[:-1].flip(0).cumsum(0).flip(0)",
            "slope[:-1].cumsum(0)",
            "search::test_a_step_is_adams",
        ),
    ),
    *of(
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

FAULTS = OPERATORS + SPECS + PATCHER + DISTRIBUTED + CONTEXT
