"""The real PEFT and accelerate around a patched model, in the company they keep in training."""

import copy

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
peft = pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")

import rope_fused as rf  # noqa: E402
from tiny import (  # noqa: E402
    LAYERS,
    attentions,
    entries,
    make_model,
    one_thread,  # noqa: F401
    relative,
    run,
    tokens,
    with_exact_tables,
)

EXACT = 1e-9  # float64 throughout
FLOAT32_TABLES = 2e-5  # float64 against transformers' own tables, as in test_patch.py
TARGETS = {
    "q and v": ["q_proj", "v_proj"],
    "v": ["v_proj"],
    "all": "all-linear",
    "mlp": ["up_proj", "down_proj"],
}
FUSED_TARGETS = ("v", "mlp")  # q and k are plain, and fused


def adapted(model, targets="q and v", **options):
    """With adapters that do something from the start."""
    torch.manual_seed(3)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=2,
        target_modules=TARGETS[targets],
        init_lora_weights=False,
        **options,
    )
    return peft.get_peft_model(model, config)


def operator(targets):
    return "project" if targets in FUSED_TARGETS else "rotate"


def step(model, ids, **inputs):
    """(logits, gradients of what is trained) of a training step."""
    model.zero_grad()
    out = model(input_ids=ids, labels=ids, **inputs)
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach(), grads


def same(got, expected, limit=EXACT):
    assert relative(got[0], expected[0]) <= limit
    assert got[1].keys() == expected[1].keys() and got[1]
    for name, grad in got[1].items():
        assert relative(grad, expected[1][name]) <= limit, name


def pair(targets, when="before", **options):
    """(the adapted model as it is, the same one patched)."""
    model = make_model("Llama")
    plain = adapted(with_exact_tables(copy.deepcopy(model)), targets, **options)
    ours = copy.deepcopy(model)
    if when == "before":
        rf.patch(ours)
        ours = adapted(ours, targets, **options)
    else:
        ours = adapted(ours, targets, **options)
        report = rf.patch(ours)
        fused = targets in FUSED_TARGETS
        assert [*report.levels.values()] == [2 if fused else 0] * LAYERS
        assert fused or all("q_proj" in reason for reason in report.reasons.values())
    return plain, ours


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("targets", TARGETS)
def test_lora(targets, when):
    plain, ours = pair(targets, when)
    ids = tokens(plain)
    got, count = entries(lambda: step(ours, ids))
    same(got, step(plain, ids))
    assert count[operator(targets)] == (1 if targets in FUSED_TARGETS else 2) * LAYERS
    with ours.disable_adapter(), plain.disable_adapter():
        assert relative(run(ours, ids)[0], run(plain, ids)[0]) <= EXACT
    # Merged in place they still have their class; merged and unloaded they are plain again.
    expected, _ = run(plain, ids)
    ours.merge_adapter()
    logits, count = run(ours, ids)
    assert count == {operator(targets): LAYERS} and relative(logits, expected) <= EXACT
    ours.unmerge_adapter()
    merged = ours.merge_and_unload()
    logits, count = run(merged, ids)
    assert count == {"project": LAYERS} and relative(logits, expected) <= EXACT


@pytest.mark.parametrize("options", [{"use_dora": True}, {"bias": "all"}], ids=["dora", "bias"])
def test_kinds_of_adapters(options):
    plain, ours = pair("q and v", **options)
    ids = tokens(plain)
    got, count = entries(lambda: step(ours, ids))
    same(got, step(plain, ids))
    assert count == {"rotate": 2 * LAYERS}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("targets", ["q and v", "v"])
def test_gradient_checkpointing(targets, reentrant):
    plain, ours = pair(targets)
    for model in (plain, ours):
        model.train()
        model.enable_input_require_grads()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ids = tokens(plain)
    positions = torch.tensor([[*range(6), *range(7)], [*range(20, 46, 2)]])
    inputs = {"position_ids": positions, "use_cache": False}
    got, count = entries(lambda: step(ours, ids, **inputs))
    same(got, step(plain, ids, **inputs))
    assert count[operator(targets)] == (2 if targets == "v" else 3) * LAYERS


@pytest.mark.parametrize("targets", ["q and v", "v"])
def test_autocast(targets):
    """Against float64, no worse than twice the unpatched one."""
    plain, ours = (model.float() for model in pair(targets))
    ids = tokens(plain)
    truth = step(copy.deepcopy(plain).double(), ids)[1]

    def errors(model):
        with torch.autocast("cpu", torch.bfloat16):
            _, grads = step(model, ids)
        assert all(g.dtype == torch.float32 for g in grads.values())
        return max(relative(g.double(), truth[name]) for name, g in grads.items())

    ours_error, count = entries(lambda: errors(ours))
    assert ours_error <= 2 * errors(plain) and count[operator(targets)]


def test_compile_without_graph_breaks():
    torch._dynamo.reset()
    plain, ours = pair("q and v")
    ids = tokens(plain)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    logits, grads = step(compiled, ids)
    grads = {name.removeprefix("_orig_mod."): grad for name, grad in grads.items()}
    same((logits, grads), step(plain, ids))
    torch._dynamo.reset()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_with_left_padding(cache):
    plain, ours = pair("v")
    ids = tokens(plain)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    options |= {"pad_token_id": 0, "eos_token_id": None}
    options |= {"cache_implementation": "static"} if cache == "static" else {}
    expected = plain.generate(input_ids=ids, **options)
    got, count = entries(lambda: ours.generate(input_ids=ids, **options))
    assert torch.equal(got, expected) and count == {"project": 6 * LAYERS}


# -- accelerate ----------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_cpu_offload(when):
    """Its hooks bring the weights of each module only while that module is called."""
    model = make_model("Llama")
    ids = tokens(model)
    expected, _ = run(copy.deepcopy(model), ids)
    if when == "before":
        rf.patch(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if when == "after":
        rf.patch(model)
    assert attentions(model)[0].q_proj.weight.is_meta
    logits, count = run(model, ids)
    assert count == {"rotate": LAYERS} and relative(logits, expected) <= FLOAT32_TABLES
    accelerate.hooks.remove_hook_from_submodules(model)


@pytest.mark.parametrize("when", ["before", "after"])
def test_align_devices_hook_on_the_attention(when):
    """Where the weights stay, they may be read, and the hook still runs."""
    model = make_model("Llama")
    ids = tokens(model)
    expected, _ = run(copy.deepcopy(model), ids)
    if when == "before":
        rf.patch(model)
    for attention in attentions(model):
        hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
        accelerate.hooks.add_hook_to_module(attention, hook)
    if when == "after":
        rf.patch(model)
    logits, count = run(model, ids)
    assert count == {"project": LAYERS} and relative(logits, expected) <= FLOAT32_TABLES
    assert all(hasattr(attention, "_hf_hook") for attention in attentions(model))


def test_accelerator_prepare():
    """prepare() wraps forwards for mixed precision, and optimizers."""
    accelerate.state.AcceleratorState._reset_state(True)  # another test may have chosen a precision
    model = make_model("Llama", torch.float32)
    ids = tokens(model)
    rf.patch(model)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    loss, count = entries(lambda: prepared(input_ids=ids, labels=ids).loss)
    accelerator.backward(loss)
    optimizer.step()
    assert count == {"project": LAYERS}
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert run(unwrapped, ids)[1] == {"project": LAYERS}
