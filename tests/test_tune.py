"""rope-fused tune: what it lists, what it refuses, and what it keeps of a measurement."""

import json
import sys

import pytest
import torch

import rope_fused as rf
from rope_fused import cli
from rope_fused.cli import tune

pytest.importorskip("triton")
INTERPRETED = rf.backends()["triton"] == "interpreted"


def listed(capsys, *arguments):
    assert cli.main(["tune", "--dry-run", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_dry_run(arch, capsys):
    lines = listed(capsys, "--arch", arch, "--shape", "1024,16,8,128", "--tokens", "512")
    assert lines[0].startswith("bfloat16, 512 tokens of 1024, 16 + 2 x 8 heads of 128: ")
    assert len(lines) == 1 + int(lines[0].split(": ")[1].split()[0]) > 3
    assert any("descriptors" in line for line in lines[1:]) == (arch != "sm_80")


def test_dry_run_of_everything(capsys):
    heads = [line for line in listed(capsys, "--arch", "sm_90") if not line.startswith(" ")]
    assert len(heads) == len(set(heads)) == 2 * len(tune._SHAPES)


def test_dry_run_of_a_model(capsys, tmp_path):
    config = {"model_type": "llama", "hidden_size": 2048, "num_attention_heads": 32,
              "num_key_value_heads": 8, "head_dim": 64, "rope_theta": 5e5,
              "max_position_embeddings": 8192}  # fmt: skip
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    (head, *_) = listed(capsys, "--config", str(file), "--tokens", "64", "--dtype", "float16")
    assert head.startswith("float16, 64 tokens of 2048, 32 + 2 x 8 heads of 64")


def test_every_kind_of_model(tmp_path, capsys):
    """LongRoPE chooses a table for each token, mRoPE a position axis for each pair."""
    from rope_fused.triton_kernels import configs

    base = {"hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 2,
            "rope_theta": 1e6, "max_position_embeddings": 32768}  # fmt: skip
    long = {"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
    axes = {"type": "mrope", "mrope_section": [16, 24, 24]}
    original = {"original_max_position_embeddings": 4096}
    models = [
        (base | {"model_type": "qwen2_vl", "rope_scaling": axes}, True),
        (base | {"model_type": "phi3", "rope_scaling": long, **original}, True),
        (base | {"model_type": "llama"}, False),
    ]
    for config, gathered in models:
        file = tmp_path / "config.json"
        file.write_text(json.dumps(config))
        case = tune._Case(tune._from_config(file), 40, torch.float16, norm=False)
        x = torch.empty(40, 1536, dtype=torch.float16)
        assert case.problem(x).gathered == gathered
        assert case.candidates(90)[0] == configs.default_tile(90, case.problem(x), case.head)


def test_a_head_that_makes_no_tile(capsys):
    lines = listed(capsys, "--shape", "1024,2,1,512", "--tokens", "64")
    assert lines[1].strip() == "this head makes no tile: always a GEMM and a rotation"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--shape", "1024,16"), 2, "must be D_MODEL,HEADS,KV_HEADS,HEAD_DIM, got '1024,16'"),
        (("--shape", "1024,16,0,128"), 2, "must be D_MODEL,HEADS,KV_HEADS,HEAD_DIM"),
        (("--tokens", "0"), 2, "must be at least 1, got 0"),
        (("--dtype", "float64"), 2, "argument --dtype"),
        (("--arch", "sm_90"), 1, "--arch is for --dry-run"),
        (("--dry-run", "--config", "nowhere.json"), 1, "nowhere.json"),
        (("--dry-run", "--config", "{}"), 1, "is not the configuration of a model"),
    ],
)
def test_refusals_are_one_line(arguments, status, said, capsys, tmp_path):
    if arguments[-1] == "{}":
        (tmp_path / "config.json").write_text("{}")
        arguments = (*arguments[:-1], str(tmp_path / "config.json"))
    try:
        got = cli.main(["tune", *arguments])
    except SystemExit as leaving:
        got = leaving.code
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and got == status and line.startswith("rope-fused tune: ") and said in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu(capsys):
    assert cli.main(["tune"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("rope-fused tune: no CUDA device") and err.count("\n") == 1


def test_without_triton(capsys, monkeypatch):
    monkeypatch.delattr(rf, "triton_backend", raising=False)
    monkeypatch.setitem(sys.modules, "rope_fused.triton_backend", None)
    assert cli.main(["tune", "--dry-run"]) == 1
    assert "tune needs Triton" in capsys.readouterr().err


@pytest.mark.skipif(
    not INTERPRETED, reason="measures in Triton's interpreter, with a made-up clock"
)
def test_the_cuda_kernel_is_measured_too(tmp_path, capsys, monkeypatch):
    """Beside the tiles, with a winner of its own; here the interpreted kernel stands in for it."""
    from rope_fused.triton_kernels import configs

    from rope_fused import triton_backend

    class CudaBackend:
        @staticmethod
        def takes(dtype, head_dim, rotation):
            return dtype == torch.float16 and head_dim == 32

        @staticmethod
        def project_fused(*operands, always):
            ran.append("cuda")
            return triton_backend.project_fused(*operands, tile)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(rf, "cuda_backend", CudaBackend, raising=False)
    monkeypatch.setitem(sys.modules, "rope_fused.cuda_backend", CudaBackend)
    configs.measured.cache_clear()
    tile, ran = configs.Tile(16, 2, 32, 4, 2), []
    case = tune._Case(tune.shape("64,2,1,32"), 40, torch.float16, norm=False)
    assert case.cuda_kernel(90) == [None] and case.cuda_kernel(100) == []
    clock = iter([10.0, 10.0, 10.0, 50.0, 70.0, 20.0])  # composed, the tile, the CUDA kernel
    monkeypatch.setattr(tune, "_microseconds", lambda call, repeats: (call(), next(clock))[1])
    monkeypatch.setattr(tune, "_times", lambda calls, times=tune._times: times(calls, rounds=1))
    assert tune._measure(case, [tile, None], torch.device("cpu")) == 2
    assert ran == ["cuda"] * 3  # to compare, to see how long it takes, to measure
    found = {m.tile: m.fused_us for m in configs.measured("interpreter")}
    assert found == {tile: 70.0, None: 20.0}
    out = capsys.readouterr().out
    assert "fused 70.0 us: GEMM and rotation from now on" in out
    assert "fused 20.0 us: fused from now on" in out and "the CUDA kernel" in out
    configs.measured.cache_clear()


@pytest.mark.skipif(
    not INTERPRETED, reason="measures in Triton's interpreter, with a made-up clock"
)
@pytest.mark.parametrize("fused_is", ["faster", "slower", "wrong", "impossible"])
def test_measuring(fused_is, capsys, tmp_path, monkeypatch):
    """Everything but the clock is real: both ways run, their results are compared, and the winner
    is kept and found again."""
    from rope_fused.triton_kernels import configs

    from rope_fused import triton_backend

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    configs.measured.cache_clear()
    configs.choose.cache_clear()
    layer = tune.shape("64,2,1,32")
    case = tune._Case(layer, 40, torch.float16, norm=True)
    tiles = [configs.Tile(16, 2, 32, 4, 2), configs.Tile(32, 4, 32, 4, 2)]
    clock = {"composed": 50.0, tiles[0]: 70.0, tiles[1]: 20.0 if fused_is == "faster" else 60.0}
    ran = []
    real_fused, real_composed = triton_backend.project_fused, triton_backend.project_composed

    def fused(*operands):
        ran.append(operands[-1])
        if fused_is == "impossible":
            raise RuntimeError("out of\nresources")
        real_fused(*operands)
        if fused_is == "wrong":
            operands[3][0][3, 1, 7] = torch.nan

    def composed(*operands):
        ran.append("composed")
        real_composed(*operands)

    def microseconds(call, repeats):
        call()
        return clock[ran[-1]]

    monkeypatch.setattr(triton_backend, "project_fused", fused)
    monkeypatch.setattr(triton_backend, "project_composed", composed)
    monkeypatch.setattr(tune, "_microseconds", microseconds)
    monkeypatch.setattr(tune, "_times", lambda calls, times=tune._times: times(calls, rounds=1))
    done = tune._measure(case, tiles, torch.device("cpu"))
    out = capsys.readouterr().out
    x = torch.empty(40, 64, dtype=torch.float16)
    choice = configs.choose("interpreter", 90, case.problem(x), case.head)
    if fused_is == "faster":
        assert done == 1 and choice == tiles[1] and "fused from now on" in out
    elif fused_is == "slower":
        assert done == 1 and choice is None and "GEMM and rotation from now on" in out
    else:
        assert done == 0 and not configs.cache_file().exists()
        assert out.count("WRONG" if fused_is == "wrong" else "cannot run here (out of res") == 2
    if done:
        (found,) = configs.measured("interpreter")
        assert (found.fused_us, found.composed_us) == (clock[tiles[1]], 50.0)
    configs.measured.cache_clear()
    configs.choose.cache_clear()
