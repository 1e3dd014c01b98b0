"""doctor(model): the rotary embedding a loaded model computes, against what its config says."""

from __future__ import annotations

import dataclasses

from torch import nn

from .checkup import Checkup, Tables
from .diagnose import METHOD_NAMES, Finding


@dataclasses.dataclass(frozen=True)
class DoctorReport:
    """What :func:`doctor` found; ``print(report)`` says it in words.

    model       class of the model
    tables      the tables of its rotary modules, a :class:`Tables` each
    layers      {layer: measured rotation of its keys, or why there is none}
    patched     how many attentions :func:`rope_fused.patch` has changed
    perplexity  {context length: perplexity of the same tokens}, or None without input_ids
    findings    what is wrong: (name, where, text, "error" | "warning") each
    notes       what else there is to know
    """

    model: str
    tables: tuple[Tables, ...]
    layers: dict
    patched: int
    perplexity: dict[int, float] | None
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no error among the findings."""
        return not any(finding.severity == "error" for finding in self.findings)

    def to_dict(self) -> dict:
        """The report as data that JSON can hold."""
        return {
            "ok": self.ok,
            "model": self.model,
            "tables": [
                {
                    "where": table.where,
                    "rope_type": table.spec.rope_type,
                    "cache_class": table.spec.cache_class,
                    "inv_freq": table.inv_freq.tolist(),
                    "expected_inv_freq": table.expected_inv_freq.tolist(),
                    "attention_factor": table.attention_factor,
                    "expected_attention_factor": table.expected_attention_factor,
                }
                for table in self.tables
            ],
            "layers": {
                layer: measured
                if isinstance(measured, str)
                else {
                    "inv_freq": measured.inv_freq.tolist(),
                    "attention_factor": measured.factor,
                }
                for layer, measured in self.layers.items()
            },
            "patched": self.patched,
            "perplexity": self.perplexity,
            "findings": [finding._asdict() for finding in self.findings],
            "notes": list(self.notes),
        }

    def __str__(self):
        parts = [f"rope_fused.doctor: {self.model}"]
        for table in self.tables:
            method = METHOD_NAMES.get(table.spec.rope_type, table.spec.rope_type)
            parts += [
                f"  {table.where}: {method}",
                f"    inv_freq          {_range(table.inv_freq)}, by the configuration "
                f"{_range(table.expected_inv_freq)}",
                f"    attention factor  {table.attention_factor:.6g}, by the configuration "
                f"{table.expected_attention_factor:.6g}",
            ]
        told = [i for i, layer in self.layers.items() if not isinstance(layer, str)]
        text = f"  {len(told)} of {len(self.layers)} layers measured by the keys they cache"
        parts.append(f"{text}, {self.patched} attentions patched by rope_fused")
        if self.perplexity is not None:
            pairs = (f"{value:.4g} at {length}" for length, value in self.perplexity.items())
            parts.append(f"  perplexity of the same tokens, by context: {', '.join(pairs)}")
        parts += [f"  {note}" for note in self.notes]
        parts += [f"{f.severity}: {f.name} ({f.where}): {f.text}" for f in self.findings]
        if not self.findings and (told or self.tables):
            parts.append("The model computes what its configuration says.")
        return "\n".join(parts)


def doctor(model, input_ids=None, *, config=None, lengths=None) -> DoctorReport:
    """Compare the rotary embedding that a transformers model computes with its configuration.

    Two measurements: the cos and sin that its rotary modules return, and the rotation of the keys
    that each of its layers caches, whoever computes it (the model's own code, a patch, a kernel).
    Frequencies and attention factor are held against ``RopeSpec.from_config``; each mismatch is a
    finding with a name: "YaRN silently off" (or another method), "temperature applied twice",
    "temperature missing", "wrong temperature", "wrong original_max_position_embeddings", "wrong
    factor", "wrong rope_theta", "nested truncate lost", "bf16 inv_freq", "zeroed buffers", "scaling
    edited after load", "scaling applied twice", "another method", "frequencies differ", "nothing
    measured", and some more; its text says what was found and what was expected.

    Args:
        model: a transformers model, patched or not, on any device; it is run, without gradients,
            on a few single tokens, and left as it was.
        input_ids: int tensor [tokens] of a text: adds a perplexity probe, the same last tokens
            predicted from a short and from a long context. A longer context must not hurt.
        config: what the model is meant to be, as a dict or configuration: the config.json it was
            loaded from, say. None: its own.
        lengths: (short, long) contexts of the probe. None: the original length and that of the
            extended model, as far as the text reaches.

    Returns:
        DoctorReport.

    Raises:
        TypeError: model is not a torch.nn.Module with a configuration, or input_ids no integers.
        ValueError: lengths do not fit the text.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    checkup = Checkup(model, model.config if config is None else config)
    checkup.run()
    perplexity = None
    if input_ids is not None:
        perplexity = checkup.probe(input_ids, lengths)
    return DoctorReport(
        type(model).__name__,
        tuple(checkup.tables),
        checkup.layers,
        checkup.patched,
        perplexity,
        tuple(dict.fromkeys(checkup.findings)),
        tuple(dict.fromkeys(checkup.notes)),
    )


def _range(row):
    return f"{row[0].item():.4g} .. {row[-1].item():.4g}"
