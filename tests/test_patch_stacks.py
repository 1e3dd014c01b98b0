"""A patched model in training stacks: adapters, hooks, copies, checkpointing, autocast, compile."""

import copy
import gc
import io
import weakref
from functools import partial, update_wrapper

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

pytest.importorskip("transformers", minversion="5")

import rope_fused as rf  # noqa: E402
from helpers import same_bits  # noqa: E402
from tiny import (  # noqa: E402
    LAYERS,
    attentions,
    entries,
    gradients,
    make_model,
    one_thread,  # noqa: F401
    relative,
    run,
    tokens,
)

# float64 against transformers' float32 tables, as in test_patch.py.
EXACT = 2e-5
FUSED, ROTATED, TABLES = {"project": LAYERS}, {"rotate": LAYERS}, {"rotate_tables": LAYERS}


# -- adapters ------------------------------------------------------------------------------------


class Lora(nn.Module):
    """What PEFT puts in the place of a Linear: the Linear, and a low-rank product beside it."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base_layer = base
        self.in_features, self.out_features = base.in_features, base.out_features
        kwargs = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.a = nn.Parameter(torch.randn(rank, base.in_features, **kwargs))
        self.b = nn.Parameter(torch.randn(base.out_features, rank, **kwargs))

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + x @ self.a.mT @ self.b.mT

    def merged(self):
        linear = copy.deepcopy(self.base_layer)
        with torch.no_grad():
            linear.weight += self.b @ self.a
        return linear


def add_lora(model, names):
    torch.manual_seed(3)
    for attention in attentions(model):
        for name in names:
            setattr(attention, name, Lora(getattr(attention, name)))
    return model


@pytest.mark.parametrize("precision", ["exact", "hf"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("names", [("q_proj",), ("q_proj", "v_proj"), ("k_proj",), ("v_proj",)])
def test_lora(names, when, precision, device):
    plain = make_model("Qwen2", device=device)
    ids = tokens(plain)
    ours = copy.deepcopy(plain)
    if when == "before":
        add_lora(ours, names)
    report = rf.patch(ours, precision=precision)
    if when == "after":
        add_lora(ours, names)
    expected, expected_grads = gradients(add_lora(copy.deepcopy(plain), names), ids)
    fused = names == ("v_proj",)  # q and k are fused while v's own module runs
    if when == "before":
        assert [*report.levels.values()] == [2 if fused else 0] * LAYERS
        said = f"{names[0]} is a {Lora.__module__}.Lora, not a torch.nn.Linear"
        assert fused or said == report.reasons["model.layers.0.self_attn"]
    logits, count = run(ours, ids)
    assert count == (TABLES if precision == "hf" else FUSED if fused else ROTATED)
    assert relative(logits, expected) <= EXACT
    _, grads = gradients(ours, ids)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert relative(grad, expected_grads[name]) <= EXACT, name
    # merge_and_unload: plain linears again, with the adapter in their weights.
    for attention in attentions(ours):
        for name in names:
            setattr(attention, name, getattr(attention, name).merged())
    logits, count = run(ours, ids)
    assert count == (TABLES if precision == "hf" else FUSED)
    assert relative(logits, expected) <= EXACT


def test_strict_and_lora(device):
    model = add_lora(make_model(device=device), ("k_proj",))
    with pytest.raises(ValueError, match=f"k_proj is a {Lora.__module__}.Lora, not a"):
        rf.patch(model, strict=True)
    assert run(model, tokens(model))[1] == {}
    rf.patch(model, strict=True, fuse_projection=False)
    assert run(model, tokens(model))[1] == ROTATED


# -- weights that cannot be read -----------------------------------------------------------------


class Quantised(torch.Tensor):
    """A weight as torchao keeps it, in a plain Linear: whoever uses it gets it dequantised."""

    @staticmethod
    def __new__(cls, codes, scale):
        options = {"dtype": scale.dtype, "device": scale.device}
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, **options)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    @classmethod
    def of(cls, weight):
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def whole(self):
        return self.codes * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        args, kwargs = tree_map_only(cls, cls.whole, (args, kwargs or {}))
        return func(*args, **kwargs)


class Linear4bit(nn.Linear):
    """As bitsandbytes does it: a Linear whose weight is stored in another shape."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.view(self.out_features, -1), self.bias)


