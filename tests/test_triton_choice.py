"""When the projection is fused, and how: defaults, measurements, and the file they are kept in."""

import json
import warnings

import pytest

pytest.importorskip("triton")

from rope_fused.triton_kernels import configs  # noqa: E402


def problem(**changes):
    made = configs.Problem("bfloat16", 8192, 1024, (16, 8, 8), 128, 128, False)
    return made._replace(**changes)


HEAD = configs.Head(2, 64)


def test_choice_without_measurements(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    for arch, change, fused in (
        (90, {}, True),
        (80, {}, True),
        (100, {}, False),
        (90, {"d_model": 4096}, False),
        (90, {"tokens": 64}, False),
        (90, {"dtype": "float32"}, False),
    ):
        tile = configs.choose("GPU", arch, problem(**change), HEAD)
        assert (tile is not None) == fused, (arch, change)
        if fused:
            assert tile == configs.default_tile(arch, problem(**change), HEAD)
    padded = configs.Head(2, 48)
    assert configs.choose("GPU", 90, problem(head_dim=96, rotary_dim=96), padded) is None


def forget():
    configs.measured.cache_clear()
    configs.choose.cache_clear()
    configs.hopper_pays.cache_clear()


def test_measurements_decide(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    tile = configs.Tile(64, 1, 64, 4, 4)
    slow, fast = (300.0, 200.0), (100.0, 200.0)
    configs.save("GPU", [configs.Measurement(problem(), tile, *slow)])
    assert configs.choose("GPU", 90, problem(), HEAD) is None
    assert configs.choose("other GPU", 90, problem(), HEAD) is not None
    wide = problem(d_model=4096)
    file = configs.save("GPU", [configs.Measurement(wide, tile, *fast)])
    assert file == tmp_path / "rope_fused" / "projection.json"
    assert list(file.parent.iterdir()) == [file]  # and no temporary one
    assert configs.choose("GPU", 90, wide, HEAD) == tile
    assert configs.choose("GPU", 90, problem(), HEAD) is None  # the first is still there
    # What it speaks for: as many tokens or more, about as much of everything else.
    for change, speaks in (
        ({"tokens": 10**6}, True),
        ({"tokens": 8000, "d_model": 4608}, True),
        ({"tokens": 2048}, False),
        ({"d_model": 8192}, False),
        ({"heads": (64, 8, 8)}, False),
        ({"dtype": "float16"}, False),
        ({"normed": True}, False),
    ):
        assert (configs.choose("GPU", 90, wide._replace(**change), HEAD) == tile) == speaks, change
    configs.save("GPU", [configs.Measurement(wide, tile, *slow)])
    assert configs.choose("GPU", 90, wide, HEAD) is None
    forget()


def test_the_cuda_kernel_has_measurements_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    for change, pays in (({}, True), ({"d_model": 4096}, False), ({"tokens": 64}, False)):
        assert configs.hopper_pays("GPU", problem(**change)) == pays, change
    tile = configs.Tile(64, 1, 64, 4, 4)
    of_tile = configs.Measurement(problem(), tile, 100.0, 200.0)
    of_cuda = configs.Measurement(problem(), None, 300.0, 200.0)
    file = configs.save("GPU", [of_tile, of_cuda])
    assert set(configs.measured("GPU")) == {of_tile, of_cuda}
    assert configs.choose("GPU", 90, problem(), HEAD) == tile
    assert not configs.hopper_pays("GPU", problem())
    assert configs.hopper_pays("other GPU", problem())
    # One kind replaces its own alone.
    configs.save("GPU", [of_cuda._replace(fused_us=150.0)])
    configs.save("GPU", [of_tile._replace(fused_us=250.0)])
    assert configs.hopper_pays("GPU", problem())
    assert configs.choose("GPU", 90, problem(), HEAD) is None
    assert len(json.loads(file.read_text())["gpus"]["GPU"]) == 2
    forget()


@pytest.mark.parametrize(
    "content",
    [
        "no JSON",
        "[]",
        '{"format": 0, "gpus": {}}',
        '{"format": 1}',
        '{"format": 1, "gpus": {"GPU": 7}}',
        '{"format": 1, "gpus": {"GPU": [{"problem": {}}]}}',
        "warps",
        "fused_us",
        b"\xff\xfe",
    ],
)
def test_a_bad_file_is_reported_and_ignored(content, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    good = configs.Measurement(problem(), configs.Tile(64, 1, 64, 4, 4), 2.0, 1.0)
    file = configs.save("GPU", [good])
    if content == "warps":
        data = json.loads(file.read_text())
        data["gpus"]["GPU"][0]["tile"]["warps"] = 3
        content = json.dumps(data)
    elif content == "fused_us":
        content = file.read_text().replace("2.0", "NaN")
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    forget()
    with pytest.warns(RuntimeWarning, match="rope_fused ignores .*projection.json"):
        assert configs.choose("GPU", 90, problem(), HEAD) is not None  # the default
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        configs.choose("GPU", 90, problem(tokens=9000), HEAD)
    configs.save("GPU", [good])  # replaces it
    assert configs.choose("GPU", 90, problem(), HEAD) is None
    forget()


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_candidates(arch):
    for dtype in ("bfloat16", "float16", "float32", "tf32"):
        for head_dim, slabs in ((64, 2), (80, 2), (128, 4), (256, 2), (128, 1)):
            head = configs.Head(slabs, head_dim // slabs)
            for tokens in (16, 8192):
                one = problem(dtype=dtype, tokens=tokens, head_dim=head_dim)
                tiles = configs.candidates(arch, one, head)
                assert tiles[0] == configs.default_tile(arch, one, head)
                assert len(set(tiles)) == len(tiles)
                assert all(t.heads * head.columns <= 256 for t in tiles)
