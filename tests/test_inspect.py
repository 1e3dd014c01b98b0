"""rope-fused inspect: its numbers, its table, its picture, and what it refuses."""

import json
import math
import re
import struct
import sys
from pathlib import Path

import mpmath
import numpy
import pytest

from rope_fused import cli
from rope_fused.cli.inspect import numbers, table
from rope_fused.spec import RopeSpec

CONFIGS = Path(__file__).parent / "golden" / "configs"
LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
LLAMA |= {"max_position_embeddings": 4096, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
NUMBERS = {
    "rope_type", "rope_theta", "head_dim", "rotary_dim", "rotary_offset", "interleaved", "axes",
    "axis_map", "parameters", "max_position_embeddings", "trained_length", "longest_length",
    "cache_class", "switch_length", "n_start", "inv_freq", "inv_freq_hf", "attention_factor",
    "attention_factor_hf", "softmax_multiplier", "q_temperature", "tables", "hf_refusal", "notes",
    "readers",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(config, name="config.json"):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(json.dumps(config))
    return name


def golden(name):
    return json.loads((CONFIGS / f"{name}.json").read_text())


def inspect(capsys, *arguments):
    status = cli.main(["inspect", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    return out


def inspect_json(capsys, *arguments):
    return json.loads(inspect(capsys, *arguments, "--json"))


def complaint(capsys, *arguments):
    try:
        status = cli.main(["inspect", *map(str, arguments)])
    except SystemExit as leaving:
        status = leaving.code
    out, err = capsys.readouterr()
    assert out == "" and status != 0
    (line,) = err.splitlines()
    return line


# -- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.json")), ids=lambda file: file.stem)
def test_numbers_are_the_spec(file, capsys):
    """Every number to the last bit, in both precisions, through JSON."""
    whole = json.loads(file.read_text())
    write(whole["config"])
    given = ["--layer-type", whole["layer_type"]] if whole["layer_type"] else []
    got = inspect_json(capsys, "config.json", *given)
    spec = RopeSpec.from_config(whole["config"], whole["layer_type"])
    assert got.keys() == NUMBERS | {"rope_fused", "config", "model_type"}
    assert got["model_type"] == whole["config"]["model_type"]
    assert got["inv_freq"] == spec.inv_freq().tolist()
    assert got["inv_freq_hf"] == spec.inv_freq("hf").tolist()
    assert got["attention_factor"] == got["attention_factor_hf"] == spec.attention_factor
    assert got["softmax_multiplier"] == spec.softmax_multiplier
    assert got["cache_class"] == spec.cache_class
    assert not Path("inspect.png").exists()
    if spec.cache_class == "switch":
        long = got["tables"]["long"]
        assert long["inv_freq"] == spec.rows()[1].tolist()
        assert long["inv_freq_hf"] == spec.rows("hf")[1].tolist()
    for t in got["tables"].values():
        for i, (freq, wave, factor) in enumerate(
            zip(t["inv_freq"], t["wavelength"], t["factor"], strict=True)
        ):
            if freq == 0:
                assert wave is factor is None and t["zone"][i] == "still"
                continue
            assert wave == pytest.approx(2 * math.pi / freq, rel=1e-15)
            base = spec.rope_theta ** (-2 * i / spec.rotary_dim)
            assert factor == pytest.approx(base / freq, rel=1e-14)


def test_every_key_is_documented():
    page = (Path(__file__).parents[1] / "docs" / "inspect.md").read_text()
    told = set(re.findall(r"`(\w+)`", page))
    whole = golden("gpt-oss-20b")
    n = numbers.numbers(RopeSpec.from_config(whole["config"]), "gpt_oss")
    assert n.keys() == NUMBERS
    keys = NUMBERS | {"rope_fused", "config", "model_type", "layer_types", "compare"}
    assert keys | n["tables"]["all"].keys() | n["readers"][0].keys() <= told


def test_layers_that_differ(capsys):
    config = golden("gemma-3-4b-full")["config"]
    got = inspect_json(capsys, write(config))
    assert got.keys() == {"rope_fused", "config", "model_type", "layer_types"}
    for kind, n in got["layer_types"].items():
        assert n.keys() == NUMBERS
        assert n["inv_freq"] == RopeSpec.from_config(config, kind).inv_freq().tolist()
    one = inspect_json(capsys, "config.json", "--layer-type", "full_attention")
    assert one["inv_freq"] == got["layer_types"]["full_attention"]["inv_freq"]


def test_zones_of_yarn(capsys):
    """gpt-oss: 9 pairs kept, 9 in the ramp (8.09 to 17.40), the others divided by 32."""
    n = inspect_json(capsys, write(golden("gpt-oss-20b")["config"]))["tables"]["all"]
    zones = n["zone"]
    assert [zones.count(z) for z in ("extrapolated", "ramp", "interpolated")] == [9, 9, 14]
    assert zones == sorted(zones, key=["extrapolated", "ramp", "interpolated"].index)
    for zone, factor in zip(zones, n["factor"], strict=True):
        if zone != "ramp":
            assert factor == pytest.approx(1 if zone == "extrapolated" else 32, rel=1e-14)


def test_zones_of_the_others(capsys):
    linear = {"rope_type": "linear", "factor": 2.0}
    cases = {
        "default": (None, {"plain"}),
        "linear": (linear, {"interpolated"}),
        "proportional": (linear | {"rope_type": "proportional", "partial_rotary_factor": 0.5},
                         {"interpolated", "still"}),
        "ntk": (linear | {"rope_type": "ntk"}, {"extrapolated", "ramp", "interpolated"}),
    }  # fmt: skip
    for block, zones in cases.values():
        n = inspect_json(capsys, write(LLAMA | {"rope_parameters": block}))
        assert set(n["tables"]["all"]["zone"]) == zones
    short = inspect_json(capsys, write(golden("minicpm4-8b")["config"]))["tables"]["short"]
    assert short["factor"][0] < 1 and short["zone"][0] == "extrapolated"


@pytest.mark.parametrize("length", [100, 131072, 10_000_000])
def test_float32_angle_error(length):
    """float32 positions times float32 frequencies against 50 digits, modulo a turn."""
    spec = RopeSpec.from_config(golden("llama-3.1-8b")["config"])
    exact, narrow = spec.inv_freq().tolist(), spec.inv_freq("hf").numpy()
    positions = range(max(0, length - numbers.SAMPLE), length, 16)
    got = numbers.angle_errors(spec.inv_freq(), spec.inv_freq("hf"), length, step=16)
    with mpmath.workdps(50):
        for pair in (0, 1, 2, 17, 63):
            errors = []
            for position in positions:
                angle = float(numpy.float32(position) * narrow[pair])
                error = mpmath.mpf(angle) - mpmath.mpf(position) * mpmath.mpf(exact[pair])
                turns = error / (2 * mpmath.pi)
                errors.append(abs(turns - mpmath.nint(turns)) * 2 * mpmath.pi)
            # float64 has the product to half an ulp of some 10^7 radians.
            assert abs(got[pair] - max(errors)) < 2e-9
    assert numbers.angle_errors(spec.inv_freq(), None, None) is None


def test_lengths():
    """The longest length is that of the file or of the factor, whatever is more."""
    qwen = RopeSpec.from_config(golden("qwen2.5-7b-yarn4")["config"])
    assert numbers.lengths(qwen) == (32768, 131072)
    phi = RopeSpec.from_config(golden("phi-4-mini")["config"])
    assert numbers.lengths(phi) == (4096, 131072)
    dynamic = RopeSpec.from_config(golden("internlm2-dynamic2")["config"])
    assert numbers.lengths(dynamic) == (32768, 65536)
    linear = RopeSpec.linear(head_dim=8, rope_theta=1e4, factor=2.0, max_position_embeddings=512)
    assert numbers.lengths(linear) == (None, 512)
    assert numbers.lengths(RopeSpec.default(head_dim=8, rope_theta=1e4)) == (None, None)


def test_length_of_a_dynamic_method(capsys):
    config = golden("internlm2-dynamic2")["config"]
    spec = RopeSpec.from_config(config)
    rest = inspect_json(capsys, write(config))
    assert rest["inv_freq"] == spec.inv_freq().tolist() and set(rest["tables"]) == {"32768"}
    longer = inspect_json(capsys, "config.json", "--seq-len", 65536)
    assert longer["inv_freq"] == spec.inv_freq(seq_len=65536).tolist()
    assert "that of 65,536 tokens" in inspect(capsys, "config.json", "--seq-len", 65536)


# -- the table ----------------------------------------------------------------------------------


def test_table(capsys):
    out = inspect(capsys, write(golden("gpt-oss-20b")["config"]))
    words = [line.split() for line in out.splitlines()]
    rows = [row for row in words if row and row[0].isdigit()]
    assert [int(row[0]) for row in rows] == list(range(32))
    assert rows[0][1:3] == ["0,", "32"] and rows[20][-2] == "interpolated"
    assert "1.3465735902799727: on cos and sin of q and k, so logits times 1.81326" in out
    assert "differs: frequencies by up to 76.3 %" in out and "does not know truncate" in out
    assert "static: valid at every length" in out
    assert Path("inspect.png").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("phi-3-mini-128k-2024-04", "short table up to 4,096 tokens"),
        ("deepseek-v2-lite", "times 1.5896261651208736, left to the attention"),
        ("ministral-3-8b", "times 1 + 0.1 ln(1 + floor(position / 16384))"),
        ("qwen2-vl-7b-mrope", "3, which turn 16, 24, 24 pairs"),
        ("deepseek-v4-main", "64 of 512 dimensions turn, from 448, in pairs (2 j, 2 j + 1)"),
        ("qwen2.5-7b-yarn4", "YaRN is off"),
        ("internlm2-dynamic2", "dynamic: every length has its own table"),
        ("gemma-4-full-proportional", "still"),
    ],
)
def test_table_says(name, said):
    whole = golden(name)
    spec = RopeSpec.from_config(whole["config"], whole["layer_type"])
    n = numbers.numbers(spec, whole["config"]["model_type"])
    assert said in " ".join(table.text(name, n).split())


def test_research_methods(capsys):
    """Without a counterpart in transformers, and with factors of many kinds."""
    block = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    block |= {"original_max_position_embeddings": 1024, "n_start": 4}
    block |= {"mscale_factors": [1 + i / 8 for i in range(8)]}
    write(LLAMA | {"rope_scaling": block})
    n = inspect_json(capsys, "config.json")
    assert n["inv_freq_hf"] is n["attention_factor_hf"] is None and n["hf_refusal"]
    assert {reading["verdict"] for reading in n["readers"]} == {"cannot"}
    out = table.text("research", n)
    assert "the first 4 positions excepted" in out and "one per pair" in out
    assert 'precision="hf"' in out


def test_verdict():
    same = {"verdict": "same", "inv_freq_difference": 0.0, "attention_factor": 1.0}
    assert table.verdict(same, 1.0) == "the same tables"
    differs = same | {"verdict": "differs", "inv_freq_difference": 3.0, "attention_factor": 1.25}
    assert table.verdict(differs, 1.0) == (
        "differs: frequencies by up to 300 %, attention factor 1.25"
    )
    assert table.verdict(differs | {"inv_freq_difference": None}, 1.25) == "differs: other pairs"


# -- files --------------------------------------------------------------------------------------


def test_kinds_of_files(capsys):
    want = inspect_json(capsys, write(LLAMA, "model/config.json"))
    from_folder = inspect_json(capsys, "model")
    assert from_folder.pop("config") == "model" and want.pop("config") == "model/config.json"
    assert from_folder == want
    params = {"dim": 64, "n_heads": 4, "rope_theta": 1e6, "max_position_embeddings": 512}
    write(params, "mistral/params.json")
    mistral = inspect_json(capsys, "mistral")
    assert (mistral["interleaved"], mistral["head_dim"]) == (True, 16)
    assert [r["reader"].split()[0] for r in mistral["readers"]] == ["vLLM", "llama.cpp"]
    unknown = {"model_type": "made_up", "head_dim": 16, "rope_theta": 1e4}
    write(unknown)
    assert "or --pairs be given, got 'made_up'" in complaint(capsys, "config.json")
    assert inspect_json(capsys, "config.json", "--pairs", "interleaved")["interleaved"] is True
    assert inspect_json(capsys, "config.json", "--pairs", "half")["interleaved"] is False


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1]", "config.json must hold an object, got list"),
        ('{"a":', "config.json is not JSON"),
        (json.dumps(LLAMA | {"rope_scaling": YARN | {"factor": 0.5}}), "factor must be"),
        (json.dumps(LLAMA | {"rope_scaling": YARN | {"beta": 3}}), "beta is not a rope key"),
        ('{"model_type": "llama", "head_dim": 16, "rope_theta": NaN}', "rope_theta must be"),
    ],
)
def test_bad_files(content, said, capsys):
    Path("config.json").write_text(content)
    assert said in complaint(capsys, "config.json")