def by_weight(linear):
    weight = Quantised.of(linear.weight.detach())
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear, weight.whole()


def by_class(linear):
    whole = linear.weight.detach().clone()
    linear.__class__ = Linear4bit
    linear.weight = nn.Parameter(whole.view(-1, 1), requires_grad=False)
    return linear, whole


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("quantise", [by_weight, by_class])
@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_quantised_layers(family, quantise, when, device):
    """Their modules run, and the norm of Qwen3 and the rotation are ours."""
    ours = make_model(family, device=device)
    plain = copy.deepcopy(ours)
    ids = tokens(ours)
    if when == "after":
        rf.patch(ours)
    for name in ("q_proj", "k_proj", "v_proj"):
        for mine, theirs in zip(attentions(ours), attentions(plain), strict=True):
            _, whole = quantise(getattr(mine, name))
            getattr(theirs, name).weight = nn.Parameter(whole)
    if when == "before":
        report = rf.patch(ours)
        assert [*report.levels.values()] == [1 if family == "Qwen3" else 0] * LAYERS
        assert all(r.startswith("q_proj ") for r in report.reasons.values())
    expected, expected_grads = gradients(plain, ids)
    ours.zero_grad()
    out, count = entries(lambda: ours(ids, labels=ids))
    assert count == ROTATED and relative(out.logits.detach(), expected) <= EXACT
    out.loss.backward()
    grads = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert len(grads) == len(expected_grads) - 3 * LAYERS
    for name, grad in grads.items():
        assert relative(grad, expected_grads[name]) <= EXACT, name


@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_that_come_and_go(when, device):
    """DeepSpeed's ZeRO-3: a weight has no elements but while the module that owns it runs."""
    model = make_model(device=device)
    ids = tokens(model)
    expected, expected_grads = gradients(copy.deepcopy(model), ids)
    if when == "after":
        rf.patch(model)
    whole = {p: p.data for p in model.parameters()}

    def gather(module, *_):
        for p in module.parameters(recurse=False):
            p.data = whole[p]

    def release(module, *_):
        for p in module.parameters(recurse=False):
            p.data = torch.empty(0, dtype=p.dtype, device=device)

    for module in model.modules():
        if module._parameters:
            release(module)
            module.register_forward_pre_hook(gather)
            module.register_forward_hook(release)
    if when == "before":
        report = rf.patch(model)
        assert [*report.levels.values()] == [0] * LAYERS
        assert "q_proj has hooks" in report.reasons["model.layers.0.self_attn"]
    out, count = entries(lambda: model(ids, labels=ids))
    assert count == ROTATED and relative(out.logits.detach(), expected) <= EXACT
    for module in model.modules():
        gather(module)
    out.loss.backward()
    for name, p in model.named_parameters():
        assert relative(p.grad, expected_grads[name]) <= EXACT, name


# -- hooks and replaced forwards -----------------------------------------------------------------


def shift_output(module, args, output):
    return output + 0.5


def shift_input(module, args):
    return (args[0] + 0.5,)


def scale_gradient(module, grad_input, grad_output):
    return tuple(2 * g for g in grad_input)


HOOKS = {
    "forward": lambda m: m.register_forward_hook(shift_output).remove,
    "forward_pre": lambda m: m.register_forward_pre_hook(shift_input).remove,
    "backward": lambda m: m.register_full_backward_hook(scale_gradient).remove,
}


def override(module):
    forward = type(module).forward
    module.forward = lambda x: forward(module, x) + 0.5
    return lambda: delattr(module, "forward")


def parametrize(module):
    class Shift(nn.Module):
        def forward(self, weight):
            return weight + 0.1

    nn.utils.parametrize.register_parametrization(module, "weight", Shift())
    return lambda: nn.utils.parametrize.remove_parametrizations(module, "weight", False)


