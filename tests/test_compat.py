"""Signatures of other packages: the same arguments, and what their formulas give."""

import inspect
import math

import pytest
import torch

import rope_fused as rf
from rope_fused.compat import flash_attn, hf_kernels, liger, vllm
from tiny import entries, make_model, relative, run, tokens

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def randn(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, dtype=dtype, device=device)


def angles(length, pairs, device="cpu"):
    frequencies = 1e4 ** -(torch.arange(pairs, device=device, dtype=torch.float64) / pairs)
    return torch.arange(length, device=device)[:, None] * frequencies


def turned(x, angle, interleaved=False):
    """The rotation in float64, by complex numbers: x [.., pairs * 2], angle [.., pairs]."""
    x = x.double()
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    z = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    if interleaved:
        return torch.view_as_real(z).flatten(-2)
    return torch.cat((z.real, z.imag), -1)


def rounding(dtype):
    """Tables and result rounded to the dtype, products and sums in between."""
    return 4 * torch.finfo(dtype).eps


# -- Liger ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["whole", "partial", "narrow tables", "heads last"])
def test_liger(case, dtype, device):
    pairs = 4 if case == "partial" else 8
    q, k = randn(2, 4, 7, 16, dtype=dtype, device=device), randn(2, 2, 7, 16, dtype=dtype)
    k = k.to(device)
    angle = angles(7, pairs, device)
    cos, sin = (torch.cat((f(angle),) * 2, -1)[None].to(dtype) for f in (torch.cos, torch.sin))
    options = {}
    if case == "narrow tables":
        cos, sin, options = cos[..., :pairs], sin[..., :pairs], {"rotary_dim": 2 * pairs}
    if case == "heads last":
        q, k, options = q.transpose(1, 2), k.transpose(1, 2), {"unsqueeze_dim": 2}
        angle = angle[:, None]
    before = q.clone()
    got, count = entries(lambda: liger.liger_rotary_pos_emb(q, k, cos, sin, **options))
    assert count == {"rotate_tables": 1} and torch.equal(q, before)
    for x, y in zip((q, k), got, strict=True):
        expected = turned(x[..., : 2 * pairs], angle)
        assert (y[..., : 2 * pairs].double() - expected).abs().max() <= 8 * rounding(dtype)
        assert torch.equal(y[..., 2 * pairs :], x[..., 2 * pairs :])


def test_liger_refuses_another_width():
    q, table = randn(1, 2, 3, 8), randn(1, 3, 6)
    with pytest.raises(ValueError, match="rotary_dim must be the width of cos, or twice it"):
        liger.liger_rotary_pos_emb(q, q, table, table, rotary_dim=8)
    with pytest.raises(ValueError, match="rotary_dim must be the width of cos, or twice it"):
        liger.liger_rotary_pos_emb(q, q, table[..., :4], table[..., :4], rotary_dim=9)
    with pytest.raises(TypeError, match="rotary_dim must be"):
        liger.liger_rotary_pos_emb(q, q, table, table, rotary_dim=6.0)


def test_signature_of_liger():
    theirs = pytest.importorskip("liger_kernel.transformers.rope").liger_rotary_pos_emb
    ours, theirs = (inspect.signature(f).parameters for f in (liger.liger_rotary_pos_emb, theirs))
    assert [*theirs] == [*ours]
    assert [p.default for p in theirs.values()] == [p.default for p in ours.values()]


def test_in_the_place_of_liger(device):
    """Bound as Liger binds its function: over the name in transformers' module."""
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    model = make_model("Llama", device=device)
    ids = tokens(model)
    expected, _ = run(model, ids)
    original = modeling.apply_rotary_pos_emb
    modeling.apply_rotary_pos_emb = liger.liger_rotary_pos_emb
    try:
        logits, count = run(model, ids)
    finally:
        modeling.apply_rotary_pos_emb = original
    assert count == {"rotate_tables": 2} and torch.equal(logits, expected)


# -- flash-attention -----------------------------------------------------------------------------


