"""precision="hf": the same bits as the installed transformers on the same device."""

import pytest
import torch

import rope_fused as rf
from helpers import assert_same_bits, assert_within_projection_budget, randn
from rope_fused import ops

transformers = pytest.importorskip("transformers")
llama = pytest.importorskip("transformers.models.llama.modeling_llama")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.25 * j for j in range(8)],
        "long_factor": [2.0 + 0.5 * j for j in range(8)],
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def make_config(name):
    return transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        rope_parameters={"rope_theta": 5e5, **ROPES[name]},
    )


def make_qk(dtype, device, seqlen=70, unsqueeze_dim=1, contiguous=False):
    """q and k as attention modules hold them: a projection's output, viewed and transposed."""
    q, k = (randn(2, seqlen, n, 16, dtype=dtype, device=device) for n in (4, 2))
    if unsqueeze_dim == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    if contiguous:
        q, k = q.contiguous(), k.contiguous()
    return q.detach().requires_grad_(), k.detach().requires_grad_()


def assert_same_forward_and_backward(ours, theirs, inputs):
    """The same bits forward; and backward, from gradients of the same values and strides."""
    theirs_out = theirs(*inputs)
    grads = [torch.randn_like(y) for y in theirs_out]
    want = torch.autograd.grad(theirs_out, inputs, grads)
    ours_out = ours(*inputs)
    got = torch.autograd.grad(ours_out, inputs, grads)
    for a, b in zip(ours_out, theirs_out, strict=True):
        assert_same_bits(a, b, "forward")
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a + 0.0, b + 0.0, "backward")  # whichever sign a zero has


@pytest.mark.parametrize("contiguous", [False, True], ids=["transposed", "contiguous"])
@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_apply_rotary_pos_emb(dtype, unsqueeze_dim, contiguous, device):
    rotary = llama.LlamaRotaryEmbedding(make_config("yarn")).to(device)
    q, k = make_qk(dtype, device, unsqueeze_dim=unsqueeze_dim, contiguous=contiguous)
    positions = torch.randint(0, 250, (2, 70), device=device)
    for cos, sin in (rotary(q, positions), rotary(q, positions[:1])):
        assert cos.dtype == dtype
        assert_same_forward_and_backward(
            lambda q, k, t=(cos, sin): rf.apply_rotary_pos_emb(q, k, *t, unsqueeze_dim),
            lambda q, k, t=(cos, sin): llama.apply_rotary_pos_emb(q, k, *t, unsqueeze_dim),
            (q, k),
        )


def test_apply_rotary_pos_emb_float64(device):
    q, k = make_qk(torch.float64, device)
    angle = torch.randn(2, 70, 16, dtype=torch.float64, device=device)
    assert_same_forward_and_backward(
        lambda q, k: rf.apply_rotary_pos_emb(q, k, angle.cos(), angle.sin()),
        lambda q, k: llama.apply_rotary_pos_emb(q, k, angle.cos(), angle.sin()),
        (q, k),
    )


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_float32_tables_promote_as_torch_does(narrow, device):
    q, k = make_qk(narrow, device)
    angle = torch.randn(1, 70, 16, device=device)
    got = rf.apply_rotary_pos_emb(q, k, angle.cos(), angle.sin())
    want = llama.apply_rotary_pos_emb(q, k, angle.cos(), angle.sin())
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)
    sum((y * y).sum() for y in got).backward()
    assert q.grad.dtype == k.grad.dtype == narrow


def test_tables_with_unequal_halves(backend, device):
    """Nothing in the signature says that the halves of cos repeat: a table may hold anything."""
    q, k = make_qk(torch.float32, device)
    cos, sin = torch.randn(2, 2, 70, 16, device=device)
    constants = (False, 0, False, "bhsd", backend)  # the public function has no backend=
    assert_same_forward_and_backward(
        lambda q, k: ops.rotate_tables(q, k, cos, sin, *constants),
        lambda q, k: llama.apply_rotary_pos_emb(q, k, cos, sin),
        (q, k),
    )


def test_tables_are_differentiable(device):
    q, k = (t.detach()[:1, :, :3].requires_grad_() for t in make_qk(torch.float64, device, 3))
    tables = torch.randn(2, 1, 3, 16, dtype=torch.float64, device=device).unbind()
    tables = [t.clone().requires_grad_() for t in tables]
    assert torch.autograd.gradcheck(rf.apply_rotary_pos_emb, (q, k, *tables))
    assert torch.autograd.gradgradcheck(rf.apply_rotary_pos_emb, (q, k, *tables))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", ROPES)