CHANGES = HOOKS | {"forward replaced": override, "parametrized": parametrize}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("child", ["q_proj", "k_proj", "v_proj", "q_norm"])
def test_what_is_done_to_a_projection_is_done(child, change, device):
    """Hooks of q_proj run, though the fused operator would not call it; after them it is again."""
    model = make_model("Qwen3", device=device)
    ours = copy.deepcopy(model)
    rf.patch(ours)
    ids = tokens(model)
    before, _ = gradients(model, ids)
    undo = [CHANGES[change](getattr(attentions(m)[0], child)) for m in (ours, model)]
    expected, expected_grads = gradients(model, ids)
    if change != "backward":
        assert relative(expected, before) > 1e-3, "the change has no effect"
    _, count = run(ours, ids)
    q_or_k = child != "v_proj"
    assert count == ({"rotate": 1, "project": LAYERS - 1} if q_or_k else FUSED)
    logits, grads = gradients(ours, ids)
    assert relative(logits, expected) <= EXACT
    for name, grad in grads.items():
        assert relative(grad, expected_grads[name]) <= EXACT, name
    for restore in undo:
        restore()
    assert run(ours, ids)[1] == FUSED


def test_hooks_of_all_modules(device):
    """A profiler that hooks every module sees the projections called."""
    model = make_model(device=device)
    rf.patch(model)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(m))
    try:
        _, count = run(model, tokens(model))
    finally:
        handle.remove()
    assert count == ROTATED and attentions(model)[0].q_proj in seen
    assert run(model, tokens(model))[1] == FUSED


def test_class_made_on_top_of_ours(device):
    """FSDP2 gives a module a class of its own; what it put on top stays when the patch goes."""
    model = make_model(device=device)
    ids = tokens(model)
    expected, _ = run(model, ids)
    plain = type(attentions(model)[0])

    class Sharded:
        pass

    for before in (True, False):
        if before:
            rf.patch(model)
        for attention in attentions(model):
            attention.__class__ = type("Sharded" + plain.__name__, (Sharded, type(attention)), {})
        if not before:
            assert [*rf.patch(model).levels.values()] == [2] * LAYERS
        logits, count = run(model, ids)
        assert count == FUSED and relative(logits, expected) <= EXACT
        rf.unpatch(model)
        for attention in attentions(model):
            assert isinstance(attention, Sharded) and type(attention).forward is plain.forward
            attention.__class__ = plain
        assert same_bits(run(model, ids)[0], expected)


def add_hook(module, calls):
    """As accelerate's add_hook_to_module: it keeps the forward, and calls it from its own."""
    old = module.forward
    module._hf_hook, module._old_forward = "a hook", old

    def new_forward(module, *args, **kwargs):
        calls.append(module)
        return module._old_forward(*args, **kwargs)

    module.forward = update_wrapper(partial(new_forward, module), old)


def remove_hook(module):
    module.forward = module._old_forward
    del module._old_forward, module._hf_hook


@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerate_hooks_survive(when, device):
    model = make_model(device=device)
    ids = tokens(model)
    expected, _ = run(model, ids)
    calls = []
    if when == "after":
        rf.patch(model)
    for attention in attentions(model):
        add_hook(attention, calls)
    if when == "before":
        assert [*rf.patch(model).levels.values()] == [2] * LAYERS
    logits, count = run(model, ids)
    assert count == FUSED and calls == attentions(model)
    assert relative(logits, expected) <= EXACT
    # A hook on a projection moves its weights about: that module has to be called.
    add_hook(attentions(model)[0].q_proj, calls)
    assert run(model, ids)[1] == {"rotate": 1, "project": LAYERS - 1}
    assert attentions(model)[0].q_proj in calls
    remove_hook(attentions(model)[0].q_proj)
    # Both orders of undoing leave the plain model.
    twin = copy.deepcopy(model) if when == "before" else None
    rf.unpatch(model)
    calls.clear()
    logits, count = run(model, ids)
    assert count == {} and same_bits(logits, expected) and calls == attentions(model)
    if twin is not None:
        return
    rf.patch(model)
    for attention in attentions(model):
        remove_hook(attention)
    assert run(model, ids)[1] == FUSED
    rf.unpatch(model)
    assert same_bits(run(model, ids)[0], expected)


