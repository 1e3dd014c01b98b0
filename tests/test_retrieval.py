"""Prompts and retrieval: the same for the same seed, right for a model that reads, resumable."""

import hashlib
import importlib.util
import re
import sys
import types

import pytest
import torch

from checkpoints import VOCABULARY, make_llama, train_tokenizer
from rope_fused.context import harness, loading, progress, prompts, retrieval
from tiny import one_thread  # noqa: F401

pytestmark = pytest.mark.no_poison
TASKS = {"passkey": prompts.PASSKEY, "needle": prompts.NEEDLE, **prompts.RULER}
BYTES = loading.byte_tokenizer()


class Reader(torch.nn.Module):
    """A model of bytes that knows the answer if it is in the last ``sight`` bytes before it."""

    def __init__(self, sight=10**6, answer=None):
        super().__init__()
        self.sight, self.answer = sight, answer or self.number
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, past_key_values=None, use_cache=None):
        logits = torch.zeros(*input_ids.shape, 256)
        for row, ids in enumerate(input_ids.tolist()):
            text = bytes(ids).decode()
            question = max(text.rfind(" is"), text.rfind(" are")) + 3
            question += text[question:].startswith("e")
            reply, said = self.answer(text[:question][-self.sight :]), text[question:]
            for at in range(len(said) + 1):
                logits[row, len(ids) - len(said) - 1 + at, reply.encode()[at % len(reply)]] = 9
        return types.SimpleNamespace(logits=logits, past_key_values=None)

    @staticmethod
    def number(text):
        found = re.search(r"(?:key|of [A-Z][a-z]+) is (\d+)", text)
        return f" {found.group(1) if found else 0}. "


@pytest.mark.parametrize("name", TASKS)
def test_prompts_depend_on_their_numbers_alone(name):
    def text(length=700, depth=0.3, trial=1, seed=5):
        return prompts.make_prompt(TASKS[name], BYTES, length, depth, trial, seed)

    first = text()
    assert text() == first
    others = [text(length=900), text(depth=0.4), text(trial=2), text(seed=6)]
    assert len({p.text for p in (first, *others)}) == 5
    assert text(depth=None) == text(depth=None) != text(depth=None, trial=2)
    for answer in first.answers:
        assert answer in first.text[: first.text.rindex("\n")]


def test_prompts_are_those_of_every_machine():
    """Changed words or numbers would make old results and checkpoints incomparable."""
    made = [
        prompts.make_prompt(task, BYTES, 700, depth, 1, 5).text
        for task in TASKS.values()
        for depth in (0.3, None)
    ]
    assert hashlib.sha256("\0".join(made).encode()).hexdigest()[:16] == "858523d2158fd351"


@pytest.mark.parametrize("tokenizer", [BYTES, train_tokenizer()], ids=["bytes", "bpe"])
@pytest.mark.parametrize("name", TASKS)
def test_prompts_fill_their_length(name, tokenizer):
    task = TASKS[name]
    sentence = max(len(tokenizer(f" {s}")["input_ids"]) for s in task.filler)
    for length in (701, 2500):
        for depth in (0.0, 0.5, 1.0):
            made = prompts.make_prompt(task, tokenizer, length, depth, 0, 0)
            used = len(tokenizer(made.text)["input_ids"]) + task.new_tokens
            assert length - sentence <= used <= length
            body = made.text[: made.text.rindex("\n")]
            body = body.split("\n")[-1]
            at = min(body.index(answer) for answer in made.answers[:1])
            if name not in ("niah_multivalue", "niah_multiquery", "variable_tracking"):
                assert abs(at / len(body) - depth) < 0.25 * 701 / length + 0.05


def test_a_haystack_of_ones_own():
    text = "One is here. Two\nis there!  Three?\n\n"
    assert prompts.sentences_of(text) == ["One is here.", "Two", "is there!", "Three?"]
    made = prompts.make_prompt(
        prompts.NEEDLE, BYTES, 500, 0.5, 0, 0, haystack=prompts.sentences_of(text)
    )
    assert "is there! Three? One is here. Two" in made.text and "grass" not in made.text


