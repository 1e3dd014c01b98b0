"""The modules: what they compute, what their state dicts are, and what does not reach their
frequencies."""

import copy
import io

import pytest
import torch
from torch import nn

import rope_fused as rf
from tiny import entries, make_model

YARN = rf.RopeSpec.yarn(
    head_dim=16, rope_theta=1e4, factor=4.0, original_max_position_embeddings=16
)
LONG = rf.RopeSpec.longrope(
    head_dim=16,
    rope_theta=1e4,
    factor=4.0,
    original_max_position_embeddings=16,
    short_factor=[1.0 + i for i in range(8)],
    long_factor=[2.0 + i for i in range(8)],
)


def randn(*shape, dtype=torch.float64, device="cpu"):
    return torch.randn(*shape, dtype=dtype, device=device)


def projection(**options):
    options = {"dtype": torch.float64} | options
    module = rf.QKVProjection(YARN, 24, 4, 2, **options)
    with torch.no_grad():
        for norm in (module.q_norm, module.k_norm):
            if norm is not None:
                norm.weight.uniform_(0.5, 1.5)
    return module


@pytest.mark.parametrize("spec", [YARN, LONG], ids=["yarn", "longrope"])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_rotary_embedding(layout, spec, device):
    shapes = {"bshd": ((2, 20, 4, 16), (2, 20, 2, 16)), "bhsd": ((2, 4, 20, 16), (2, 2, 20, 16))}
    q, k = (randn(*shape, device=device) for shape in shapes[layout])
    positions = torch.randint(1000, (2, 20), device=device)
    module = rf.RotaryEmbedding(spec, layout=layout)
    expected = rf.apply_rope(q, k, spec, positions, layout=layout)
    for got, want in zip(module(q, k, positions), expected, strict=True):
        assert torch.equal(got, want)
    assert torch.equal(
        module(q, conjugate=True)[0], rf.apply_rope(q, None, spec, layout=layout, conjugate=True)[0]
    )
    assert module(q)[1] is None
    assert not [*module.parameters()] and not [*module.buffers()] and not module.state_dict()


@pytest.mark.parametrize("how", ["bfloat16", "half then float", "meta", "deepcopy", "pickle"])
def test_nothing_reaches_the_frequencies(how, device):
    module = rf.RotaryEmbedding(YARN, learn=("inv_freq",))
    if how == "bfloat16":
        module.to(torch.bfloat16)
    elif how == "half then float":
        module.half().float()
    elif how == "meta":
        with torch.device("meta"):
            module = rf.RotaryEmbedding(YARN, learn=("inv_freq",))
        module.to_empty(device=device)
        module.reset_parameters()
    elif how == "deepcopy":
        module = copy.deepcopy(module)
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        module = torch.load(file, weights_only=False)
    module.to(device)
    q = randn(1, 3, 2, 16, device=device)
    positions = torch.tensor([0, 131071, 2**31 - 1], device=device)
    assert torch.equal(module(q, None, positions)[0], rf.apply_rope(q, None, YARN, positions)[0])


def test_learned_factors(device):
    module = rf.RotaryEmbedding(YARN, learn=("inv_freq", "attention_factor"), dtype=torch.float64)
    module.to(device)
    assert [*module.state_dict()] == ["log_inv_freq", "log_attention_factor"]
    q = randn(1, 5, 2, 16, device=device)
    with torch.no_grad():
        module.log_inv_freq.copy_(randn(1, 8) / 10)
        module.log_attention_factor.fill_(0.1)
    inv_freq = (YARN.inv_freq().to(device) * module.log_inv_freq[0].exp()).detach()
    factor = torch.tensor(YARN.attention_factor, dtype=torch.float64, device=device)
    factor = (factor * module.log_attention_factor.exp()).detach()
    expected, _ = rf.apply_rope(q, None, YARN, inv_freq=inv_freq, attention_factor=factor)
    got, _ = module(q)
    assert torch.allclose(got, expected, rtol=0, atol=2.0**-48)
    # By the chain rule: d/d log f = f d/df.
    leaves = inv_freq.requires_grad_(), factor.requires_grad_()
    expected, _ = rf.apply_rope(q, None, YARN, inv_freq=leaves[0], attention_factor=leaves[1])
    grads = torch.autograd.grad(expected.square().sum() + expected.sum(), leaves)
    (got.square().sum() + got.sum()).backward()
    for parameter, leaf, grad in zip(module.parameters(), leaves, grads, strict=True):
        want = (leaf * grad).detach().reshape(parameter.shape)
        assert torch.allclose(parameter.grad, want, rtol=2.0**-40, atol=2.0**-40)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True},
        {"qk_norm": "head"},
        {"qk_norm": "all"},
        {"value": False},
        {"learn": ("inv_freq",)},
    ],
    ids=str,
)
def test_projection_fused_and_not(options, packed, device):
    """A hook on a child makes the module call its children: the same, in other steps."""
    module = projection(**options).to(device)
    x = randn(*((14,) if packed else (2, 7)), 24, device=device).requires_grad_()
    lengths = torch.tensor([0, 5, 14], device=device)
    tokens = {"cu_seqlens": lengths} if packed else {}
    assert module.fused

    def step():
        outputs = [t for t in module(x, **tokens) if t is not None]
        loss = sum((t.sin() * t).sum() for t in outputs)
        return outputs, torch.autograd.grad(loss, (x, *module.parameters()))

    (outputs, grads), count = entries(step)
    assert count["project"] == 1 and "rotate" not in count
    seen = []
    module.q_proj.register_forward_hook(lambda *args: seen.append(args))
    assert not module.fused
    (again, more), count = entries(step)
    assert count["rotate"] >= 1 and "project" not in count and seen
    for a, b in zip((*outputs, *grads), (*again, *more), strict=True):
        assert (a - b).abs().max() <= 2.0**-40 * (1 + b.abs().max())