# -- copies and files ----------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", [True, False])
def test_deepcopy_is_patched_and_independent(fuse, device):
    model = make_model("Qwen3", device=device)
    rf.patch(model, fuse_projection=fuse)
    ids = tokens(model)
    expected, count = run(model, ids)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for attention in attentions(model):
            attention.q_proj.weight.zero_()
    got, twin_count = run(twin, ids)
    assert same_bits(got, expected) and twin_count == count
    assert not torch.allclose(run(model, ids)[0], expected)
    rf.unpatch(model)
    assert run(twin, ids)[1] == count and run(model, ids)[1] == {}


def test_pickle_comes_back_unpatched(device):
    model = make_model(device=device)
    ids = tokens(model)
    expected, _ = run(model, ids)
    rf.patch(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    logits, count = run(loaded, ids)
    assert count == {} and same_bits(logits, expected)
    assert [*rf.patch(loaded).levels.values()] == [2] * LAYERS
    assert run(loaded, ids)[1] == FUSED


def test_save_and_load_pretrained(tmp_path, device):
    model = make_model("Qwen3", torch.float32, device)
    keys = [*model.state_dict()]
    names = [n for n, _ in model.named_modules()]
    rf.patch(model)
    assert [*model.state_dict()] == keys
    assert [n for n, _ in model.named_modules()] == names
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).to(device)
    assert [*loaded.state_dict()] == keys
    rf.unpatch(model)
    ids = tokens(model)
    assert same_bits(run(loaded, ids)[0], run(model, ids)[0])
    loaded.load_state_dict(model.state_dict())


def test_a_patched_model_is_freed_at_once(device):
    """Its memory does not wait for the garbage collector: no module refers to itself."""
    model = make_model(device=device)
    rf.patch(model)
    alive = weakref.ref(attentions(model)[0])
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_replicas_use_their_own_weights(device):
    """nn.DataParallel copies the attributes of a module and gives the copy other parameters."""
    model = make_model(device=device)
    rf.patch(model)
    attention = attentions(model)[0]
    replica = attention._replicate_for_data_parallel()
    for name, child in attention._modules.items():
        replica._modules[name] = copy.deepcopy(child)
        with torch.no_grad():
            replica._modules[name].weight.mul_(2)
    x = torch.randn(1, 5, 32, dtype=torch.float64, device=device)
    positions = torch.arange(5, device=device)[None]
    tables = model.model.rotary_emb(x, positions)
    kwargs = {"position_embeddings": tables, "position_ids": positions, "attention_mask": None}
    got, count = entries(lambda: replica(x, **kwargs)[0])
    assert count == {"project": 1}
    rf.unpatch(model)
    with torch.no_grad():
        for child in attention.children():
            child.weight.mul_(2)
    assert relative(got, attention(x, **kwargs)[0]) <= EXACT


# -- checkpointing, autocast, compile ------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_gradient_checkpointing(family, fuse, reentrant, device):
    """The recomputation sees the positions of its own forward: two are under way at once."""
    model = make_model(family, device=device).train()
    ours = copy.deepcopy(model)
    rf.patch(ours, fuse_projection=fuse)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ids = tokens(model)
    rows = torch.tensor([[*range(6), *range(7)], [*range(20, 46, 2)]], device=device)
    # Without a cache: transformers takes it away where it checkpoints, and only where there is none
    # does it look for packed sequences, which have another mask.
    options = {"labels": ids, "use_cache": False}

    def step(m):
        m.zero_grad()
        losses = [m(ids, position_ids=p, **options).loss for p in (rows, rows.flip(0))]
        (losses[0] + 3 * losses[1]).backward()
        return {n: p.grad.clone() for n, p in m.named_parameters()}

    expected = step(model)
    grads, count = entries(lambda: step(ours))
    operator = "project" if fuse else "rotate"
    # Each layer of two forwards, and again in the backward, where a rotation is its own inverse.
    assert count[operator] == (4 if fuse else 6) * LAYERS
    for name, grad in grads.items():
        assert relative(grad, expected[name]) <= EXACT, name