@pytest.mark.parametrize("length", [10, 120])
def test_too_short_says_how_long(length):
    with pytest.raises(prompts.TooShortError, match=r"lengths must be at least \d+ tokens") as e:
        prompts.make_prompt(prompts.PASSKEY, BYTES, length, 0.5, 0, 0)
    least = int(re.search(r"at least (\d+)", str(e.value)).group(1))
    prompts.make_prompt(prompts.PASSKEY, BYTES, least, 0.5, 0, 0)
    with pytest.raises(prompts.TooShortError):
        prompts.make_prompt(prompts.PASSKEY, BYTES, least - 1, 0.5, 0, 0)


def test_variables_are_assigned_in_order():
    for trial in range(20):
        made = prompts.make_prompt(prompts.RULER["variable_tracking"], BYTES, 900, 0.9, trial, 0)
        links = re.findall(r"Variable (\w+) = (\w+)\.", made.text)
        values = {}
        for name, source in links:
            assert source.isdigit() or source in values, "used before it is assigned"
            values[name] = values.get(source, source)
        asked = re.search(r"have the value (\d+)", made.text).group(1)
        assert {n for n, v in values.items() if v == asked} == set(made.answers)


def test_a_model_that_reads_finds_everything():
    for task, lengths in ((prompts.PASSKEY, [500, 900]), (prompts.NEEDLE, [300, 500])):
        found = retrieval.retrieve(
            Reader(),
            BYTES,
            task,
            lengths,
            depths=[0, 0.5, 1],
            trials=2,
            batch_size=3,
            with_nll=True,
        )
        assert found["accuracy"] == 1.0
        assert [(c["length"], c["depth"]) for c in found["cells"]] == [
            (n, d) for n in lengths for d in (0, 0.5, 1)
        ]
        assert all(t["answer_nll"] < 0.05 and t["tokens"] <= t["length"] for t in found["trials"])


def test_a_short_sighted_model_finds_what_is_near():
    found = retrieval.retrieve(
        Reader(sight=400), BYTES, prompts.NEEDLE, [300, 1500], depths=[0, 0.5, 0.9], trials=2
    )
    right = {(c["length"], c["depth"]): c["accuracy"] for c in found["cells"]}
    assert right == {(300, 0): 1, (300, 0.5): 1, (300, 0.9): 1} | {
        (1500, 0): 0, (1500, 0.5): 0, (1500, 0.9): 1
    }  # fmt: skip
    assert found["accuracy"] == pytest.approx(4 / 6)


def test_partial_answers_score_their_share():
    prompt = prompts.Prompt("x", "", ("11111", "22222"), 1, 0.0, 0)
    task = prompts.RULER["niah_multivalue"]
    assert task.score(prompt, " 22222 and 33333") == 0.5
    assert task.score(prompt, "22222, 11111") == 1.0
    assert prompts.PASSKEY.score(prompt, " 111112") == 0.0
    assert prompts.PASSKEY.score(prompt, " it is 11111, or 5") == 1.0
    assert prompts.PASSKEY.score(prompt, " 5 or 11111") == 0.0


def test_batches_change_nothing():
    model, tokenizer = make_llama().double(), train_tokenizer()
    options = {"trials": 3, "with_nll": True}
    found = retrieval.retrieve(
        model, tokenizer, prompts.PASSKEY, [330, 400], batch_size=4, **options
    )
    said = [(t["prompt"], t["response"]) for t in found["trials"]]
    nll = [t["answer_nll"] for t in found["trials"]]
    one = retrieval.retrieve(model, tokenizer, prompts.PASSKEY, [330, 400], **options)
    assert said == [(t["prompt"], t["response"]) for t in one["trials"]]
    assert nll == pytest.approx([t["answer_nll"] for t in one["trials"]], rel=1e-12)


