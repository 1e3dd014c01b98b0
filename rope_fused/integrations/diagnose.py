"""What is wrong with a measured rotation, by name: hypotheses, tried one after the other."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

METHOD_NAMES = {
    "linear": "linear scaling",
    "ntk": "NTK scaling",
    "dynamic": "dynamic NTK scaling",
    "llama3": "llama3 scaling",
    "ntk_by_parts": "NTK-by-parts",
    "yarn": "YaRN",
    "dynamic_yarn": "dynamic YaRN",
    "longrope": "LongRoPE",
    "proportional": "proportional scaling",
}
_ORIGINAL = "original_max_position_embeddings"


class Finding(NamedTuple):
    """One thing that is wrong ("error"), or may be ("warning")."""

    name: str
    where: str
    text: str
    severity: str = "error"


class Expected(NamedTuple):
    """What the configuration asks of one kind of layer, at one length."""

    spec: object
    seq_len: int | None
    lengths: tuple[float, ...]
    """Lengths that somebody may have taken for the original one."""

    @property
    def inv_freq(self):
        return self.spec.inv_freq(seq_len=self.seq_len)

    @property
    def factor(self):
        factor = self.spec.attention_factor_at(self.seq_len)
        if isinstance(factor, tuple):
            return sum(factor) / len(factor)
        return factor

    def but(self, rope_type=None, **changes):
        """The frequencies with other parameters, or None if that is no legal method."""
        spec = self.spec
        kept = dict(spec.parameters) if rope_type is None else {}
        try:
            other = dataclasses.replace(
                spec,
                rope_type=rope_type or spec.rope_type,
                parameters=tuple((kept | changes).items()),
                hf_parameters=(),
            )
            return other.inv_freq(seq_len=self.seq_len)
        except (ValueError, TypeError):
            return None


def frequencies(expected: Expected, measured, where: str) -> Finding | None:
    """Why the frequencies are not those of the configuration; None if they are."""
    freq, spec = measured.inv_freq, expected.spec

    def is_like(row, rounding=8 * 2.0**-24):
        if row is None or not bool(freq.isfinite().all()):
            return False
        return bool(((freq - row).abs() <= measured.error + rounding * row.abs()).all())

    wanted = expected.inv_freq
    if is_like(wanted):
        return None
    if not bool(freq.isfinite().all()):
        return Finding("buffers are not finite", where, "a frequency is NaN or infinite")
    if is_like(torch.zeros_like(wanted)):
        text = "every frequency is 0, so all positions look alike to the model"
        return Finding("zeroed buffers", where, text)
    if is_like(wanted.float().bfloat16().double()):
        worst = ((freq - wanted).abs() / wanted).max().item()
        text = f"the frequencies are rounded to bfloat16, off by up to {worst:.1%}"
        return Finding("bf16 inv_freq", where, text)
    method = METHOD_NAMES.get(spec.rope_type, spec.rope_type)
    base = expected.but("default")
    scaled = spec.rope_type not in ("default", "none")
    if scaled and is_like(base):
        text = f"the configuration asks for {method}, the model turns with unscaled frequencies"
        return Finding(f"{method} silently off", where, text)
    parameters = dict(spec.parameters)
    truncate = parameters.get("truncate")
    if truncate is not None and is_like(expected.but(truncate=not truncate)):
        name = "nested truncate lost" if not truncate else "truncate differs"
        text = f"truncate is {truncate} in the configuration and {not truncate} in the model"
        return Finding(name, where, text)
    original = parameters.get(_ORIGINAL)
    for length in expected.lengths if original is not None else ():
        if length != original and is_like(expected.but(**{_ORIGINAL: length})):
            text = f"the model computes with {length:g}, the configuration says {original:g}"
            return Finding(f"wrong {_ORIGINAL}", where, text)
    if scaled and is_like(wanted * wanted / base, 16 * 2.0**-24):
        return Finding("scaling applied twice", where, f"{method} is applied to its own result")
    ratio = (base / freq)[-1].item()
    for candidate in (float(round(ratio)), ratio):
        if candidate < 1 or not is_like(expected.but(factor=candidate)):
            continue
        text = f"the model computes with {candidate:g}, the configuration says "
        return Finding("wrong factor", where, text + f"{parameters.get('factor')}")
    if is_like(base / ratio):
        text = f"the model divides every frequency by {ratio:g} (linear scaling)"
        return Finding("another method", where, f"{text}, the configuration asks for {method}")
    pairs = len(freq)
    theta = (freq[1] / freq[0]).item() ** (-pairs) if pairs > 1 and freq[0] else 0.0
    for candidate in (float(round(theta)), theta) if theta > 1 else ():
        row = candidate ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        if is_like(row, 2.0**-18):
            text = f"the model computes with {candidate:g}, the configuration says "
            return Finding("wrong rope_theta", where, text + f"{spec.rope_theta:g}")
    if (
        spec.hf_parameters
        and not spec.hf_refusal
        and is_like(spec.inv_freq("hf", expected.seq_len).double())
    ):
        text = "; ".join(note for note in spec.notes if "transformers" in note)
        return Finding("transformers computes something else", where, text)
    worst = ((freq / wanted).log().abs()).nan_to_num(nan=0.0, posinf=torch.inf).argmax().item()
    text = (
        f"they are those of no known method: pair {worst} turns by {freq[worst]:.6g} radians per "
        f"token instead of {wanted[worst]:.6g}"
    )
    return Finding("frequencies differ", where, text)


def temperature(expected: Expected, factor: float, error: float, where: str) -> Finding | None:
    """Why the attention factor is not that of the configuration; None if it is."""
    wanted = expected.factor

    def is_like(value):
        return abs(factor - value) <= (error + 8 * 2.0**-24) * value

    if is_like(wanted):
        return None
    method = METHOD_NAMES.get(expected.spec.rope_type, expected.spec.rope_type)
    if wanted != 1 and is_like(1.0):
        text = f"q and k are not multiplied by {method}'s {wanted:.6g} each"
        return Finding("temperature missing", where, text)
    if wanted != 1 and is_like(wanted * wanted):
        text = f"q and k are multiplied by {factor:.6g} each, the square of {method}'s {wanted:.6g}"
        return Finding("temperature applied twice", where, text)
    text = f"q and k are multiplied by {factor:.6g} each, the configuration says {wanted:.6g}"
    return Finding("wrong temperature", where, text)
