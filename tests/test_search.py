"""Search: genomes and their variation, evolution, gradients, and the command, killed and shared."""

import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers

import rope_fused as rf
from checkpoints import WINDOW, make_llama, save_checkpoint, text_of, train_tokenizer
from rope_fused import cli
from rope_fused.context import evolution, fitness, genome, gradient, loading, search
from rope_fused.context.progress import Checkpoint
from tiny import one_thread  # noqa: F401

pytestmark = pytest.mark.no_poison


def space_of(**options):
    base = rf.RopeSpec.default(head_dim=32, rope_theta=1e4)
    return genome.Space(base, 128, 8.0, **options)


@pytest.fixture
def rng(request):
    return random.Random(request.config.getoption("--seed"))


# -- genomes -----------------------------------------------------------------------------------


def test_seeds_are_yarn_ntk_and_interpolation():
    space = space_of()
    plain = space.base.inv_freq()
    length = {"original_max_position_embeddings": 128}
    shape = {"head_dim": 32, "rope_theta": 1e4, "factor": 8.0}
    specs = {
        "yarn": rf.RopeSpec.yarn(**shape, **length),
        "ntk": rf.RopeSpec.ntk(**shape),
        "pi": rf.RopeSpec.linear(**shape),
    }
    for name, found in space.seeds().items():
        factors = torch.tensor(found.factors, dtype=torch.float64)
        assert torch.allclose(plain / factors, specs[name].inv_freq(), rtol=1e-14, atol=0)
    assert space.seeds()["yarn"].temperature == specs["yarn"].attention_factor
    assert space_of(temperature="su").seeds()["pi"].temperature == pytest.approx(
        math.sqrt(1 + math.log(8) / math.log(128))
    )


def test_a_genome_is_what_transformers_makes_of_its_block(rng):
    """The block, read by transformers and by us, and the spec that candidates are tried with."""
    space = space_of()
    found = genome.mutate(space.seeds()["ntk"], space, rng)
    config = transformers.LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        max_position_embeddings=1024,
        rope_parameters=space.block(found),
    )
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    read = rf.RopeSpec.from_config(config)
    for length, divisor in ((129, found.factors), (128, (1.0,) * 16)):
        wanted = space.base.inv_freq() / torch.tensor(divisor, dtype=torch.float64)
        rotary(torch.zeros(1), torch.arange(length)[None])
        assert torch.allclose(rotary.inv_freq.double(), wanted, rtol=1e-6, atol=0)
        assert torch.equal(
            read.inv_freq(seq_len=length), space.spec(found).inv_freq("exact", length)
        )
        assert torch.allclose(read.inv_freq(seq_len=length), wanted, rtol=1e-14, atol=0)
    assert rotary.attention_scaling == read.attention_factor == found.temperature


def test_first_tokens_of_a_genome_turn_as_before():
    space = space_of(n_starts=(4,))
    found = genome.Genome((8.0,) * 16, 1.2, n_start=4)
    cos, _ = space.spec(found).cos_sin(torch.arange(300), dtype=torch.float64)
    plain, _ = space.base.cos_sin(torch.arange(300), dtype=torch.float64)
    assert torch.equal(cos[:4], plain[:4]) and not torch.equal(cos[4:], plain[4:])
    with pytest.raises(ValueError, match="n_start must be 0"):
        space.block(found)


@pytest.mark.parametrize("critical", [False, True])
def test_variation_stays_inside_the_space(critical, rng):
    space = space_of(temperature="search", n_starts=genome.N_STARTS, critical=critical)
    population = genome.first_generation(space, 64, rng)
    assert len(set(population)) == 64
    assert population[0] == space.seeds()["yarn"]
    changed = {"factors": 0, "temperature": 0, "n_start": 0}
    for step in range(600):
        parent, other = rng.sample(population, 2)
        if step % 2:
            child = genome.cross(parent, other, space, rng)
        else:
            child = genome.mutate(parent, space, rng)
            for name in changed:
                changed[name] += getattr(child, name) != getattr(parent, name)
        pairs = itertools.pairwise(child.factors)
        assert all(a <= b for a, b in pairs), child
        assert child.factors[0] >= 1 and child.factors[-1] <= space.largest == (
            16.0 if critical else 10.0
        )
        assert child.n_start in genome.N_STARTS and child.temperature > 0
        if critical:
            pair = child.critical
            assert space.critical_pair(10) <= pair <= space.critical_pair()
            assert all(8.0 <= x <= 16.0 for x in child.factors[pair:])
            for i in range(pair):  # NTK below: one base for all of them
                wanted = i / pair * math.log(child.factors[pair])
                assert math.log(child.factors[i]) == pytest.approx(wanted, abs=1e-12)
        assert genome.Genome.from_json(json.loads(json.dumps(child.as_json()))) == child
        population[rng.randrange(64)] = child
    assert min(changed.values()) > 30, changed