def test_generate_is_that_of_transformers():
    model = make_llama().double()
    ids = torch.randint(2, VOCABULARY, (3, 21))
    with torch.no_grad():
        want = model.generate(
            ids, do_sample=False, max_new_tokens=9, eos_token_id=None, pad_token_id=0
        )[:, 21:].tolist()
    assert retrieval.generate(model, ids, 9) == want
    stop = want[0][4]
    got = retrieval.generate(model, ids, 9, stop)
    assert got == [row[: row.index(stop)] if stop in row else row for row in want]


def test_answer_nll_is_that_of_the_tokens():
    model, tokenizer = make_llama().double(), train_tokenizer()
    made = [prompts.make_prompt(prompts.NEEDLE, tokenizer, 200, 0.5, t, 0) for t in range(2)]
    for prompt, got in zip(made, retrieval.answer_nll(model, tokenizer, made), strict=True):
        context = tokenizer(prompt.text)["input_ids"]
        answer = tokenizer(f" {prompt.answers[0]}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            log_p = model(torch.tensor([context + answer])).logits[0].log_softmax(-1)
        want = [-log_p[len(context) - 1 + i, token].item() for i, token in enumerate(answer)]
        assert got == pytest.approx(sum(want) / len(want), rel=1e-12)


def test_retrieval_resumes_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(progress.Checkpoint, "SHARE", 1e9)
    settings = {"seed": 0}
    options = {"depths": [0, 1], "trials": 3, "batch_size": 2}
    whole = retrieval.retrieve(Reader(), BYTES, prompts.NEEDLE, [300, 400], **options)

    class Stop(Exception):
        pass

    class Failing(Reader):
        calls = 0

        def forward(self, *args, **kwargs):
            Failing.calls += 1
            if Failing.calls > 25:
                raise Stop
            return super().forward(*args, **kwargs)

    file = tmp_path / "state"
    with pytest.raises(Stop):
        retrieval.retrieve(
            Failing(), BYTES, prompts.NEEDLE, [300, 400], **options,
            checkpoint=progress.Checkpoint(file, settings),
        )  # fmt: skip
    kept = progress.Checkpoint(file, settings)
    assert 0 < len(kept.state["done"]) < 12
    bar = types.SimpleNamespace(done=0)
    bar.update = lambda n: setattr(bar, "done", bar.done + n)
    again = retrieval.retrieve(
        Reader(), BYTES, prompts.NEEDLE, [300, 400], **options, checkpoint=kept, bar=bar
    )
    assert again == whole and bar.done == 12


def test_tasks_of_the_harness(monkeypatch):
    """lm_eval loads the folder's YAML, tasks.py by its path, and calls what the files name."""
    made = types.SimpleNamespace(from_list=lambda rows, split: rows)
    monkeypatch.setitem(
        sys.modules,
        "datasets",
        types.SimpleNamespace(Dataset=made, Split=types.SimpleNamespace(TEST="test")),
    )
    spec = importlib.util.spec_from_file_location("tasks", harness.folder() / "tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    common = (harness.folder() / "_common.yaml").read_text()
    for name, task in TASKS.items():
        text = (harness.folder() / f"{name}.yaml").read_text()
        assert f"task: rope_fused_{name}\n" in text and "include: _common.yaml\n" in text
        assert f"max_gen_toks: {task.new_tokens}\n" in text
        functions = re.findall(r"!function tasks\.(\w+)", text + common)
        assert len(functions) == 4 and all(callable(getattr(module, f)) for f in functions)
        assert functions[0] == name
        rows = getattr(module, name)(
            tokenizer="bytes", pretrained="ignored", max_seq_lengths=[700], trials=2, seed=5
        )["test"]
        want = prompts.make_prompt(task, BYTES, 700, None, 1, 5)
        assert len(rows) == 2 and module.doc_to_text(rows[1]) == want.text
        right = module.doc_to_target(rows[1])
        assert module.process_results(rows[1], [f" {right}."]) == {"accuracy": 1.0}
        assert module.process_results(rows[1], [" none"]) == {"accuracy": 0.0}
    with pytest.raises(ValueError, match="pass pretrained=FOLDER"):
        module.passkey()
