"""Configurations from strangers: any JSON is a spec or a ValueError, soon and in little memory.

tests/test_strangers.py draws some with hypothesis. Guided by coverage, for as long as one likes:

    pip install atheris
    python tests/strangers.py -max_total_time=600 -rss_limit_mb=4096 NEW_FOLDER tests/golden/configs
"""

import contextlib
import copy
import json
import math
import random
import sys
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden" / "configs"

# What a stranger may write where something else is meant.
WRONG = (
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**31, 2**63, 10**400, 0.0, 0.5, -0.5, 1.5, 1e-320,
    1e308, math.inf, -math.inf, math.nan, "", "yarn", "longrope", "64", "\x00", [], [0], [1.0] * 3,
    [[]], [None], ["full_attention", "sliding_attention"], {}, {"a": 1}, {"rope_type": "yarn"},
    {"full_attention": {"rope_type": "default"}}, {"0": 64}, {"x": 64},
)  # fmt: skip


def outcome(config) -> str:
    """ "spec" or "refused"; anything else that happens is a fault, and raised."""
    from rope_fused import configs, readers

    before = copy.deepcopy(config)
    try:
        specs = configs.layer_specs(config)
    except ValueError:
        return "refused"
    except TypeError:
        if not isinstance(config, dict):  # as documented: neither a mapping nor a configuration
            return "refused"
        raise
    finally:
        assert _same(config, before), "the configuration was changed"
    for spec in specs.values():
        _check(spec)
        readers.readings(spec, configs.model_type(config))
    return "spec"


def _same(a, b) -> bool:
    return json.dumps(a) == json.dumps(b)


def _check(spec):
    assert spec.rows().isfinite().all() and spec.scale_rows().isfinite().all()
    for length in (None, 1, 8, 2**31):
        factor = spec.attention_factor_at(length)
        for value in factor if isinstance(factor, tuple) else (factor,):
            assert math.isfinite(value)
        assert spec.inv_freq(seq_len=length).isfinite().all()
    assert math.isfinite(spec.softmax_multiplier)
    assert hash(spec) == hash(spec) and repr(spec)
    with contextlib.suppress(ValueError):  # says why transformers cannot
        assert spec.rows("hf").isfinite().all()


def paths(value, at=()):
    """Where something stands in a configuration."""
    yield at
    children = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        children = enumerate(value[:2])
    for key, child in children:
        yield from paths(child, (*at, key))


def changed(config, draw) -> object:
    """A copy of a configuration with a few places changed, left out, or filled from elsewhere."""
    config = copy.deepcopy(config)
    for _ in range(draw.choice((1, 1, 2, 4))):
        places = [p for p in paths(config) if p]
        if not places:
            return draw.choice(WRONG)
        *way, last = draw.choice(places)
        home = config
        for key in way:
            home = home[key]
        how = draw.choice(("wrong", "wrong", "wrong", "left out", "moved", "new"))
        if how == "left out":
            del home[last]
        elif how == "moved" or isinstance(home, list):
            other = config
            for key in draw.choice(places)[:-1]:
                other = other[key] if isinstance(other, dict | list) else other
            home[last] = copy.deepcopy(other)
        elif how == "new":
            home[draw.choice(KEYS)] = copy.deepcopy(draw.choice(WRONG))
        else:
            home[last] = copy.deepcopy(draw.choice(WRONG))
    return config


SEEDS = [json.loads(file.read_text()) for file in sorted(GOLDEN.glob("*.json"))]
SEEDS = [seed.get("config", seed) for seed in SEEDS]
KEYS = sorted({k for seed in SEEDS for p in paths(seed) for k in p if isinstance(k, str)} | {
    "alpha", "mixed_b", "n_start", "truncate", "attn_factor", "rotary_pct", "rope_interleave",
    "partial_rotary_factors", "per_layer_config", "llama_4_scaling", "rotary_emb_base",
    "qk_rope_head_dim", "rotary_dim", "rope_scaling", "layer_types", "text_config",
    "thinker_config",
})  # fmt: skip


def main():
    import atheris

    with atheris.instrument_imports(include=["rope_fused"]):
        import rope_fused  # noqa: F401

    def one(data):
        """Bytes that are JSON are taken as they are, others choose changes of a known one."""
        try:
            config = json.loads(data)
            config = config.get("config", config) if isinstance(config, dict) else config
        except (ValueError, RecursionError):
            draw = random.Random(data)
            config = changed(draw.choice(SEEDS), draw)
        outcome(config)

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