def test_mutation_draws_from_the_grid(rng):
    space = space_of()
    parent = space.seeds()["yarn"]
    moved = set()
    for _ in range(200):
        child = genome.mutate(parent, space, rng)
        for i, (a, b) in enumerate(zip(parent.factors, child.factors, strict=True)):
            if a != b:
                moved.add(i)
                assert b == pytest.approx(round(b, 2), abs=1e-9)
    # Between two neighbours of the same factor there is no room, until one of them has moved.
    assert {1, 2, 3, 4, 5, 6, 15} <= moved


def test_critical_pair_is_that_of_the_paper():
    """LongRoPE2, section 3.1: 31 of 48 for Phi-3-mini and 35 of 64 for Llama-3-8B (from 0)."""
    phi = genome.Space(rf.RopeSpec.default(head_dim=96, rope_theta=1e4), 2048, 32.0)
    llama = genome.Space(rf.RopeSpec.default(head_dim=128, rope_theta=5e5), 8192, 16.0)
    assert (phi.critical_pair(), llama.critical_pair()) == (31, 35)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": "warm"}, "temperature must be"),
        ({"n_starts": ()}, "n_starts must be"),
        ({"largest": 2.0}, "largest must be"),
    ],
)
def test_space_refuses(options, said):
    with pytest.raises(ValueError, match=said):
        space_of(**options)
    with pytest.raises(ValueError, match="factor must be > 1"):
        genome.Space(rf.RopeSpec.default(head_dim=32, rope_theta=1e4), 128, 1.0)


# -- evolution ---------------------------------------------------------------------------------


class Valley:
    """A fitness with its lowest point at known factors, that counts whom it is asked about."""

    def __init__(self, stop_after=None):
        self.target = [1 + 7 * (i / 15) ** 2 for i in range(16)]
        self.asked, self.stop_after = [], stop_after

    def __call__(self, found):
        if len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(found)
        apart = (math.log(a / b) for a, b in zip(found.factors, self.target, strict=True))
        return math.exp(sum(x * x for x in apart))


def test_evolution_descends_and_asks_nobody_twice():
    valley = Valley()
    known = evolution.evolve(valley, space_of(), seed=1)
    assert len(known) == len(valley.asked) == len(set(valley.asked)) == 1344  # the paper's number
    history = evolution.history(known)
    assert history[-1] == min(known.values()) == known[evolution.best(known)]
    assert history[-1] < 1.1 < history[2]  # the first three: YaRN, NTK, interpolation
    assert list(known)[0] == space_of().seeds()["yarn"]


@pytest.mark.parametrize("evaluations", [1, 2, 5, 30, 100])
def test_evolution_keeps_to_its_budget(evaluations):
    sizes = evolution.Evolution.within(evaluations)
    known = evolution.evolve(Valley(), space_of(), sizes)
    assert len(known) == evaluations
    assert evolution.Evolution.within(1344) == evolution.Evolution()


def test_what_is_not_finite_is_never_best():
    def bad(found):
        return math.nan if found.factors[0] == 8.0 else 3.0

    known = evolution.evolve(bad, space_of(), evolution.Evolution.within(12))
    assert math.inf in known.values() and known[evolution.best(known)] == 3.0


def test_evolution_that_was_stopped_ends_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, "SHARE", math.inf)  # these generations take no time at all
    sizes = evolution.Evolution(16, 4, 4, 8, evaluations=100)
    whole = evolution.evolve(Valley(), space_of(), sizes, seed=3)
    file, asked = tmp_path / "state", 0
    for stop in (10, 25, 40, None):
        valley = Valley(stop)
        try:
            found = evolution.evolve(
                valley, space_of(), sizes, seed=3, checkpoint=Checkpoint(file, {})
            )
        except KeyboardInterrupt:
            found = None
        asked += len(valley.asked)
    assert found == whole and list(found) == list(whole)
    assert asked < 100 + 3 * 16  # of what was done, only an unfinished generation is done again
    other = evolution.evolve(Valley(), space_of(), sizes, seed=4)
    assert list(other) != list(whole)