@pytest.mark.parametrize("checkpointing", [True, False])
def test_positions_in_a_buffer_that_is_filled_anew(checkpointing, device):
    """Tables do not change with the positions that they were made of."""
    model = make_model(device=device).train()
    ids = tokens(model)
    expected, expected_grads = gradients(copy.deepcopy(model), ids, use_cache=False)
    rf.patch(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    positions = torch.arange(ids.shape[1], device=device)[None].repeat(len(ids), 1)
    out = model(ids, labels=ids, position_ids=positions, use_cache=False)
    positions.add_(5)
    out.loss.backward()
    assert relative(out.logits.detach(), expected) <= EXACT
    for name, p in model.named_parameters():
        assert relative(p.grad, expected_grads[name]) <= EXACT, name


@pytest.mark.parametrize("fuse", [True, False])
def test_autocast(fuse, device):
    """Against float64, a patched model under autocast is no worse than twice the unpatched one."""
    model = make_model("Llama", torch.float32, device)
    ours = copy.deepcopy(model)
    rf.patch(ours, fuse_projection=fuse)
    ids = tokens(model)
    truth = run(copy.deepcopy(model).double(), ids)[0]
    with torch.autocast(device.type, torch.bfloat16):
        (expected, _), (got, count) = run(model, ids), run(ours, ids)
    assert count == (FUSED if fuse else ROTATED)
    assert got.dtype == expected.dtype
    assert relative(got.double(), truth) <= 2 * relative(expected.double(), truth)


class Graphs:
    """A compiler backend that runs graphs as they are, and counts our operators in the last one."""

    def __call__(self, graph, inputs):
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def forward(graph, _):
            targets = [n.target for n in graph.graph.nodes]
            names = [t._schema.name for t in targets if isinstance(t, torch._ops.OpOverload)]
            ours = [n.split("::")[1] for n in names if n.startswith("rope_fused::")]
            self.count = {name: ours.count(name) for name in ours}
            return make_boxed_func(graph.forward)

        def backward(graph, _):
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=forward, bw_compiler=backward)(graph, inputs)


@pytest.mark.parametrize(
    ("family", "kwargs", "count"),
    [
        ("Qwen3", {}, FUSED),
        ("Llama", {"fuse_projection": False}, ROTATED),
        ("Llama", {"fuse_projection": False, "precision": "hf"}, TABLES),
    ],
)
def test_compile_without_graph_breaks(family, kwargs, count, device):
    torch._dynamo.reset()
    model = make_model(family, device=device)
    ids = tokens(model)
    ours = copy.deepcopy(model)
    rf.patch(ours, **kwargs)
    graphs = Graphs()
    compiled = torch.compile(ours, backend=graphs, fullgraph=True, dynamic=True)
    expected, expected_grads = gradients(model, ids)
    logits, grads = gradients(compiled, ids)
    assert graphs.count == count
    assert relative(logits, expected) <= EXACT
    for name, grad in grads.items():
        assert relative(grad, expected_grads[name.removeprefix("_orig_mod.")]) <= EXACT, name
    with torch.compiler.set_stance("fail_on_recompile"):
        for seqlen in (9, 17):
            ids = tokens(model, seqlen=seqlen)
            assert relative(gradients(compiled, ids)[0], gradients(model, ids)[0]) <= EXACT


def test_patching_a_compiled_model(device):
    """Compiled code notices that the forward of its modules changed, and changed back."""
    torch._dynamo.reset()
    model = make_model(device=device)
    ids = tokens(model)
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    with torch.no_grad():
        expected = compiled(ids).logits
        assert graphs.count == {}
        rf.patch(compiled)
        logits = compiled(ids).logits
        assert graphs.count == FUSED and relative(logits, expected) <= EXACT
        rf.unpatch(compiled)
        assert same_bits(compiled(ids).logits, expected)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict, device):
    model = make_model("Qwen3", device=device)
    ids = tokens(model)
    rf.patch(model)
    expected, _ = run(model, ids)
    program = torch.export.export(model, (ids,), kwargs={"use_cache": False}, strict=strict)
    logits, count = entries(lambda: program.module()(ids, use_cache=False).logits)
    assert count == FUSED and same_bits(logits.detach(), expected)
