"""torch.compile, export, opcheck: opaque operators, varying shapes, the results of eager mode."""

import shutil

import pytest
import torch

import rope_fused as rf
from helpers import assert_same_bits, make_longrope, make_qk, make_spec, randn
from rope_fused import ops, phase

pytestmark = [
    # Tracing sees through a patched torch.empty; the kernels are poisoned in every other file.
    pytest.mark.no_poison,
    pytest.mark.skipif(
        [*map(int, torch.__version__.split(".")[:2])] < [2, 13],
        reason="before torch 2.13 Dynamo makes no constant of a frozen dataclass",
    ),
]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Rope(torch.nn.Module):
    """q and k from one input each, rotated; the options are constants of the module."""

    def __init__(self, spec, backend, **options):
        super().__init__()
        self.spec, self.backend, self.options = spec, backend, options

    def forward(self, q, k, positions=None, **tensors):
        q2, k2 = rf.apply_rope(
            q * 2, k, self.spec, positions, backend=self.backend, **self.options, **tensors
        )
        return q2.sin(), k2


class Projection(torch.nn.Module):
    """The first half of an attention block."""

    def __init__(self, spec, backend, norm=False, device="cpu", **options):
        super().__init__()
        self.spec, self.backend, self.options = spec, backend, options
        for name, heads in (("q", 4), ("k", 2), ("v", 2)):
            setattr(self, name, torch.nn.Parameter(randn(heads * 16, 24, device=device) / 5))
        for name in ("q_norm", "k_norm"):
            weight = torch.nn.Parameter(randn(16, device=device)) if norm else None
            setattr(self, name, weight)

    def forward(self, x, positions=None, **tensors):
        return rf.qkv_rope(
            x, self.q, self.k, self.v, spec=self.spec, positions=positions, backend=self.backend,
            q_norm_weight=self.q_norm, k_norm_weight=self.k_norm, **self.options, **tensors,
        )  # fmt: skip


def tables(positions, dim=16):
    """cos and sin [1, seqlen, dim], the halves alike."""
    angle = positions[None, :, None] * make_spec(dim).inv_freq().to(positions.device)
    angle = torch.cat((angle, angle), -1).float()
    return angle.cos(), angle.sin()


def run(function, inputs, parameters=()):
    """Outputs, and the gradients of everything that wants one."""
    leaves = [
        t.detach().clone().requires_grad_() if torch.is_tensor(t) and t.is_floating_point() else t
        for t in inputs
    ]
    out = function(*leaves)
    wanted = [t for t in leaves if torch.is_tensor(t) and t.requires_grad] + list(parameters)
    grads = [torch.ones_like(y).cumsum(-1) for y in out]  # the same for both, and no constant
    return [*out, *torch.autograd.grad(out, wanted, grads, allow_unused=True)]


def assert_same_results(compiled, eager, inputs, parameters=()):
    got, want = run(compiled, inputs, parameters), run(eager, inputs, parameters)
    for a, b in zip(got, want, strict=True):
        if b is None:
            assert a is None or not a.any()
            continue
        assert a.stride() == b.stride()
        assert_same_bits(a, b)


ROPES = {
    "plain": lambda backend: Rope(make_spec(), backend),
    "bhsd": lambda backend: Rope(make_spec(interleaved=True), backend, layout="bhsd"),
    "partial": lambda backend: Rope(make_spec(partial_rotary_factor=0.5), backend),
    "longrope": lambda backend: Rope(make_longrope(original=8), backend),
    "hf": lambda backend: Rope(make_spec(), backend, precision="hf"),
    "conjugate": lambda backend: Rope(make_spec(), backend, conjugate=True, attention_factor=2.0),
}


@pytest.mark.parametrize("name", ROPES)
def test_apply_rope(name, backend, device):
    module = ROPES[name](backend)
    layout = module.options.get("layout", "bshd")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same_results(compiled, module, make_qk(layout, device=device))
    positions = torch.randint(0, 50, (2, 9), device=device)
    inputs = (*make_qk(layout, device=device), positions)
    assert_same_results(compiled, module, inputs)


def test_apply_rope_with_learned_factors(backend, device):
    spec, (q, k) = make_spec(), make_qk(device=device)
    inv_freq = torch.rand(8, dtype=torch.float64, device=device)
    factors = inv_freq, 1 + torch.rand(8, device=device), torch.rand(9, device=device)

    def function(q, k, inv_freq, attention_factor, q_scale):
        return rf.apply_rope(
            q, k, spec, inv_freq=inv_freq, attention_factor=attention_factor,
            q_scale=q_scale, backend=backend,
        )  # fmt: skip

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same_results(compiled, function, (q, k, *factors))