# -- a model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = make_llama(), train_tokenizer()
    ids = torch.tensor(tokenizer(text_of(2500))["input_ids"])
    return model, tokenizer, ids


def test_fitness_is_the_perplexity_of_a_model_loaded_with_the_block(tiny, tmp_path, rng):
    """By transformers alone: the block in the configuration, all logits, the counted tokens."""
    model, _, ids = tiny
    space = search.space_of(model, 4)
    found = genome.mutate(space.seeds()["yarn"], space, rng)
    windows = fitness.text_windows(ids, 4 * WINDOW, 3)
    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.rope_parameters = space.block(found)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, config=config).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row, scored in zip(windows.ids, windows.scored, strict=True):
            log_p = other(row[None]).logits[0].double().log_softmax(-1)
            for at in range(1, len(row)):
                if scored[at]:
                    total, count = total - log_p[at - 1, row[at]].item(), count + 1
    assert count == 3 * 2 * WINDOW
    for batch in (1, 2, 3):
        judge = fitness.ModelFitness(model, space, windows, batch)
        assert judge(found) == pytest.approx(math.exp(total / count), rel=1e-6)
    patched = make_llama()
    rf.patch(patched, strict=True)
    judge = fitness.ModelFitness(patched, space, windows, 3)
    assert judge(found) == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.parametrize("patched", [False, True])
def test_gradients_are_those_of_the_fitness(patched, tiny):
    """Against differences of perplexities in float64; the weights are left without gradients."""
    model = make_llama().double()
    if patched:
        rf.patch(model, strict=True)
    space = search.space_of(model, 4)
    judge = fitness.ModelFitness(model, space, fitness.text_windows(tiny[2], 128, 2), 1)
    start = space.seeds()["yarn"]
    inv_freq = space.base.inv_freq() / torch.tensor(start.factors, dtype=torch.float64)
    temperature = torch.tensor(start.temperature, dtype=torch.float64)
    inv_freq.requires_grad_(), temperature.requires_grad_()
    judge.gradients(inv_freq, temperature)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())

    def nll(frequencies, factor):
        with torch.no_grad():
            total = judge._total(sum, inv_freq=frequencies, attention_factor=factor)
        return total.item() / judge.count

    # The last token turns 0.01 further: a smaller step would drown in transformers' norms and
    # tables, which are float32.
    step, scale = 1e-4, inv_freq.grad.abs().max().item()
    for pair in (0, 3, 7):
        moved = [inv_freq.detach().clone() for _ in range(2)]
        moved[0][pair] += step
        moved[1][pair] -= step
        slope = (nll(moved[0], temperature.detach()) - nll(moved[1], temperature.detach())) / (
            2 * step
        )
        wanted = inv_freq.grad[pair].item()
        assert slope == pytest.approx(wanted, rel=1e-2, abs=2e-3 * scale), pair
    heat = [nll(inv_freq.detach(), temperature.item() * (1 + sign * 1e-4)) for sign in (1, -1)]
    slope = (heat[0] - heat[1]) / (2e-4 * temperature.item())
    assert slope == pytest.approx(temperature.grad.item(), rel=1e-3, abs=1e-5)


def test_descent_descends_and_stays_in_the_space(tiny, tmp_path):
    model, _, ids = tiny
    space = search.space_of(model, 4)
    judge = fitness.ModelFitness(model, space, fitness.text_windows(ids, 128, 2), 2)
    start, descent = space.seeds()["yarn"], gradient.Descent(steps=6)
    path = gradient.descend(judge, start, descent)
    assert len(path) == 6 and min(path.values()) < list(path.values())[0]
    assert list(path.values())[0] == pytest.approx(judge(start), rel=1e-5)
    for found in path:
        assert all(a <= b for a, b in itertools.pairwise(found.factors))
        assert found.factors[0] >= 1 - 1e-12 and found.factors[-1] <= space.largest + 1e-9
    best = evolution.best(path)
    assert judge(best) == pytest.approx(path[best], rel=1e-5)

    class Enough(Exception):
        pass

    class Bar:
        count = 0

        def update(self, n):
            self.count += n
            if self.count == 3:
                raise Enough

        def set_postfix(self, **_):
            pass

    file = tmp_path / "state"
    with pytest.raises(Enough):
        gradient.descend(judge, start, descent, checkpoint=Checkpoint(file, {}), bar=Bar())
    assert gradient.descend(judge, start, descent, checkpoint=Checkpoint(file, {})) == path