def test_bad_arguments(capsys):
    write(LLAMA)
    write({"model_type": "made_up", "head_dim": 16, "rope_theta": 1e4}, "unknown.json")
    for arguments, said in (
        (["nowhere"], "rope-fused inspect: nowhere: no such file or folder"),
        (["config.json", "--layer-type", "deep"], "layer_type must be one of"),
        (["config.json", "--compare", "spiral"], "spiral is neither a file or folder nor one of"),
        (["config.json", "--compare", "linear"], "linear: needs a factor, as in linear:4"),
        (
            ["unknown.json", "--pairs", "half", "--compare", "yarn:4"],
            "yarn:4: needs a configuration that gives max_position_embeddings",
        ),
        (["config.json", "--compare", "linear:x"], "linear:x: could not convert"),
        (["config.json", "--compare", "linear:0.5"], "factor must be a finite number >= 1"),
        (["config.json", "--seq-len", "0"], "argument --seq-len"),
        (["config.json", "--pairs", "odd"], "argument --pairs"),
    ):
        assert said in complaint(capsys, *arguments)
    Path("empty").mkdir()
    assert "empty has neither config.json nor params.json" in complaint(capsys, "empty")


# -- comparisons and pictures -------------------------------------------------------------------


def test_compare(capsys):
    """Methods take this model's factor and length; files are themselves."""
    write(golden("phi-4-mini")["config"], "phi/config.json")
    write(LLAMA | {"rope_scaling": YARN})
    got = inspect_json(capsys, "config.json", "--compare", "linear", "yarn", "ntk:8", "phi")
    assert list(got["compare"]) == ["linear", "yarn", "ntk:8", "phi"]
    assert got["compare"]["yarn"]["inv_freq"] == got["inv_freq"]
    common = {"head_dim": 16, "rope_theta": 1e4}
    linear = RopeSpec.linear(**common, factor=4.0).inv_freq().tolist()
    assert got["compare"]["linear"]["inv_freq"] == linear
    ntk = RopeSpec.ntk(**common, factor=8.0).inv_freq().tolist()
    assert got["compare"]["ntk:8"]["inv_freq"] == ntk
    assert got["compare"]["phi"]["rotary_dim"] == 96
    out = inspect(capsys, "config.json", "--compare", "linear", "phi")
    header = next(line for line in out.splitlines() if line.split()[:1] == ["pair"])
    assert header.split("  ")[-1].strip() == "phi, long"
    rows = [line.split() for line in out.splitlines() if line.split()[:1] == ["7"]]
    assert len(rows[0]) == 5 and rows[0][2] == "4"


