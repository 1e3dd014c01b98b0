"""A whole attention block and a whole training step of transformers, as they are and patched."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from ... import patch
from . import baselines, roofline
from .baselines import Problem
from .harness import Case, Missing, Variant, relative_error
from .shapes import Model

# Roundings of an attention block, one after the other: projections, table, products and sum of the
# rotation, scores, probabilities, their products with the values, the projection of the result; the
# scores' errors count twice, in q and in k.
BLOCK_ROUNDINGS = 16
PREFIX = 256  # tokens whose outputs, which see no later ones, are compared with float64

TRAINED = Model("Llama-100M", 768, 12, 4, 64, {"rope_theta": 10000.0})
LAYERS, INTERMEDIATE, VOCABULARY = 12, 2048, 32000


def transformer(model: Model, seqlen: int, *, head=False, layers=1, intermediate=8, vocabulary=8):
    """A Llama, or with QK-norm a Qwen3, of these shapes with random weights, float32 on the CPU."""
    import transformers

    family = "Qwen3" if model.norm else "Llama"
    spec = model.spec()
    kept = {"rope_theta", "rope_type", "factor", "low_freq_factor", "high_freq_factor"}
    rope = {key: value for key, value in model.rope.items() if key in kept}
    rope |= {k: v for k, v in model.rope.items() if k == "original_max_position_embeddings"}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=vocabulary,
        hidden_size=model.d_model,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=max(seqlen, 8192),
        rope_parameters={"rope_type": "default", **rope},
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    kind = f"{family}ForCausalLM" if head else f"{family}Model"
    return getattr(transformers, kind)(config)


@dataclass(frozen=True, kw_only=True)
class Block(Case):
    """The self-attention of one layer: projections, rotation, causal attention, projection."""

    op: str = "block"

    limit = "hf-eager"

    @property
    def set_bytes(self):
        model, size = self.model, self.dtype.itemsize
        rows = sum(model.rows)
        weights = (rows + model.rows[0]) * model.d_model
        return (self.seqlen * (2 * model.d_model + 2 * rows) + weights) * size

    @property
    def needs(self):
        return 8 * self.set_bytes + PREFIX * PREFIX * self.model.heads * 32

    @property
    def effort(self):
        model = self.model
        work = roofline.product(self.seqlen, model.d_model, 2 * sum(model.rows), 1).flops
        work += 2 * self.seqlen**2 * model.rows[0]
        return 20.0 + self.rounds * 4 * work / (3e11 if self.device == "cpu" else 3e14)

    def make(self):
        options = {"dtype": self.dtype, "device": self.device}
        return torch.randn(1, self.seqlen, self.model.d_model, **options)

    def variants(self, inputs):
        modes = self.compile_modes
        if none := baselines.missing("transformers"):
            return dict.fromkeys(("rope_fused", "hf-eager", *modes), none)
        plain = transformer(self.model, self.seqlen).to(self.device, self.dtype).eval()
        plain.requires_grad_(False)
        patched = copy.deepcopy(plain)
        patch(patched, strict=True)
        positions = torch.arange(self.seqlen, device=self.device)[None]
        problem = Problem(self.model.spec(), positions, self.dtype)
        tables = problem.wide()

        def attend(model, x, tables=tables, positions=positions):
            attention = model.layers[0].self_attn
            return attention(
                x, position_embeddings=tables, attention_mask=None, position_ids=positions
            )[0]

        with torch.no_grad():
            check = _BlockCheck(plain, attend, problem, inputs)
        calls = {"rope_fused": (patched, attend), "hf-eager": (plain, attend)}
        for name, mode in modes.items():
            compiled = baselines.compiled(attend, mode)
            calls[name] = (plain, compiled)
            calls[name.replace("hf", "rope_fused")] = (patched, compiled)
        return {
            name: Variant(lambda x, m=model, f=function: lambda: f(m, x), check)
            for name, (model, function) in calls.items()
        }


class _BlockCheck:
    """An output is as near to float64 as transformers' own, up to one rounding: on the first tokens
    against float64, and everywhere against transformers."""

    def __init__(self, model, attend, problem, x):
        few = slice(0, min(PREFIX, x.shape[1]))
        positions = problem.positions[:, few]
        exact = Problem(problem.spec, positions, torch.float64)
        self.few = few
        self.truth = attend(
            copy.deepcopy(model).double(), x[:, few].double(), exact.wide(), positions
        )
        self.eager = attend(model, x)
        self.unit = torch.finfo(x.dtype).eps / 2
        self.error = relative_error(self.eager[:, few], self.truth)
        most = BLOCK_ROUNDINGS**0.5 * self.unit
        assert self.error <= most, (
            f"transformers' block is off by {self.error:.2e} (at most {most:.2e})"
        )

    def __call__(self, result):
        error = relative_error(result[:, self.few], self.truth)
        assert error <= self.error + self.unit, f"{error:.3e} off, transformers {self.error:.3e}"
        apart = relative_error(result, self.eager.double())
        # Each off by at most the error above, which is that of the first tokens; later ones average
        # over more values, whose errors partly cancel.
        assert apart <= 2 * self.error + self.unit, f"{apart:.3e} from transformers' output"


@dataclass(frozen=True, kw_only=True)
class TrainingStep(Case):
    """Forward, backward, clipping and AdamW of a Llama with 100 M parameters."""

    op: str = "training-step"
    model: Model = TRAINED
    dtype: torch.dtype = torch.float32
    seqlen: int = 512
    batch: int = 1
    layers: int = LAYERS
    vocabulary: int = VOCABULARY

    limit = "hf-eager"
    autocapture = False  # the optimizer, and a loss that is read

    @property
    def rounds(self):
        return 7 if self.device == "cpu" else 31

    @property
    def parameters(self) -> int:
        model = self.model
        attention = model.d_model * (sum(model.rows) + model.rows[0])
        return self.layers * (attention + 3 * model.d_model * INTERMEDIATE) + (
            self.vocabulary * model.d_model
        )

    @property
    def set_bytes(self):
        return 6 * self.parameters * self.dtype.itemsize

    @property
    def needs(self):
        # Four models with gradients and two moments, and one in float64 with gradients.
        return self.parameters * (4 * 4 * self.dtype.itemsize + 16) + (2 << 30)

    @property
    def effort(self):
        work = 6.0 * self.parameters * self.batch * self.seqlen
        return 150.0 + self.rounds * 8 * work / (1e11 if self.device == "cpu" else 1e14)

    def make(self):
        return torch.randint(self.vocabulary, (self.batch, self.seqlen), device=self.device)

    def variants(self, inputs):
        names = ("hf-eager", "rope_fused", "hf-compile", "rope_fused-compile")
        if none := baselines.missing("transformers"):
            return dict.fromkeys(names, Missing(none.reason))
        sizes = {"layers": self.layers, "intermediate": INTERMEDIATE, "vocabulary": self.vocabulary}
        plain = transformer(self.model, self.seqlen, head=True, **sizes).to(self.device).train()
        exact = copy.deepcopy(plain).double()
        patch(exact, strict=True)  # transformers' frequencies stay those of float32
        truth = [t.double() for t in _Step.backward(exact, inputs)]
        del exact
        rotary = copy.deepcopy(plain.model.rotary_emb)  # whose frequencies must stay float32
        plain = plain.to(self.dtype)
        plain.model.rotary_emb = rotary
        check = self._checker(truth)
        torch._dynamo.reset()
        steps = {name: _Step(copy.deepcopy(plain), *name.split("-")[:2]) for name in names}
        return {
            name: Variant(lambda ids, step=step: lambda: step(ids), check)
            for name, step in steps.items()
        }

    def _checker(self, truth):
        loss, gradient = truth
        # Each layer rounds like a block and a feed-forward of half as many steps, forward and back;
        # float32 angles of q and of k come on top.
        positions = torch.arange(self.seqlen, device=self.device)
        problem = Problem(self.model.spec(), positions[None], self.dtype)
        budget = (3 * BLOCK_ROUNDINGS * self.layers) ** 0.5 * torch.finfo(self.dtype).eps / 2
        budget += 2 * problem.table_error(positions)

        def check(result):
            off = abs(result[0].item() - loss.item()) / loss.item()
            assert off <= budget, f"loss {result[0].item():.6g}, not {loss.item():.6g}"
            # Up to its norm: it was clipped by one of all gradients, which float32 sums badly.
            actual = result[1].double()
            error = relative_error(actual / actual.norm(), gradient / gradient.norm())
            assert error <= budget, f"gradient off by {error:.3e}, budget {budget:.3e}"

        return check


class _Step:
    """One step of training of a model of its own, patched and compiled as it is told."""

    def __init__(self, model, who, how=""):
        if who == "rope_fused":
            patch(model, strict=True)
        self.plain = model
        self.model = torch.compile(model, dynamic=False) if how == "compile" else model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    @staticmethod
    def backward(model, ids):
        """(loss, gradient of the first projection of q), all gradients left in the parameters."""
        with torch.enable_grad():
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        first = getattr(model, "_orig_mod", model).model.layers[0].self_attn.q_proj
        return loss.detach(), first.weight.grad

    def __call__(self, ids):
        result = self.backward(self.model, ids)
        torch.nn.utils.clip_grad_norm_(self.plain.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return result