def test_a_step_is_adams():
    """On the increments of the logarithms, each with its own rate, as torch.optim has it."""
    space, descent = space_of(), gradient.Descent(steps=10)
    logs = torch.linspace(0.1, 1.7, 17, dtype=torch.float64)
    state = {"logs": logs.tolist(), "first": [0.0] * 17, "second": [0.0] * 17, "path": []}
    increments = torch.cat((logs[:1], logs[:16].diff(), logs[16:]))
    increments = [torch.nn.Parameter(one) for one in increments.clone()]
    turns = space.base.inv_freq() * space.original / (2 * math.pi)
    rates = [*(descent.learning_rate / turns.clamp(min=1)).tolist(), descent.temperature_rate]
    groups = [{"params": [one], "lr": rate} for one, rate in zip(increments, rates, strict=True)]
    adam = torch.optim.Adam(groups, betas=descent.betas)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, descent.steps)
    for step in range(3):
        slope = torch.rand(17, dtype=torch.float64)  # downwards, away from the largest factor
        state = gradient._adam(state, slope, step, descent, space)
        adam.zero_grad()
        logs = torch.cat((torch.stack(increments[:16]).cumsum(0), increments[16][None]))
        (logs @ slope).backward()
        adam.step()
        schedule.step()
    wanted = [*torch.stack(increments[:16]).cumsum(0).tolist(), increments[16].item()]
    assert state["logs"] == pytest.approx(wanted, rel=1e-12)


def test_needle_windows_ask_for_what_is_at_the_start(tiny):
    _, tokenizer, ids = tiny
    windows = fitness.needle_windows(tokenizer, ids, 256, samples=3, seed=5)
    for row, scored in zip(windows.ids, windows.scored, strict=True):
        text, answer = tokenizer.decode(row), tokenizer.decode(row[scored]).strip()
        assert len(answer) == 7 and text.endswith(answer)
        assert text.startswith(f"One of the special magic numbers for rope-fused is: {answer}.")
    assert windows.ids.shape == (3, 256)
    again = fitness.needle_windows(tokenizer, ids, 256, samples=3, seed=5)
    assert torch.equal(windows.ids, again.ids)
    with pytest.raises(ValueError, match="window must leave room"):
        fitness.needle_windows(tokenizer, ids, 64)


def test_windows_are_spread_over_the_text():
    ids = torch.arange(1000)
    windows = fitness.text_windows(ids, 100, 3)
    assert windows.ids[:, 0].tolist() == [0, 450, 900]
    assert windows.scored.sum(1).tolist() == [50] * 3 and windows.scored[0, 50:].all()
    assert len(fitness.text_windows(ids, 100, None).ids) == 19
    with pytest.raises(ValueError, match="at least window = 1001"):
        fitness.text_windows(ids, 1001)


# -- the command -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    save_checkpoint(folder / "model")
    (folder / "text.txt").write_text(text_of(1500))
    return folder


def arguments(files, out, *rest):
    model, text = str(files / "model"), str(files / "text.txt")
    fixed = ["--model", model, "--text", text, "--factor", "2", "--window", "128"]
    return ["search", *fixed, "--samples", "2", "--out", str(out), *rest]


