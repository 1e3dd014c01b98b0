"""Many callers at once: Python threads, forked and spawned processes, two models, interpreters."""

import concurrent.futures
import os
import subprocess
import sys
import threading

import pytest
import torch

import rope_fused as rf
from helpers import assert_same_bits, make_longrope, make_qk, make_spec
from rope_fused.dispatch import native

FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
SPEC = make_longrope(32, original=300)


def rotated(number):
    """Results and gradients of the call that `number` stands for: sizes differ between calls."""
    generator = torch.Generator().manual_seed(number)
    q, k = (
        torch.randn(1, 280 + 5 * (number % 9), n, 32, generator=generator).requires_grad_()
        for n in (8, 2)
    )
    factor = torch.full((16,), 1.25, requires_grad=True)
    q2, k2 = rf.apply_rope(q, k, SPEC, attention_factor=factor)
    grads = torch.autograd.grad((q2 * q2).sum() + (k2 * k2).sum(), (q, k, factor))
    return q2.detach(), k2.detach(), *grads


def assert_all_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)


# -- threads -----------------------------------------------------------------------------------


def test_threads_that_change_how_many_threads_there_are():
    want = [rotated(i) for i in range(9)]
    before = torch.get_num_threads()
    stop = threading.Event()

    def change():
        number = 0
        while not stop.wait(0.001):
            number += 1
            torch.set_num_threads(1 + number % 4)

    def work(number):
        torch.set_num_threads(1 + number % 3)
        return rotated(number % 9)

    changing = threading.Thread(target=change)
    changing.start()
    try:
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            for number, got in enumerate(pool.map(work, range(72))):
                assert_all_same(got, want[number % 9])
    finally:
        stop.set()
        changing.join()
        torch.set_num_threads(before)