def test_adapters_are_not_skipped(device):
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.weight, self.bias = base.weight, base.bias

        def forward(self, x):
            return self.base(x) + 1.0

    module = projection().to(device)
    x = randn(2, 7, 24, device=device)
    q, _, _ = module(x)
    module.q_proj = Adapter(module.q_proj)
    moved, _, _ = module(x)
    expected, _ = rf.apply_rope(torch.ones_like(q), None, YARN)
    assert not module.fused and torch.allclose(moved - q, expected, atol=1e-12)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_state_dicts_of_transformers(family, device):
    pytest.importorskip("transformers", minversion="5")
    model = make_model(family, device=device)
    attention = model.model.layers[0].self_attn
    module = rf.RopeAttention(
        rf.RopeSpec.from_config(model.config),
        32,
        4,
        2,
        bias=family == "Qwen2",
        o_bias=False,
        qk_norm="head" if family == "Qwen3" else None,
        dtype=torch.float64,
        device=device,
    )
    module.load_state_dict(attention.state_dict())
    x = randn(2, 9, 32, device=device)
    positions = torch.arange(9, device=device)[None]
    tables = model.model.rotary_emb(x, positions)
    mask = torch.full((9, 9), -torch.inf, dtype=torch.float64, device=device).triu(1)
    expected, _ = attention(x, position_embeddings=tables, attention_mask=mask[None, None])
    got, count = entries(lambda: module(x))
    assert count == {"project": 1}
    assert (got - expected).norm() <= 2e-5 * expected.norm()  # transformers' tables are float32
    masked = module(x, attn_mask=mask)
    assert torch.allclose(masked, got, rtol=0, atol=1e-12)


def test_compile_and_export(device):
    torch._dynamo.reset()
    module = projection(qk_norm="head", learn=("inv_freq",)).to(device)
    x = randn(2, 7, 24, device=device)
    expected = module(x)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)(x)
    exported = torch.export.export(module, (x,)).module()(x)
    for got in (compiled, exported):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    torch._dynamo.reset()


def test_layers_share_their_compiled_code(device):
    """Each with a spec of its own, and copies, which all mean the same."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    layers = [
        rf.RopeAttention(rf.RopeSpec.default(head_dim=8, rope_theta=1e4), 16, 2, device=device)
        for _ in range(3)
    ]
    layers.append(copy.deepcopy(layers[0]))
    for layer in layers:
        layer.compile(fullgraph=True, backend=backend)
        layer(torch.randn(1, 5, 16, device=device))
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rf.RotaryEmbedding("yarn"), TypeError, "spec must be a RopeSpec"),
        (lambda: rf.RotaryEmbedding(YARN, layout="bsh"), ValueError, "layout must be one of"),
        (lambda: rf.RotaryEmbedding(YARN, learn="inv_freq"), TypeError, "learn must be a tuple"),
        (lambda: rf.RotaryEmbedding(YARN, learn=("beta",)), ValueError, "learn must be one of"),
        (
            lambda: rf.RotaryEmbedding(
                rf.RopeSpec.dynamic(
                    head_dim=16, rope_theta=1e4, factor=2.0, max_position_embeddings=64
                ),
                learn=("inv_freq",),
            ),
            ValueError,
            "a table per length",
        ),
        (lambda: rf.QKVProjection(YARN, 24, 4, qk_norm="heads"), ValueError, "qk_norm must be"),
        (
            lambda: rf.QKVProjection(YARN, 24, 4, qk_norm="head", precision="hf"),
            ValueError,
            "qk_norm must be None with precision='hf'",
        ),
        (lambda: rf.RopeAttention(YARN, 24, 4, value=False), ValueError, "value must not be"),
    ],
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()
