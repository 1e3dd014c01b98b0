"""One layer's projections and rotary embedding alone: their time and memory, whoever runs them."""

from __future__ import annotations

import sys
import time

import torch

from ... import RopeSpec, qkv_rope
from ...report import UserError
from ..memory import peak
from .comparison import COMPILED, EAGER, FUSED, LINEAR


class Layer:
    """The first attention of ``model``, which is not patched: hidden states to rotated q, k, and v.

    transformers gets cos and sin for nothing: a model makes these tables once for all its layers.
    rope_fused makes them anew in every call.
    """

    def __init__(self, model, precision):
        try:
            self.attention = next(m for m in model.modules() if hasattr(m, "q_proj"))
            self.rotary = next(m.rotary_emb for m in model.modules() if hasattr(m, "rotary_emb"))
            linears = [getattr(self.attention, f"{name}_proj") for name in "qkv"]
            self.rotate = sys.modules[type(self.attention).__module__].apply_rotary_pos_emb
            self.spec = RopeSpec.from_config(model.config)
            if self.spec.rotary_dim != self.spec.head_dim:
                raise ValueError("it rotates only a part of each head")
        except (StopIteration, AttributeError, ValueError) as error:
            why = str(error) or "it has no attention with q_proj, or no rotary_emb"
            raise UserError(f"the demo cannot take {type(model).__name__} apart: {why}") from error
        norms = [getattr(self.attention, f"{name}_norm", None) for name in "qk"]
        self.weights = [linear.weight for linear in linears]
        self.operands = {"q_bias": linears[0].bias, "k_bias": linears[1].bias}
        self.operands |= {"v_bias": linears[2].bias, "spec": self.spec, "precision": precision}
        if norms[0] is not None:
            self.operands |= {"q_norm_weight": norms[0].weight, "k_norm_weight": norms[1].weight}
            self.operands["norm_eps"] = norms[0].variance_epsilon

    @property
    def shape(self) -> str:
        """What is measured, in words."""
        d_model, head_dim = self.weights[0].shape[1], self.spec.head_dim
        heads, kv_heads = (w.shape[0] // head_dim for w in self.weights[:2])
        return f"d_model {d_model}, {heads} + {kv_heads} heads of {head_dim}"

    def inputs(self, seqlen):
        """x, positions, cos and sin for one sequence of ``seqlen`` tokens."""
        like = self.weights[0]
        x = torch.randn(1, seqlen, like.shape[1], dtype=like.dtype)
        positions = torch.arange(seqlen)[None]
        with torch.no_grad():
            return x, positions, *self.rotary(x, positions)

    def project(self, x):
        """q, k and v before the rotation, as the model's: [batch, heads, seqlen, head_dim]."""
        attention, norm = self.attention, torch.nn.Identity()
        q, k, v = (
            linear(x).unflatten(-1, (-1, self.spec.head_dim))
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = getattr(attention, "q_norm", norm)(q), getattr(attention, "k_norm", norm)(k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def eager(self, x, positions, cos, sin):
        """As transformers runs it; ``positions`` are in the tables."""
        q, k, v = self.project(x)
        return *self.rotate(q, k, cos, sin), v

    def fused(self, x, positions, cos, sin):
        """As a patched model runs it; the tables are not used."""
        return qkv_rope(x, *self.weights, positions=positions, **self.operands)


def compiled(layer):
    """(torch.compile of layer.eager, compiled; the seconds that took), or (None, why it failed)."""
    torch.compiler.reset()
    function = torch.compile(layer.eager, dynamic=True)
    start = time.perf_counter()
    try:
        with torch.no_grad():
            for seqlen in (96, 128):  # two lengths: the first alone may be taken for a constant
                function(*layer.inputs(seqlen))
    except Exception as error:  # no C++ compiler, and whatever else a backend of torch may raise
        return None, str(error).strip().split("\n")[0]
    return function, time.perf_counter() - start


def forward_times(layer, compiled_function, lengths, seconds, progress) -> dict[str, dict]:
    """{length: {who: [seconds of each round]}} of one forward pass without gradients.

    Every round calls everyone once, each time in another order. ``seconds`` are shared out by
    length; there are at least 5 rounds and at most 40. ``progress`` is a tqdm bar over the lengths.
    """
    calls = {EAGER: layer.eager, FUSED: layer.fused, LINEAR: lambda x, *tables: layer.project(x)}
    if compiled_function is not None:
        calls[COMPILED] = compiled_function
    times = {}
    for length in lengths:
        inputs = layer.inputs(length)
        end = time.monotonic() + seconds * length / sum(lengths)
        with torch.no_grad():
            times[length] = rounds(
                {name: (lambda f=f, i=inputs: f(*i)) for name, f in calls.items()}, end
            )
        progress.update()
    return times


def rounds(calls, end, least=5, most=40) -> dict[str, list[float]]:
    """{name: seconds of its calls}, the calls taking turns until ``end`` of the monotonic clock."""
    names, times = list(calls), {name: [] for name in calls}
    for name in names:
        calls[name]()
    for number in range(most):
        if number >= least and time.monotonic() > end:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    return times


def peaks(layer, seqlen) -> dict[str, dict[str, int]]:
    """{who: {"forward": bytes, "forward and backward": bytes}}: the most that was held at once.

    With gradients for x and the weights. Counted are the requests to torch's allocator, inside
    operators too, beyond what was held before: x, weights, tables and incoming gradients.
    """
    x, positions, cos, sin = layer.inputs(seqlen)
    x.requires_grad_()
    found = {}
    for name, function in ((EAGER, layer.eager), (FUSED, layer.fused)):
        gradients = [torch.randn_like(y) for y in function(x, positions, cos, sin)]

        def forward(function=function):
            return function(x, positions, cos, sin)

        def both(function=function, gradients=gradients):
            outputs = function(x, positions, cos, sin)
            torch.autograd.grad(outputs, [x, *layer.weights], gradients)

        found[name] = {"forward": peak(forward), "forward and backward": peak(both)}
    return found