def size_of(png):
    data = Path(png).read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize(
    "arguments",
    [
        ["gpt-oss-20b"],
        ["phi-4-mini"],
        ["gemma-3-4b-full"],
        ["qwen2.5-7b-yarn4", "--compare", "linear", "ntk", "dynamic", "llama3", "default"],
        ["gemma-4-full-proportional"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_pictures(arguments, capsys):
    write(golden(arguments[0])["config"])
    out = inspect(capsys, "config.json", "--out", "pictures/of.png", *arguments[1:])
    assert out.endswith("\nWritten: pictures/of.png\n")
    width, height = size_of("pictures/of.png")
    assert 1100 < width < 1500 and 600 < height < 1000


def test_picture_of_layers_that_stand_still(capsys):
    """Nothing to draw is no reason to fail."""
    write({"model_type": "llama4_text", "max_position_embeddings": 4096})
    inspect(capsys, "config.json")
    assert "none" in inspect(capsys, "config.json", "--layer-type", "full_attention")


def test_without_matplotlib(capsys, monkeypatch):
    """The table needs no picture; a picture asked for is an error of one line."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "rope_fused.cli.inspect.picture", raising=False)
    monkeypatch.delattr("rope_fused.cli.inspect.picture", raising=False)
    write(LLAMA)
    assert "No picture: that needs matplotlib" in inspect(capsys, "config.json")
    assert inspect_json(capsys, "config.json")["rope_type"] == "default"
    assert cli.main(["inspect", "config.json", "--out", "x.png", "--json"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rope-fused inspect: --out: needs matplotlib")
    assert "pip install 'rope_fused[demo]'" in line and not Path("x.png").exists()