def flash(x, angle, interleaved, positions):
    width = 2 * angle.shape[1]
    head = turned(x[..., :width], angle[positions][..., None, :], interleaved)
    return torch.cat((head, x[..., width:].double()), -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("case", ["batch", "offset", "offsets", "packed", "packed, offsets"])
def test_flash_attn(case, interleaved, dtype, device):
    angle = angles(64, 4, device)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    offsets = torch.tensor([3, 11, 0], device=device)
    steps = torch.arange(9, device=device)
    options, positions = {}, steps.expand(3, 9)
    if "packed" in case:
        options["cu_seqlens"] = torch.tensor([0, 2, 2, 9], device=device)  # one of them is empty
        positions = torch.cat((steps[:2], steps[:7]))
    if case == "offset":
        options["seqlen_offsets"], positions = 5, positions + 5
    elif case == "offsets":
        options["seqlen_offsets"], positions = offsets, positions + offsets[:, None]
    elif case == "packed, offsets":
        options["seqlen_offsets"] = offsets
        positions = torch.cat((steps[:2] + 3, steps[:7]))
    lead = (9,) if "packed" in case else (3, 9)
    x = randn(*lead, 2, 16, dtype=dtype, device=device)
    before = x.clone()

    def call(x, **more):
        return flash_attn.apply_rotary_emb(x, cos, sin, interleaved, **options, **more)

    got, count = entries(lambda: call(x))
    expected = flash(x, angle, interleaved, positions)
    assert count["rotate_tables"] == 1 and torch.equal(x, before) and got.dtype == dtype
    assert (got.double() - expected).abs().max() <= 8 * rounding(dtype)
    same = x.clone()
    assert call(same, inplace=True) is same and torch.equal(same, got)


def test_flash_attn_gradients(device):
    angle = angles(16, 2, device)
    x = randn(1, 5, 2, 6, dtype=torch.float64, device=device).requires_grad_()
    cos, sin = (t.requires_grad_() for t in (angle.cos(), angle.sin()))

    def function(x, cos, sin):
        return flash_attn.apply_rotary_emb(x, cos, sin, seqlen_offsets=2)

    assert torch.autograd.gradcheck(function, (x, cos, sin))
    assert torch.autograd.gradgradcheck(function, (x, cos, sin))


def test_flash_attn_refuses(device):
    table = angles(8, 4, device).float()
    with pytest.raises(ValueError, match="x must be"):
        flash_attn.apply_rotary_emb(randn(5, 2, 8), table, table)
    with pytest.raises(ValueError, match="cos and sin must be"):
        flash_attn.apply_rotary_emb(randn(1, 5, 2, 6), table, table)


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"seqlen_offsets": -2}, ValueError, "seqlen_offsets"),
        ({"seqlen_offsets": torch.tensor([0, -2])}, ValueError, "seqlen_offsets"),
        ({"seqlen_offsets": 4}, ValueError, "seqlen_offsets"),
        ({"seqlen_offsets": 1 << 70}, ValueError, "seqlen_offsets"),
        ({"seqlen_offsets": torch.tensor([0, 4])}, ValueError, "seqlen_offsets"),
        ({"seqlen_offsets": torch.tensor([1])}, ValueError, "seqlen_offsets"),
        ({"seqlen_offsets": torch.tensor(1)}, ValueError, "seqlen_offsets"),
        ({"seqlen_offsets": 1.5}, TypeError, "seqlen_offsets"),
        ({"seqlen_offsets": True}, TypeError, "seqlen_offsets"),
        ({"seqlen_offsets": torch.tensor([1.0, 0.0])}, TypeError, "seqlen_offsets"),
        ({"x": torch.ones(2, 5, 2, 8, dtype=torch.int32)}, TypeError, "x"),
        ({"x": None}, TypeError, "x"),
        ({"cos": None}, TypeError, "cos"),
        ({"sin": None}, TypeError, "sin"),
        ({"sin": torch.ones(8, 4, dtype=torch.int64)}, TypeError, "sin"),
        ({"x": torch.ones(5, 2, 8), "cu_seqlens": [0, 5]}, TypeError, "cu_seqlens"),
        ({"x": torch.ones(5, 2, 8), "cu_seqlens": torch.tensor([[0, 5]])}, ValueError, "cu_"),
        (
            {"x": torch.ones(5, 2, 8), "cu_seqlens": torch.tensor([0, 4, 2, 5])},
            ValueError,
            "cu_seq",
        ),
        ({"x": torch.ones(5, 2, 8), "cu_seqlens": torch.tensor([0, 4])}, ValueError, "cu_seqlens"),
        ({"x": torch.ones(9, 2, 8), "cu_seqlens": torch.tensor([0, 9])}, ValueError, "seqlen_off"),
    ],
)
def test_flash_attn_names_what_it_refuses(changes, error, named):
    table = angles(8, 4).float()
    given = {"x": torch.ones(2, 5, 2, 8), "cos": table.cos(), "sin": table.sin()}
    for inplace in (False, True):
        with pytest.raises(error, match=f"^{named}"):
            flash_attn.apply_rotary_emb(**given | changes, inplace=inplace)
    assert (given["x"] == 1).all()
    last = given | {"seqlen_offsets": torch.tensor([3, 0])}  # the last that the tables have
    assert flash_attn.apply_rotary_emb(**last).shape == (2, 5, 2, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_flash_attn_in_place_has_the_same_gradients(dtype, device):
    angle = angles(8, 2, device)
    start, weights = (randn(1, 5, 2, 6, dtype=dtype, device=device) for _ in range(2))
    found = []
    for inplace in (False, True):
        x = start.clone().requires_grad_()
        tables = [t.to(dtype).requires_grad_() for t in (angle.cos(), angle.sin())]
        out = flash_attn.apply_rotary_emb(x * 1, *tables, inplace=inplace)
        found.append(torch.autograd.grad((out * weights).sum(), (x, *tables)))
    for once, again in zip(*found, strict=True):
        assert torch.equal(once, again) and once.abs().sum() > 0


# -- vLLM ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("shape", ["flat", "heads"])
def test_vllm(shape, neox, device):
    layer = vllm.RotaryEmbedding(16, 8, 32, 1e4, neox, torch.float32)
    positions = torch.randint(100000, (11,), device=device)  # far beyond 32
    q = randn(11, 4, 16, dtype=torch.float64, device=device)
    k = randn(11, 2, 16, dtype=torch.float64, device=device)
    expected = []
    for x in (q, k):
        angle = positions[:, None, None] * angles(2, 4, device)[1]
        head = turned(x[..., :8], angle, interleaved=not neox)
        expected.append(torch.cat((head, x[..., 8:]), -1))
    if shape == "flat":
        q, k, expected = q.flatten(1), k.flatten(1), [e.flatten(1) for e in expected]
    got = layer(positions, q, k)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() <= 1e-9  # angles of 1e5 in float64
    alone, nothing = layer(positions, q)
    assert nothing is None and torch.equal(alone, got[0])
    assert not layer.state_dict()


def test_vllm_with_a_spec(device):
    spec = rf.RopeSpec.yarn(
        head_dim=16, rope_theta=1e4, factor=4.0, original_max_position_embeddings=16
    )
    layer = vllm.RotaryEmbedding(16, 16, 64, 1e4, True, spec=spec)
    positions, q = torch.arange(7, device=device), randn(7, 3 * 16, device=device)
    expected, _ = rf.apply_rope(q.view(7, 3, 16), None, spec, positions, layout="thd")
    assert torch.equal(layer(positions, q)[0], expected.flatten(1))
    with pytest.raises(ValueError, match="spec must have head_dim 8 and rotary_dim 8"):
        vllm.RotaryEmbedding(8, 8, 64, 1e4, True, spec=spec)


def test_vllm_takes_every_even_rotary_dim():
    """rotary_dim / head_size times head_size rounds below rotary_dim for some, as (44, 30)."""
    pairs = [(h, d) for h in range(2, 257, 2) for d in range(2, h, 2) if int(h * (d / h)) != d]
    assert (44, 30) in pairs
    for head_size, rotary_dim in pairs[::20]:
        spec = vllm.RotaryEmbedding(head_size, rotary_dim, 64, 1e4, True).rotary.spec
        assert (spec.head_dim, spec.rotary_dim) == (head_size, rotary_dim)
        assert spec.max_position_embeddings == 64
    for rotary_dim in (0, 3, 46):
        with pytest.raises(ValueError, match="rotary_dim must"):
            vllm.RotaryEmbedding(44, rotary_dim, 64, 1e4, True)


# -- what belongs to other packages --------------------------------------------------------------


def test_kernel_layer(tmp_path, device):
    """What kernels asks of a layer, and the folder that it finds it in."""
    layer = hf_kernels.apply_rotary_transformers
    assert layer.__init__ is torch.nn.Module.__init__
    extra = {name for name, _ in inspect.getmembers(layer)}
    extra -= {name for name, _ in inspect.getmembers(torch.nn.Module)}
    assert extra == {"can_torch_compile", "has_backward"}
    q = randn(1, 2, 5, 8, device=device)
    angle = torch.cat((angles(5, 4, device),) * 2, -1)[None].float()
    expected = rf.apply_rotary_pos_emb(q, q, angle.cos(), angle.sin())
    got = layer()(q, q, angle.cos(), angle.sin())
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    folder = hf_kernels.write_folder(tmp_path / "kernel")
    names = {}
    exec((folder / "build/torch-universal/__init__.py").read_text(), names)
    assert names["layers"].apply_rotary_transformers is layer


def test_kernel_layer_in_kernels(tmp_path):
    kernels = pytest.importorskip("kernels")
    folder = hf_kernels.write_folder(tmp_path / "kernel")
    repository = kernels.LocalLayerRepository(folder, layer_name="apply_rotary_transformers")

    @kernels.use_kernel_forward_from_hub("rope_fused_rotary_pos_emb")
    class Rotate(torch.nn.Module):
        def forward(self, q, k, cos, sin, unsqueeze_dim=1):
            raise AssertionError("the layer was not replaced")

    model = torch.nn.Sequential(Rotate())
    mapping = {"rope_fused_rotary_pos_emb": {"cpu": repository}}
    with kernels.use_kernel_mapping(mapping):
        kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu", use_fallback=False)
    q, table = randn(1, 2, 5, 8), randn(1, 5, 8)
    _, count = entries(lambda: model[0](q, q, table, table))
    assert count == {"rotate_tables": 1}


def test_axolotl_plugin():
    pytest.importorskip("axolotl.integrations.base")
    from axolotl.utils.dict import DictDefault

    from rope_fused.compat.axolotl import RopeFusedPlugin
    from rope_fused.compat.axolotl_args import RopeFusedArgs

    plugin, model = RopeFusedPlugin(), make_model("Llama")
    ids = tokens(model)
    expected, _ = run(model, ids)
    asked = RopeFusedArgs(rope_fused={"precision": "hf", "fuse_projection": False})
    plugin.post_model_build(DictDefault(asked.model_dump()), model)
    logits, count = run(model, ids)
    assert count == {"rotate_tables": 2} and torch.equal(logits, expected)
    plugin.post_model_build(DictDefault(RopeFusedArgs().model_dump()), model)
    assert run(model, ids)[1] == {"project": 2}
    with pytest.raises(ValueError, match="precission"):
        RopeFusedArgs(rope_fused={"precission": "hf"})
    assert plugin.get_input_args() == f"{RopeFusedArgs.__module__}.{RopeFusedArgs.__qualname__}"


@pytest.mark.parametrize("scaling", ["none", "llama", "yarn"])
@pytest.mark.parametrize("kind", ["complex_rope", "cos_sin_rope"])
def test_torchtitan_override(kind, scaling):
    pytest.importorskip("torchtitan.models.common.rope")
    from torchtitan.models.common.rope import ComplexRoPE, CosSinRoPE

    from rope_fused.compat import torchtitan

    theirs = ComplexRoPE if kind == "complex_rope" else CosSinRoPE
    config = theirs.Config(
        dim=16,
        max_seq_len=64,
        scaling=scaling,
        rope_factor=4.0,
        original_seq_len=16,
        original_max_position_embeddings=16,
    )
    if (kind, scaling) == ("cos_sin_rope", "llama"):
        pytest.skip("torchtitan has no llama scaling there")
    plain = theirs(config)
    derived = getattr(torchtitan, kind)(config)
    ours = {"complex_rope": torchtitan.FusedComplexRoPE, "cos_sin_rope": torchtitan.FusedCosSinRoPE}
    ours = ours[kind](derived)
    q, k = randn(2, 20, 4, 16), randn(2, 20, 2, 16)
    for positions in (None, torch.randint(64, (2, 20))):
        expected = plain(q, k, positions)
        got, count = entries(lambda p=positions: ours(q, k, p))
        assert count == {"rotate": 1}
        for a, b in zip(got, expected, strict=True):
            assert relative(a, b) <= 64 * 2.0**-24 * math.sqrt(2)
