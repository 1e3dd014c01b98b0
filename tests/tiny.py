"""Shared by the tests of the patcher: tiny transformers models, and a count of our operators."""

import contextlib

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import rope_fused as rf

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
LAYERS = 2
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small gain nothing from a second thread, and lose much where cores are shared.

    For every test of a module that imports it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(family="Llama", dtype=torch.float64, device="cpu", rope=YARN, **config):
    """A causal LM with grouped queries and a head_dim that is not hidden_size / heads.

    Biases and norm weights, which start as zeros and ones, are random: their gradients and their
    use would otherwise go untested.
    """
    config = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "rope_parameters": dict(rope),
    } | config
    config = getattr(transformers, f"{family}Config")(**config)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p), alpha=0.3)
    return model.to(device=device, dtype=dtype).eval()


def with_exact_tables(model):
    """The model, its rotary module with tables as exact as float64 (transformers' are float32)."""
    spec = rf.RopeSpec.from_config(model.config)

    def forward(x, position_ids):
        tables = spec.cos_sin(position_ids, dtype=torch.float64)
        return tuple(
            (spec.attention_factor * torch.cat((t, t), -1)).to(x.device, x.dtype) for t in tables
        )

    model.model.rotary_emb.forward = forward
    return model


def tokens(model, batch=2, seqlen=13):
    return torch.randint(1, model.config.vocab_size, (batch, seqlen), device=model.device)


def attentions(model):
    return [m for m in model.modules() if type(m).__name__.endswith("Attention")]


class Entries(TorchDispatchMode):
    """Counts our operators by name, and the products of torch that the weights of q or k enter."""

    def __init__(self, model=None):
        super().__init__()
        self.count = {}
        self.outside = 0
        self.weights = set()
        for attention in attentions(model) if model is not None else ():
            for linear in (attention.q_proj, attention.k_proj):
                self.weights.add(linear.weight.untyped_storage().data_ptr())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "rope_fused":
            name = func._schema.name.removeprefix("rope_fused::")
            self.count[name] = self.count.get(name, 0) + 1
        elif self.weights and func.overloadpacket in _PRODUCTS:
            storages = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
            self.outside += bool(storages & self.weights)
        return func(*args, **(kwargs or {}))


_PRODUCTS = {
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten.bmm,
    torch.ops.aten.baddbmm,
    torch.ops.aten.matmul,
    torch.ops.aten.linear,
}


def entries(function):
    """(result of ``function()``, {operator of ours: times it was entered})."""
    with Entries() as seen:
        result = function()
    return result, seen.count


def run(model, ids):
    """(logits, {operator of ours: times it was entered}) of a forward without gradients."""
    with torch.no_grad():
        return entries(lambda: model(ids).logits)


def gradients(model, ids, **inputs):
    """(logits, {parameter name: gradient}) of a training step."""
    model.zero_grad()
    out = model(ids, labels=ids, **inputs)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def relative(a, b):
    """The norm of a - b as a share of that of b."""
    return ((a - b).norm() / b.norm().clamp(min=torch.finfo(b.dtype).tiny)).item()


@contextlib.contextmanager
def unchanged_namespace(*owners):
    """Asserts that nothing is put into, taken from or replaced in the namespaces of ``owners``."""
    before = [dict(vars(owner)) for owner in owners]
    yield
    for owner, old in zip(owners, before, strict=True):
        new = dict(vars(owner))
        assert new.keys() == old.keys(), owner
        assert all(new[name] is old[name] for name in old), owner