def test_tables_made_by_many_threads_at_once():
    """The first calls of a spec meet an empty cache together."""
    q, k = make_qk()
    barrier = threading.Barrier(8)

    def work(number):
        spec = make_spec(16, rope_theta=10_007.0 + number // 4)
        barrier.wait(30)
        return rf.apply_rope(q, k, spec)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(8)))
    for number, got in enumerate(found):
        assert_all_same(got, rf.apply_rope(q, k, make_spec(16, rope_theta=10_007.0 + number // 4)))


def test_a_model_shared_by_threads_and_another_patched_meanwhile():
    """One model fused and exact, one with its own bits; both are patched and run at once."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    ids = torch.arange(24)[None]
    ways = [{"fuse_projection": True}, {"fuse_projection": False, "precision": "hf"}] * 2
    models = []
    for number in range(len(ways)):
        torch.manual_seed(number % 2)
        models.append(transformers.LlamaForCausalLM(config).eval())
    plain = [model(ids).logits.detach() for model in models]
    barrier = threading.Barrier(len(ways))

    def work(number):
        barrier.wait(30)
        report = rf.patch(models[number], **ways[number])
        with torch.no_grad():
            return report, [models[number](ids).logits for _ in range(5)]

    with concurrent.futures.ThreadPoolExecutor(len(ways)) as pool:
        found = list(pool.map(work, range(len(ways))))
    for number, (report, logits) in enumerate(found):
        fused = ways[number]["fuse_projection"]
        assert set(report.levels.values()) == {2 if fused else 0}
        for got in logits:
            assert_same_bits(got, logits[0])
            if fused:
                torch.testing.assert_close(got, plain[number], rtol=1e-4, atol=1e-4)
            else:
                assert_same_bits(got, plain[number])


@pytest.mark.skipif(getattr(native, "_OutputBuffer", None) is None, reason="no cache of outputs")
def test_outputs_of_many_threads_share_no_memory(monkeypatch):
    """Lent, filled, dropped and lent again by threads, with every output in the cache."""
    monkeypatch.setattr(native, "_LARGE", 1)
    q, k = make_qk("bshd", 1, 64, 4, 2, 32)

    def work(number):
        held = []
        for step in range(40):
            mark = float(number * 100 + step)
            q2, _ = rf.apply_rope(q, k, SPEC)
            held.append((q2.fill_(mark), mark))
            if step % 3:
                held.pop(0)
            assert all((t == m).all() for t, m in held)
        return [(t, m) for t, m in held]

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        held = [pair for found in pool.map(work, range(6)) for pair in found]
    assert all((t == m).all() for t, m in held)
    assert len({t.data_ptr() for t, _ in held}) == len(held)


# -- processes ---------------------------------------------------------------------------------


class Rotated(torch.utils.data.Dataset):
    """Items that a DataLoader's workers rotate."""

    def __len__(self):
        return 12

    def __getitem__(self, number):
        return rotated(number)


def check_workers(context):
    want = [rotated(i) for i in range(12)]  # the parent has threads of its own by now
    loader = torch.utils.data.DataLoader(
        Rotated(), batch_size=None, num_workers=2, multiprocessing_context=context, timeout=120
    )
    for got, expected in zip(loader, want, strict=True):
        assert_all_same(got, expected)


@FORK
@pytest.mark.no_poison
def test_workers_that_are_forked():
    check_workers("fork")


@FORK
@pytest.mark.no_poison
@pytest.mark.skipif(getattr(native, "_OutputBuffer", None) is None, reason="no cache of outputs")
def test_the_cache_of_outputs_is_the_processes_own(monkeypatch):
    """Blocks that wait at a fork are lent in the child and in the parent, and are two memories."""
    monkeypatch.setattr(native, "_LARGE", 1)
    q, k = make_qk("bshd", 1, 64, 4, 2, 32)
    del_me = rf.apply_rope(q, k, SPEC)
    del del_me
    living, _ = rf.apply_rope(q, k, SPEC)
    copy = living.clone()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        q2, k2 = rf.apply_rope(q, k, SPEC)
        right = torch.equal(q2, copy) and torch.equal(living, copy)
        q2.fill_(-1), k2.fill_(-1), living.fill_(-1)
        os.write(write, b"1" if right else b"0")
        os._exit(0)
    again, _ = rf.apply_rope(q, k, SPEC)
    assert os.read(read, 1) == b"1"
    assert os.waitpid(child, 0)[1] == 0
    os.close(read), os.close(write)
    assert_same_bits(living, copy)
    assert_same_bits(again, copy)


# A file of its own: a spawned process imports the main module anew.
SPAWNED = """
import concurrent.futures, multiprocessing, torch, rope_fused as rf

def work(number):
    torch.set_num_threads(2)
    q = torch.full((1, 300, 8, 32), float(number))
    spec = rf.RopeSpec.default(head_dim=32, rope_theta=1e4)
    return rf.apply_rope(q, None, spec)[0].numpy().tobytes()

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        assert list(pool.map(work, range(3))) == [work(i) for i in range(3)]
    print("same")
"""


def test_a_process_that_is_spawned(tmp_path):
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (0, "same"), done.stderr


# -- interpreters ------------------------------------------------------------------------------


SUBINTERPRETER = """
try:
    import _interpreters as interpreters            # 3.13
except ImportError:
    import _xxsubinterpreters as interpreters       # 3.10 to 3.12
import rope_fused as rf
number = interpreters.create()
told = interpreters.run_string(number, '''
try:
    import rope_fused
    print("imported")
except Exception as error:  # torch and NumPy are for the first interpreter of a process
    print("refused:", type(error).__name__, str(error).replace("\\\\n", " "))
''')
assert told is None, told
interpreters.destroy(number)
import torch
q, _ = rf.apply_rope(torch.ones(1, 3, 1, 4), None, rf.RopeSpec.default(head_dim=4, rope_theta=10))
assert q.isfinite().all()
print("alive")
"""


def test_another_interpreter_of_the_process():
    """It imports or says no, and the first one goes on."""
    done = subprocess.run(
        [sys.executable, "-c", SUBINTERPRETER], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    said, *_, last = done.stdout.strip().splitlines()
    assert said.startswith(("imported", "refused: ")) and last == "alive", done.stdout