def test_packed_sequences(backend, device):
    module = Rope(make_longrope(original=5), backend, layout="thd")
    q, k = make_qk("thd", 1, 13, device=device)

    def function(q, k, cu_seqlens):
        return module(q, k, cu_seqlens=cu_seqlens)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ends in ([0, 5, 13], [0, 1, 1], [0, 13, 13]):
        ends[-1] = 13
        cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
        assert_same_results(compiled, function, (q, k, cu_seqlens))


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_qkv_rope(norm, backend, device):
    module = Projection(make_spec(), backend, norm, device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = randn(2, 9, 24, device=device)
    assert_same_results(compiled, module, (x,), list(module.parameters()))


def test_apply_rotary_pos_emb(device):
    q, k = make_qk("bhsd", device=device)
    cos, sin = tables(torch.arange(9, device=device))
    compiled = torch.compile(rf.apply_rotary_pos_emb, fullgraph=True, backend="aot_eager")
    assert_same_results(compiled, rf.apply_rotary_pos_emb, (q, k, cos, sin))


# -- shapes that vary --------------------------------------------------------------------------


LENGTHS = (9, 14, 33)


@pytest.mark.parametrize("name", ROPES)
def test_apply_rope_is_compiled_once(name, backend, device):
    module = ROPES[name](backend)
    layout = module.options.get("layout", "bshd")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seqlen in LENGTHS:
            inputs = make_qk(layout, seqlen=seqlen, device=device)
            assert_same_results(compiled, module, inputs)


def test_apply_rope_with_positions_is_compiled_once(backend, device):
    module = Rope(make_spec(), backend)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seqlen in LENGTHS:
            positions = torch.arange(seqlen, device=device) + seqlen
            inputs = (*make_qk(seqlen=seqlen, device=device), positions)
            assert_same_results(compiled, module, inputs)


def test_packed_sequences_are_compiled_once(backend, device):
    module = Rope(make_longrope(original=5), backend, layout="thd")

    def function(q, k, cu_seqlens):
        return module(q, k, cu_seqlens=cu_seqlens)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seqlen in LENGTHS:
            # Never as many as there are heads: Dynamo takes equal sizes for the same size.
            ends = [0, 0, 3, *range(5, seqlen, 4), seqlen]
            cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
            q, k = make_qk("thd", 1, seqlen, device=device)
            assert_same_results(compiled, function, (q, k, cu_seqlens))


def test_dynamic_tables_are_compiled_once(backend, device):
    """A table for every length, made on the device: no length is read, so none is compiled in."""
    spec = rf.RopeSpec.dynamic(head_dim=16, rope_theta=1e4, factor=2.0, max_position_embeddings=12)
    module = Rope(spec, backend)

    def function(q, k, seq_lens):
        return module(q, k, seq_lens=seq_lens)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seqlen in LENGTHS:
            seq_lens = torch.tensor([seqlen, 2 * seqlen], device=device)
            q, k = make_qk(seqlen=seqlen, device=device)
            assert_same_results(compiled, function, (q, k, seq_lens))


def test_every_argument_is_compiled_once(backend, device):
    """Whatever is checked, and said when it is wrong, must not tie the graph to one length."""
    spec = make_longrope(original=12)
    weights = [randn(n * 16, 24, device=device) for n in (4, 2, 2)]
    biases = [randn(n * 16, device=device) for n in (4, 2, 2)]
    norms = [randn(n * 16, device=device) for n in (4, 2)]

    def rotate(q, k, inv_freq, attention_factor, q_scale, positions, seq_lens):
        return rf.apply_rope(
            q, k, spec, positions, seq_lens=seq_lens, inv_freq=inv_freq,
            attention_factor=attention_factor, q_scale=q_scale, backend=backend,
        )  # fmt: skip

    def project(x, inv_freq, attention_factor, q_scale, positions, seq_lens):
        return rf.qkv_rope(
            x, *weights, spec=spec, positions=positions, seq_lens=seq_lens, inv_freq=inv_freq,
            attention_factor=attention_factor, q_scale=q_scale, q_bias=biases[0],
            k_bias=biases[1], v_bias=biases[2], q_norm_weight=norms[0], k_norm_weight=norms[1],
            norm_scope="all", backend=backend,
        )  # fmt: skip

    for function in (rotate, project):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seqlen in LENGTHS:
                first = make_qk(batch=3, seqlen=seqlen, device=device)
                first = first if function is rotate else (randn(3, seqlen, 24, device=device),)
                inv_freq = torch.rand(2, 8, dtype=torch.float64, device=device)
                q_scale = torch.rand(3, seqlen, device=device)
                positions = torch.randint(0, 50, (3, seqlen), device=device)
                seq_lens = torch.tensor([seqlen, 12, 13], device=device)
                factors = inv_freq, torch.rand(8, device=device), q_scale
                inputs = (*first, *factors, positions, seq_lens)
                assert_same_results(compiled, function, inputs)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_qkv_rope_is_compiled_once(norm, backend, device):
    module = Projection(make_spec(), backend, norm, device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seqlen in LENGTHS:
            x = randn(2, seqlen, 24, device=device)
            assert_same_results(compiled, module, (x,), list(module.parameters()))


def test_apply_rotary_pos_emb_is_compiled_once(device):
    compiled = torch.compile(
        rf.apply_rotary_pos_emb, fullgraph=True, backend="aot_eager", dynamic=True
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seqlen in LENGTHS:
            q, k = make_qk("bhsd", seqlen=seqlen, device=device)
            inputs = (q, k, *tables(torch.arange(seqlen, device=device)))
            assert_same_results(compiled, rf.apply_rotary_pos_emb, inputs)


def test_two_specs_do_not_share_a_graph(backend, device):
    """The tables are constants of the graph: another spec must not be given them."""
    q, k = make_qk(device=device)

    def function(q, k, spec):
        return rf.apply_rope(q, k, spec, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for theta in (1e4, 5e5):
        spec = make_spec(rope_theta=theta)
        for a, b in zip(compiled(q, k, spec), function(q, k, spec), strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "nothing-to-differentiate"])
def test_inference(grad, backend, device):
    """Without a graph, and with gradients enabled but nothing that wants one."""
    rope = Rope(make_spec(), backend)
    projection = Projection(make_spec(), backend, True, device).requires_grad_(False)
    q, k = make_qk(device=device)
    x = randn(2, 9, 24, device=device)
    with torch.set_grad_enabled(grad):
        for module, inputs in ((rope, (q, k)), (projection, (x,))):
            compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
            for a, b in zip(compiled(*inputs), module(*inputs), strict=True):
                assert not a.requires_grad
                assert_same_bits(a, b)


# -- inductor, export --------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_inductor(backend, device):
    """Once through the real compiler: a projection and a rotation, forward and backward."""
    projection = Projection(make_spec(), backend, True, device)

    def function(x):
        q, k, v = projection(x)
        q2, k2 = rf.apply_rope(q, k, projection.spec, backend=backend)
        return q2, k2, v

    x = randn(2, 9, 24, device=device)
    compiled = torch.compile(function, fullgraph=True)
    with torch.no_grad():
        for a, b in zip(compiled(x), function(x), strict=True):
            assert_same_bits(a, b)
    got, want = (run(f, (x,), list(projection.parameters())) for f in (compiled, function))
    for a, b in zip(got, want, strict=True):
        # Inductor may order the sums over 18 rows and 128 features otherwise.
        slack = 128 * 2.0**-24 * 128 * b.abs().max()
        assert (a - b).abs().max() <= slack


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_export(dynamic, backend, device):
    seqlen = torch.export.Dim("seqlen", min=2, max=4096)
    for module, inputs, varying, name in (
        (Rope(make_spec(), backend), make_qk(device=device), 2, "rotate"),
        (Projection(make_spec(), backend, True, device), (randn(2, 9, 24, device=device),), 1,
         "project"),
    ):  # fmt: skip
        shapes = ({1: seqlen},) * varying
        if dynamic:
            shapes = {"q": shapes[0], "k": shapes[0]} if varying == 2 else {"x": shapes[0]}
        program = torch.export.export(module, inputs, dynamic_shapes=shapes if dynamic else None)
        targets = [str(node.target) for node in program.graph.nodes]
        assert targets.count(f"rope_fused.{name}.default") == 1, targets
        for length in (9, 30) if dynamic else (9,):
            cut = [t[:, :1].expand(-1, length, *t.shape[2:]).clone() for t in inputs]
            for a, b in zip(program.module()(*cut), module(*cut), strict=True):
                assert_same_bits(a, b)


# -- the operators themselves ------------------------------------------------------------------


def make_rotation(device, **changes):
    spec = make_spec()
    rows = spec.rows()
    operands = {
        "inv_freq": rows.to(device),
        "turns": phase.exact_turns(rows).to(device),
        "scale": spec.scale_rows().to(device),
    }
    return ops.Rotation(**operands | changes)


def rotations(device, backend):
    tokens = torch.randint(0, 100, (2, 9), device=device)
    two = make_longrope(original=8)
    yield make_rotation(device, backend=backend)
    yield make_rotation(
        device,
        positions=tokens,
        token_scale=torch.rand(2, 9, device=device),
        q_norm=torch.rand(16, device=device),
        k_norm=torch.rand(16, device=device),
        interleaved=True,
        conjugate=True,
        backend=backend,
    )
    yield make_rotation(
        device,
        inv_freq=two.rows().to(device),
        turns=two.turns().to(device),
        scale=two.scale_rows().to(device),
        table_index=(tokens % 2).int(),
        layout="bhsd",
        backend=backend,
    )


def samples(name, device, backend):
    """Operands for each operator, with and without what is optional."""
    g = {"device": device}
    if name == "token_rows":
        tokens = torch.randint(0, 100, (2, 9), **g)
        ends, lengths = torch.tensor([0, 4, 9], **g), torch.tensor([4, 5], **g)
        yield tokens, None, None, 2, 9, 8, 0, True, "seq_lens"
        yield tokens, None, lengths, 2, 9, 8, 4, True, "seq_lens"
        yield None, ends, None, 1, 9, None, 0, False, "seq_lens"
        return
    if name == "rotate_tables":
        q, k = make_qk("bhsd", **g)
        for transpose in (False, True):
            yield q, k, *tables(torch.arange(9, **g)), False, 0, transpose, "bhsd", backend
        yield q, None, *tables(torch.arange(9, **g), 8), True, 4, False, "bhsd", backend
        return
    for rotation in rotations(device, backend):
        q, k = make_qk(rotation.layout, **g)
        if name == "rotate":
            yield q, k, *rotation
            yield q.transpose(0, 1).contiguous().transpose(0, 1), None, *rotation
        elif name == "rotate_backward":
            yield torch.randn_like(q), torch.randn_like(k), None, q, k, *rotation, False
            if rotation.layout == "bshd":
                v = torch.randn_like(k)
                yield torch.randn_like(q), torch.randn_like(k), v, q, k, *rotation, True
            if rotation.q_norm is None:
                yield torch.randn_like(q), None, None, None, None, *rotation, False
        elif name == "project" and rotation.layout == "bshd":
            x, wq, wk = randn(2, 9, 24, **g), randn(64, 24, **g), randn(32, 24, **g)
            bias = randn(64, **g)
            yield x, wq, wk, wk + 1, None, None, None, *rotation, 16, False
            yield x, wq, wk, None, bias, bias[:32], None, *rotation, 16, True


def operators():
    return sorted(name for name in dir(torch.ops.rope_fused) if not name.startswith("_"))


def test_every_operator_has_samples(device):
    assert {"rotate", "rotate_backward", "rotate_tables", "project"} <= set(operators())
    for name in operators():
        if name != "name":
            assert list(samples(name, device, "auto")), f"no samples for the operator {name}"


@pytest.mark.parametrize(
    "name", ["rotate", "rotate_backward", "rotate_tables", "project", "token_rows"]
)
def test_opcheck(name, backend, device):
    operator = getattr(torch.ops.rope_fused, name).default
    for operands in samples(name, device, backend):
        torch.library.opcheck(operator, operands)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
def test_opcheck_in_other_dtypes(dtype, backend, device):
    rotation = make_rotation(device, backend=backend)
    q, k = make_qk(dtype=dtype, device=device)
    torch.library.opcheck(torch.ops.rope_fused.rotate.default, (q, k, *rotation))
    x, w = randn(2, 9, 24, dtype=dtype, device=device), randn(32, 24, dtype=dtype, device=device)
    operands = (x, w, w, w, None, None, None, *rotation, 16, False)
    torch.library.opcheck(torch.ops.rope_fused.project.default, operands)
