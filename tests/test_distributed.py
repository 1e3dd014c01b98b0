"""Two gloo ranks on the CPU: the same losses and gradients as in one process, still fused."""

import json

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

import ranks  # noqa: E402
from rope_fused.distributed import sequence_shard, sequence_unshard  # noqa: E402
from tiny import LAYERS  # noqa: E402

EXACT = 2e-5  # float64 against transformers' float32 tables, as in test_patch.py
ROUNDING = 1e-12  # float64, sums in another order
FUSED = {"project": LAYERS, "rotate_backward": LAYERS}
ROTATED = {"rotate": 2 * LAYERS}


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """What every check of ranks.py found: two processes for all of them."""
    folder = tmp_path_factory.mktemp("ranks")
    seed = request.config.getoption("--seed")
    arguments = (2, str(folder / "rendezvous"), seed, str(folder / "results.json"))
    torch.multiprocessing.start_processes(ranks.main, arguments, nprocs=2, start_method="spawn")
    return json.loads((folder / "results.json").read_text())


def checks(function):
    return [name for name, (called, _) in ranks.CHECKS.items() if called is function]


@pytest.mark.parametrize("name", checks(ranks.qkv_rope))
def test_qkv_rope_on_shards(name, results):
    found = results[name]
    assert found["error"] <= ROUNDING and found["gradients"] <= ROUNDING
    _, x, w = name.split("-")
    dim = 2 if w == "S0" else {"R": None, "S0": 0, "S1": 1}[x]
    assert found["shards"] == [dim] * 3 and found["local heads"] == (2 if w == "S0" else 4)
    assert found["entries"] == {"project": 1}


@pytest.mark.parametrize("name", checks(ranks.apply_rope))
def test_apply_rope_on_shards(name, results):
    assert results[name] <= ROUNDING


def test_refusals(results):
    said = results["refusals"]
    for name, words in {
        "k must both": "TypeError: q and k must both be DTensors",
        "placed like q": "k must be placed like q",
        "head_dim": "q must be placed as Replicate or Shard(0) (batch), ",
        "between heads": "q_weight must be sharded between heads of 8 rows, got 12 rows",
        "placed like q_weight": "k_weight and v_weight must be placed like q_weight",
        "input columns": "q_weight must be placed as Replicate or Shard(0) (heads), got S",
        "all 6 tokens": "those of all 6 tokens",
        "norm over all": "norm_scope must be 'head'",
    }.items():
        assert words in said[name], (name, said[name])


@pytest.mark.parametrize("name", checks(ranks.tensor_parallel))
def test_tensor_parallel_stays_fused(name, results):
    found = results[name]
    assert found["rows"] == 32  # of 64: the weights are sharded indeed
    assert found["entries"] == FUSED and found["then"] == {"project": LAYERS}
    assert found["loss"] <= EXACT and found["gradients"] <= EXACT and found["inference"] <= EXACT


def test_tensor_parallel_with_another_layout(results):
    found = results["tensor_parallel_with_another_layout"]
    assert found["entries"] == ROTATED
    assert found["loss"] <= EXACT and found["gradients"] <= EXACT


@pytest.mark.parametrize("name", checks(ranks.tensor_parallel_but_for))
def test_tensor_parallel_but_for_one(name, results):
    found = results[name]
    assert found["entries"] == ({"rotate": LAYERS} if name.endswith("k") else {"project": LAYERS})
    assert found["loss"] <= EXACT


@pytest.mark.parametrize("name", [*checks(ranks.fsdp2), "ddp"])
def test_data_parallel(name, results):
    found = results[name]
    assert found["entries"] == FUSED
    assert found["loss"] <= EXACT and found["gradients"] <= EXACT


@pytest.mark.parametrize("name", checks(ranks.fsdp1))
def test_fsdp1(name, results):
    found = results[name]
    assert found["entries"] == {"project": LAYERS}
    assert found["loss"] <= EXACT and ("flat" in name or found["gradients"] <= EXACT)


@pytest.mark.parametrize("name", checks(ranks.sequence_sharded))
def test_sequence_sharded(name, results):
    found = results[name]
    assert found["entries"] == ({"project": LAYERS} if "fused" in name else {"rotate": LAYERS})
    assert found["loss"] <= EXACT and found["gradients"] <= EXACT


# -- positions of shards, in one process ---------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_sequence_shard(order, world_size):
    seqlen = 8 * world_size
    shards = [sequence_shard(seqlen, world_size, rank, order=order) for rank in range(world_size)]
    assert all(shard.dtype == torch.int64 and shard.shape == (8,) for shard in shards)
    back = sequence_unshard(seqlen, world_size, order=order)
    assert torch.equal(torch.cat(shards)[back], torch.arange(seqlen))
    work = {shard.sum().item() for shard in shards}  # what causal attention costs a rank
    assert len(work) == 1 if order == "zigzag" else len(work) == world_size


def test_zigzag_by_hand():
    assert sequence_shard(8, 2, 0, order="zigzag").tolist() == [0, 1, 6, 7]
    assert sequence_shard(8, 2, 1, order="zigzag").tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 4, 0, "contiguous"), "seqlen must be a multiple of 4 for 4 ranks"),
        ((10, 2, 0, "zigzag"), "seqlen must be a multiple of 4 for 2 ranks, zigzag, got 10"),
        ((8, 2, 2, "zigzag"), "rank must be one of 0 .. 1, got 2"),
        ((8, 2, 0, "striped"), "order must be 'contiguous' or 'zigzag', got 'striped'"),
    ],
)
def test_sequence_shard_refuses(arguments, message):
    *rest, order = arguments
    with pytest.raises(ValueError, match=message):
        sequence_shard(*rest, order=order)