def test_command(files, tmp_path, capsys, monkeypatch):
    """The contract: its keys and numbers, YaRN as the first candidate, one loading of the model."""
    loads = []
    original = loading.load
    monkeypatch.setattr(loading, "load", lambda *a, **k: loads.append(a) or original(*a, **k))
    out = tmp_path / "found.json"
    assert cli.main(arguments(files, out, "--evaluations", "16", "--seed", "3")) == 0
    assert len(loads) == 1
    found = json.loads(out.read_text())
    block = found["rope_parameters"]
    assert block["rope_type"] == "longrope" and block["rope_theta"] == 1e4
    assert block["original_max_position_embeddings"] == WINDOW and block["factor"] == 2.0
    assert len(block["long_factor"]) == len(block["short_factor"]) == 8
    assert all(a <= b for a, b in itertools.pairwise(block["long_factor"]))
    assert block["attention_factor"] > 0 and found["evaluations"] == 16
    assert len(found["history"]) == 16 and found["perplexity"] <= found["yarn_perplexity"]
    assert found["history"][0] == found["fitness"]["yarn"]
    assert (tmp_path / "found.json.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "found.json.partial").exists()
    assert "16 evaluations" in capsys.readouterr().out

    again = tmp_path / "again.json"
    assert cli.main(arguments(files, again, "--evaluations", "16", "--seed", "3")) == 0
    assert json.loads(again.read_text()) == found

    # What evaluate has to say about the block, and about YaRN.
    common = ["--model", str(files / "model"), "--text", str(files / "text.txt")]
    common += ["--window", "128", "--stride", "64", "--out", str(tmp_path / "ppl.json")]
    yarn = json.dumps({"rope_type": "yarn", "factor": 2.0})
    for rope, wanted in ((str(out), "perplexity"), (yarn, "yarn_perplexity")):
        assert cli.main(["evaluate", "perplexity", *common, "--rope", rope]) == 0
        told = json.loads((tmp_path / "ppl.json").read_text())["perplexity"]
        assert told == pytest.approx(found[wanted], rel=1e-6)


@pytest.mark.parametrize(
    "rest",
    [
        ("--method", "gradient", "--patch", "--evaluations", "9"),
        ("--method", "seeded", "--evaluations", "20", "--temperature", "search"),
        ("--strategy", "longrope2", "--window", "256", "--evaluations", "8"),
    ],
)
def test_other_searches(rest, files, tmp_path):
    out = tmp_path / "found.json"
    assert cli.main(arguments(files, out, *rest)) == 0
    found = json.loads(out.read_text())
    factors = found["rope_parameters"]["long_factor"]
    assert all(a <= b for a, b in itertools.pairwise(factors))
    assert found["evaluations"] <= int(rest[rest.index("--evaluations") + 1])
    assert found["perplexity"] <= found["yarn_perplexity"]


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        (("--factor", "0.5"), "factor must be > 1"),
        (("--window", "5000"), "text must have at least window = 5000"),
        (("--temperature", "warm"), "--temperature: must be yarn, su, search"),
        (("--model", "nowhere"), "nowhere is not a folder"),
    ],
)
def test_refusals_of_the_command(rest, said, files, tmp_path, capsys):
    assert cli.main(arguments(files, tmp_path / "x.json", *rest)) == 1
    line = capsys.readouterr().err.strip()
    assert said in line and "\n" not in line


def command(files, out, *rest):
    return [sys.executable, "-m", "rope_fused", *arguments(files, out, *rest)]


def started(files, out, *rest):
    return subprocess.Popen(
        command(files, out, *rest), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


@pytest.mark.slow
def test_a_killed_search_ends_the_same(files, tmp_path):
    rest = ("--evaluations", "400", "--samples", "5")
    killed = tmp_path / "killed.json"
    partial = killed.with_name("killed.json.partial")
    kept = []
    for known in (32, 200):  # twice, each time when there is more in the checkpoint
        process = started(files, killed, *rest)
        while process.poll() is None:
            if partial.exists():
                state = json.loads(partial.read_text())["state"].get("evolution", {"known": []})
                if len(state["known"]) >= known:
                    break
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        kept.append(partial.read_text())
    assert kept[0] != kept[1]
    assert subprocess.run(command(files, killed, *rest), timeout=600).returncode == 0
    whole = tmp_path / "whole.json"
    assert subprocess.run(command(files, whole, *rest), timeout=600).returncode == 0
    assert json.loads(killed.read_text()) == json.loads(whole.read_text())


@pytest.mark.slow
def test_two_processes_find_the_same(files, tmp_path):
    rest = ("--evaluations", "60", "--seed", "7")
    alone, shared = tmp_path / "alone.json", tmp_path / "shared.json"
    assert subprocess.run(command(files, alone, *rest), timeout=600).returncode == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    done = subprocess.run([*torchrun, *command(files, shared, *rest)[1:]], timeout=600)
    assert done.returncode == 0
    assert json.loads(shared.read_text()) == json.loads(alone.read_text())
