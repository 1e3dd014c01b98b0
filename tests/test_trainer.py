"""Trainer: the losses of a full fine-tune and of LoRA, patched as users patch, and unpatched."""

import copy

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("accelerate")

import transformers  # noqa: E402

import rope_fused as rf  # noqa: E402
from tiny import LAYERS, entries, make_model, one_thread  # noqa: E402, F401

STEPS, ACCUMULATION = 12, 2


@pytest.fixture(scope="module", autouse=True)
def quiet():
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)


def lessons():
    """Something to learn: counting modulo 61."""
    starts = torch.randint(1, 61, (256, 1), generator=torch.Generator().manual_seed(1))
    ids = (starts + torch.arange(16)) % 61 + 1
    return [{"input_ids": row, "labels": row} for row in ids]


def train(model, folder, callbacks=(), **arguments):
    """The losses of a run of Trainer, whose model is left trained."""
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=STEPS,
        logging_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **arguments,
    )
    model = {"model_init": model} if not isinstance(model, torch.nn.Module) else {"model": model}
    trainer = transformers.Trainer(
        args=arguments, train_dataset=lessons(), callbacks=list(callbacks), **model
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    return torch.tensor(losses, dtype=torch.float64), trainer


def build():
    torch.manual_seed(0)
    return make_model("Llama", torch.float32, hidden_size=64).train()


def close(losses, expected):
    """float32: 12 steps of Adam from angles that differ in their last bits."""
    return ((losses - expected).abs() / expected).max().item() <= 1e-5


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    losses, _ = train(build(), tmp_path_factory.mktemp("plain"))
    assert losses[-1] < 0.9 * losses[0], "nothing was learned"
    return losses


CALLS = STEPS * ACCUMULATION * LAYERS


def counted(call, model=None, times=1, **options):
    """(result, entries) of a run, without those of the self-test of ``times`` patches in it."""
    tests = {}
    if model is not None:
        _, tests = entries(lambda: rf.patch(copy.deepcopy(model), **options))
    result, count = entries(call)
    count = {name: n - times * tests.get(name, 0) for name, n in count.items()}
    return result, {name: n for name, n in count.items() if n}


@pytest.mark.parametrize("how", ["patch", "callback", "added later", "model_init"])
def test_full_fine_tune(how, plain, tmp_path):
    model, callback = build(), rf.RopeFusedCallback(strict=True)
    if how == "patch":
        rf.patch(model, strict=True)
        (losses, _), count = counted(lambda: train(model, tmp_path))
    elif how == "callback":
        (losses, _), count = counted(lambda: train(model, tmp_path, [callback]), model)
    elif how == "model_init":  # which makes two models, of which the second is trained
        (losses, _), count = counted(lambda: train(build, tmp_path, [callback]), model, 2)
    else:

        class Later(transformers.TrainerCallback):
            def on_train_begin(self, args, state, control, **kwargs):
                callback.on_train_begin(args, state, control, **kwargs)

        (losses, _), count = counted(lambda: train(model, tmp_path, [Later()]), model)
    assert count == {"project": CALLS, "rotate_backward": CALLS}
    assert close(losses, plain)
    if how != "patch":
        assert [*callback.report.levels.values()] == [2] * LAYERS


def test_bit_for_bit(plain, tmp_path):
    options = {"fuse_projection": False, "precision": "hf"}
    callback = rf.RopeFusedCallback(unpatch=True, **options)
    model = build()
    kinds = [type(module) for module in model.modules()]
    (losses, _), count = counted(lambda: train(model, tmp_path, [callback]), model, **options)
    assert count == {"rotate_tables": 2 * CALLS} and torch.equal(losses, plain)
    assert [type(module) for module in model.modules()] == kinds, "still patched"


def test_checkpointing_and_a_checkpoint_on_disk(plain, tmp_path):
    model, callback = build(), rf.RopeFusedCallback()
    (losses, trainer), count = counted(
        lambda: train(model, tmp_path, [callback], gradient_checkpointing=True), model
    )
    assert count == {"project": 2 * CALLS, "rotate_backward": CALLS} and close(losses, plain)
    trainer.save_model(str(tmp_path))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = trainer.model.state_dict()
    assert all(torch.equal(ours[name], t) for name, t in loaded.state_dict().items())


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(when, tmp_path):
    """q and v have adapters: the model's own modules run, and the rotation is ours."""
    peft = pytest.importorskip("peft")

    def adapted(model):
        torch.manual_seed(1)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
        return peft.get_peft_model(model, config)

    expected, _ = train(adapted(build()), tmp_path)
    model = build()
    if when == "before":
        rf.patch(model)
        model = adapted(model)
        (losses, trainer), count = counted(lambda: train(model, tmp_path))
    else:
        model, callback = adapted(model), rf.RopeFusedCallback()
        (losses, trainer), count = counted(lambda: train(model, tmp_path, [callback]), model)
    assert count == {"rotate": 2 * CALLS} and close(losses, expected)
    assert losses[-3:].mean() < losses[:3].mean(), "nothing was learned"
    # Merged, the adapters are part of plain weights, which are fused again.
    ids = torch.stack([row["input_ids"] for row in lessons()[:2]])
    with torch.no_grad():
        adapted_logits = trainer.model(ids).logits
        merged = trainer.model.merge_and_unload()
        logits, count = entries(lambda: merged(ids).logits)
    assert count == {"project": LAYERS}
    assert (logits - adapted_logits).abs().max() <= 1e-4 * adapted_logits.abs().max()


def test_a_copy_of_the_callback_is_independent(tmp_path):
    first = rf.RopeFusedCallback(precision="hf", fuse_projection=False)
    second = copy.copy(first)
    first.on_init_end(None, None, None, model=build())
    assert first.report is not None and second.report is None