def test_apply_rope(name, dtype, backend, device):
    config = make_config(name)
    spec = rf.RopeSpec.from_config(config)
    for seqlen in (40, 70):  # on either side of the original length
        rotary = llama.LlamaRotaryEmbedding(config).to(device)
        q, k = make_qk(dtype, device, seqlen)
        positions = torch.arange(seqlen, device=device)[None]
        cos, sin = rotary(q, positions)
        for given in (None, positions, positions[0], positions.int().expand(2, -1)):
            assert_same_forward_and_backward(
                lambda q, k, p=given: rf.apply_rope(
                    q, k, spec, p, layout="bhsd", precision="hf", backend=backend
                ),
                lambda q, k, t=(cos, sin): llama.apply_rotary_pos_emb(q, k, *t),
                (q, k),
            )


def test_apply_rope_in_other_layouts(backend, device):
    config = make_config("yarn")
    spec = rf.RopeSpec.from_config(config)
    q, k = make_qk(torch.bfloat16, device, unsqueeze_dim=2)
    cos, sin = llama.LlamaRotaryEmbedding(config).to(device)(
        q, torch.arange(70, device=device)[None]
    )
    want_q, want_k = llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    got_q, got_k = rf.apply_rope(q, k, spec, precision="hf", backend=backend)
    assert_same_bits(got_q, want_q)
    assert_same_bits(got_k, want_k)
    got_q, none = rf.apply_rope(q[0], None, spec, layout="thd", precision="hf", backend=backend)
    assert none is None
    assert_same_bits(got_q, want_q[0])


def test_the_whole_batch_chooses_the_table(backend, device):
    """transformers looks at the largest position of the batch, so one long row makes all long."""
    config = make_config("longrope")
    spec = rf.RopeSpec.from_config(config)
    q, k = make_qk(torch.float32, device)
    positions = torch.stack((torch.arange(70), torch.arange(70) - 40)).to(device)
    for rows in (positions, positions.flip(0), positions - 20):
        cos, sin = llama.LlamaRotaryEmbedding(config).to(device)(q, rows)
        want = llama.apply_rotary_pos_emb(q, k, cos, sin)
        got = rf.apply_rope(q, k, spec, rows, layout="bhsd", precision="hf", backend=backend)
        for a, b in zip(got, want, strict=True):
            assert_same_bits(a, b)


def test_frequencies_per_table(backend, device):
    """A row of its own for short and for long: the batch's length chooses here as well."""
    spec = rf.RopeSpec.from_config(make_config("longrope"))
    rows = torch.rand(2, 8, dtype=torch.float64, device=device)
    for seqlen, row in ((64, 0), (65, 1)):
        q, k = make_qk(torch.float32, device, seqlen)
        options = {"layout": "bhsd", "precision": "hf", "backend": backend}
        got = rf.apply_rope(q, k, spec, inv_freq=rows, **options)
        want = rf.apply_rope(q, k, spec, inv_freq=rows[row], **options)
        for a, b in zip(got, want, strict=True):
            assert_same_bits(a, b)


def test_conjugate_is_the_rotation_back(backend, device):
    """The negative of sin, which is exact: the same bits as the formula with it."""
    config = make_config("default")
    spec = rf.RopeSpec.from_config(config)
    q, k = make_qk(torch.bfloat16, device)
    cos, sin = llama.LlamaRotaryEmbedding(config).to(device)(
        q, torch.arange(70, device=device)[None]
    )
    want = llama.apply_rotary_pos_emb(q, k, cos, -sin)
    got = rf.apply_rope(q, k, spec, layout="bhsd", precision="hf", conjugate=True, backend=backend)
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)


def test_qkv_rope(backend, device):
    """Projection, view and rotation as LlamaAttention does them."""
    config = make_config("yarn")
    spec = rf.RopeSpec.from_config(config)
    rotary = llama.LlamaRotaryEmbedding(config).to(device)
    for dtype in (torch.float32, torch.bfloat16):
        x = randn(2, 9, 64, dtype=dtype, device=device)
        weights = [randn(n * 16, 64, dtype=dtype, device=device) / 8 for n in (4, 2, 2)]
        q, k, v = (
            torch.nn.functional.linear(x, w).view(2, 9, -1, 16).transpose(1, 2) for w in weights
        )
        cos, sin = rotary(x, torch.arange(9, device=device)[None])
        want = (*llama.apply_rotary_pos_emb(q, k, cos, sin), v)
        tables = [t.unsqueeze(2).double() for t in (cos, sin)]
        wide = []
        for w in weights:
            y = torch.nn.functional.linear(x.double(), w.double()).view(2, 9, -1, 16)
            wide.append(y)
        for i in (0, 1):
            a, b = wide[i].chunk(2, -1)
            wide[i] = wide[i] * tables[0] + torch.cat((-b, a), -1) * tables[1]
        got = rf.qkv_rope(x, *weights, spec=spec, precision="hf", backend=backend)
        # The GEMM is split as it suits each backend: no worse, if not the same bits.
        for y, y64, formula in zip(got, wide, want, strict=True):
            assert_within_projection_budget(y, y64, formula.transpose(1, 2))
