"""What each model family does with positions: the facts a config.json leaves to the code.

One row per ``model_type``. The facts are those of transformers 5.23 (class defaults of
``configuration_*.py``, the rotation of ``modeling_*.py``) and, for types it does not have, of the
code that ships with the checkpoints.
"""

from __future__ import annotations

from typing import NamedTuple


class Layer(NamedTuple):
    """One kind of layer of a model whose layers rotate differently."""

    rope_theta: float
    theta_key: str = "rope_theta"
    """The top-level key that gives the base in configurations that do not nest their rope block."""
    scaled: bool = False
    """A rope_scaling that is not nested is meant for this kind of layer."""
    block: tuple[tuple[str, object], ...] = ()
    """What the rope block holds when the configuration has none."""
    head_dim: int | None = None
    head_dim_key: str = "head_dim"


class Model(NamedTuple):
    """How a model family rotates, and what its absent keys mean."""

    interleaved: bool
    rope_theta: float
    head_dim: int
    """When the configuration gives none."""
    own_head_dim: bool
    """``head_dim`` is the default even if hidden_size and num_attention_heads say otherwise."""
    partial: float | None
    """Default partial_rotary_factor; None: the default rope of this model does not read the key."""
    max_position_embeddings: int
    mla: bool = False
    """Multi-head latent attention: head_dim is qk_rope_head_dim, and mscale_all_dim scales the
    softmax."""
    at_end: bool = False
    """The rotated slice is the end of the head, not its beginning."""
    mrope: str = ""
    """How axes share the pairs: "blocks", "alternating" or "ernie"."""
    mrope_section: tuple[int, ...] = ()
    nope: str = ""
    """The kind of layer that does not rotate at all."""
    temperature: bool = False
    """Reads llama_4_scaling_beta."""
    theta_key: str = "rope_theta"
    """The top-level key of the base."""
    partial_key: str = "partial_rotary_factor"
    """The top-level key of the share of the head that rotates."""


# model_type, pairs, rope_theta, head_dim ("=": own_head_dim), partial, max_position_embeddings,
# others
_ROWS = """
afmoe                 half         1e4     =128  -     16384    nope=full_attention
apertus               half         12e6    128   -     65536
arcee                 half         1e4     80    -     4096
aria_text             half         1e4     128   -     2048
baichuan              half         1e4     128   -     4096
bamba                 half         1e4     128   0.5   262144
bitnet                half         5e5     128   -     2048
cohere                interleaved  5e5     128   -     8192
cohere2               interleaved  1e4     128   -     8192     nope=full_attention
cwm                   half         1e6     =128  -     131072
deepseek              half         1e4     128   -     2048
deepseek_v2           interleaved  1e4     64    -     2048     mla
deepseek_v3           interleaved  1e4     64    -     4096     mla
deepseek_v32          interleaved  1e4     64    -     163840   mla
deepseek_v4           interleaved  1e4     =512  0.125 1048576  at_end
dots1                 half         1e4     144   -     2048
ernie4_5              interleaved  5e5     =128  -     131072
ernie4_5_moe          interleaved  5e5     128   -     131072
ernie4_5_vl_moe_text  interleaved  5e5     128   -     131072   ernie=22,22,20
exaone                half         1e4     128   -     2048
exaone4               half         1e4     128   -     2048     nope=full_attention
exaone_moe            half         1e4     128   -     2048     nope=full_attention
falcon                half         1e4     64    -     2048
falcon_h1             half         1e4     128   -     8192
flex_olmo             half         5e5     128   -     4096
gemma                 half         1e4     =256  -     8192
gemma2                half         1e4     =256  -     8192
gemma3_text           half         1e6     =256  -     131072
gemma3n_text          half         1e6     =256  -     32768
gemma4_text           half         1e6     =256  -     131072
glm                   interleaved  1e4     =128  0.5   131072
glm4                  interleaved  1e4     =128  0.5   131072
glm4_moe              half         1e4     42    0.5   131072
glm4_moe_lite         interleaved  1e4     64    -     202752   mla
glm4v_moe_text        half         1e4     42    0.5   65536    blocks=8,12,12
glm4v_text            interleaved  1e4     128   1     32768    blocks=8,12,12
glm_moe_dsa           interleaved  1e4     64    -     202752   mla
gpt_neox              half         1e4     96    0.25  2048     keys=rotary_emb_base,rotary_pct
gpt_oss               half         15e4    =64   -     131072
granite               half         1e4     128   -     2048
granitemoe            half         1e4     128   -     2048
granitemoehybrid      half         1e4     128   -     2048
granitemoeshared      half         1e4     128   -     2048
grok                  half         1e4     128   -     8192
helium                interleaved  1e5     =128  -     4096
hunyuan_v1_dense      half         1e4     128   -     2048
hunyuan_v1_moe        half         1e4     128   -     2048
hyperclovax           half         1e4     128   -     2048
internlm2             half         1e4     128   -     2048
internlm3             half         1e4     128   -     32768
kimi_k2               interleaved  1e4     64    -     4096     mla
lfm2                  half         1e6     80    -     128000
lfm2_moe              half         1e6     64    -     128000
llama                 half         1e4     128   -     2048
llama4_text           interleaved  5e5     =128  -     131072   nope=full_attention
longcat_flash         interleaved  1e7     64    -     131072   mla
mimo_v2_flash         half         5e6     =192  0.334 131072
minicpm               half         1e4     128   -     2048
minicpm3              half         1e4     32    -     32768    mla
minimax               half         1e6     128   -     131072
minimax_m2            half         5e6     =128  1     196608
ministral             half         1e4     128   -     131072
ministral3            half         1e4     =128  -     262144   temperature
mistral               half         1e4     128   -     131072
mistral4              interleaved  1e4     64    -     1048576  mla temperature
mixtral               half         1e6     128   -     131072
mllama_text_model     half         5e5     128   -     131072
modernbert            half         16e4    64    -     8192
modernbert-decoder    half         16e4    64    -     8192
nemotron              half         1e4     128   0.5   4096
olmo                  half         1e4     128   -     2048
olmo2                 half         1e4     128   -     2048
olmo3                 half         5e5     128   -     2048
olmo_hybrid           half         1e4     128   -     65536
olmoe                 half         1e4     128   -     4096
persimmon             half         1e4     64    0.5   16384
phi                   half         1e4     64    0.5   2048
phi3                  half         1e4     96    1     4096
phi4_multimodal       half         1e4     96    1     131072
phimoe                half         1e6     128   -     131072
qwen2                 half         1e4     128   -     32768
qwen2_5_omni_text     half         1e6     128   -     32768    blocks=16,24,24
qwen2_5_vl_text       half         1e6     128   -     32768    blocks=16,24,24
qwen2_moe             half         1e4     128   -     32768
qwen2_vl_text         half         1e6     128   -     32768    blocks=16,24,24
qwen3                 half         1e4     =128  -     32768
qwen3_5_moe_text      half         1e4     =256  0.25  32768    alternating=11,11,10
qwen3_5_text          half         1e4     =256  0.25  32768    alternating=11,11,10
qwen3_moe             half         1e4     64    -     32768
qwen3_next            half         1e4     =256  0.25  32768
qwen3_omni_moe_text   half         1e6     73    -     32768    alternating=24,20,20
qwen3_vl_moe_text     half         5e5     128   -     128000   alternating=24,20,20
qwen3_vl_text         half         5e5     =128  -     128000   alternating=24,20,20
seed_oss              half         1e4     =128  -     524288
smollm3               half         2e6     128   -     32768
solar_open            half         1e6     =128  1     131072
stablelm              half         1e4     80    0.25  4096
starcoder2            half         1e4     128   -     4096
step3p5               half         1e4     =128  1     128000
vaultgemma            half         1e4     =256  -     8192
youtu                 interleaved  1e4     64    -     131072   mla
"""


def _model(pairs, theta, head_dim, partial, length, *others) -> Model:
    traits = {}
    for other in others:
        name, _, value = other.partition("=")
        if name in ("blocks", "alternating", "ernie"):
            traits |= {"mrope": name, "mrope_section": tuple(map(int, value.split(",")))}
        elif name == "keys":
            traits["theta_key"], traits["partial_key"] = value.split(",")
        else:
            traits[name] = value or True
    return Model(
        pairs == "interleaved",
        float(theta),
        int(head_dim.lstrip("=")),
        head_dim.startswith("="),
        None if partial == "-" else float(partial),
        int(length),
        **traits,
    )


MODELS = {name: _model(*cells) for name, *cells in map(str.split, _ROWS.strip().splitlines())}

_GLOBAL_AND_LOCAL = {
    "full_attention": Layer(1e6, scaled=True),
    "sliding_attention": Layer(1e4, "rope_local_base_freq"),
}
_MODERNBERT = {
    "full_attention": Layer(16e4, "global_rope_theta", scaled=True),
    "sliding_attention": Layer(1e4, "local_rope_theta", scaled=True),
}
_MIMO = (("partial_rotary_factor", 0.334),)
LAYERS: dict[str, dict[str, Layer]] = {
    "gemma3_text": _GLOBAL_AND_LOCAL,
    "gemma3n_text": _GLOBAL_AND_LOCAL,
    "gemma4_text": {
        "full_attention": Layer(
            1e6,
            block=(
                ("rope_type", "proportional"),
                ("partial_rotary_factor", 0.25),
                ("rope_theta", 1e6),
            ),
            head_dim=512,
            head_dim_key="global_head_dim",
        ),
        "sliding_attention": Layer(1e4, block=(("rope_theta", 1e4),)),
    },
    "deepseek_v4": {
        "main": Layer(1e4),
        "compress": Layer(16e4, "compress_rope_theta", scaled=True),
    },
    "mimo_v2_flash": {
        "full_attention": Layer(5e6, block=(("rope_theta", 5e6), *_MIMO)),
        "sliding_attention": Layer(1e4, block=(("rope_theta", 1e4), *_MIMO)),
    },
    "modernbert": _MODERNBERT,
    "modernbert-decoder": _MODERNBERT,
    "olmo3": {"full_attention": Layer(5e5, scaled=True), "sliding_attention": Layer(5e5)},
    "step3p5": {"full_attention": Layer(1e4, scaled=True), "sliding_attention": Layer(1e4)},
}
"""Families whose layers rotate differently: {model_type: {layer_type: ...}}."""

FLAT = {
    "deepseek_v4": "read",
    "gemma3_text": "lost",
    "gemma3n_text": "lost",
    "olmo3": "lost",
    "step3p5": "lost",
}
"""What transformers 5 makes of a rope_parameters of these families that is not nested: it is read
as rope_scaling is, or has no effect. It loads no other of them with one."""

LOADED = {
    "phi3": ("default", "longrope"),
    "phi4_multimodal": ("default", "longrope"),
    "phimoe": ("default", "longrope"),
}
"""The methods with which transformers 5 loads a family, where those are not all it has."""

NO_HEAD_DIM = ("hunyuan_v1_dense", "hunyuan_v1_moe", "minimax", "ministral", "mixtral")
"""Families whose head_dim stays None unless it is given; transformers 5.23 does not load longrope
without it."""

LAYER_ALIASES = {
    "deepseek_v4": {
        "sliding_attention": "main",
        "compressed_sparse_attention": "compress",
        "heavily_compressed_attention": "compress",
    }
}
"""Layer types of the layer list that go by another name in the rope block."""

_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0}
_MINISTRAL = _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
BLOCKS: dict[str, dict[str, object]] = {
    "apertus": _LLAMA3 | {"rope_theta": 12e6, "original_max_position_embeddings": 8192},
    "cwm": _LLAMA3 | {"rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 8192},
    "gpt_oss": _YARN
    | {
        "factor": 32.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "ministral3": _MINISTRAL
    | {"rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384},
    "mistral4": _MINISTRAL
    | {"rope_theta": 1e4, "factor": 128.0, "original_max_position_embeddings": 8192},
}
"""The rope block of families that have one even when the configuration does not."""


def find(model_type: str | None) -> tuple[str, Model] | None:
    """The family of a ``model_type``, also of the composite model whose text half it names; None if
    unknown."""
    for name in (model_type, f"{model_type}_text"):
        if name in MODELS:
            return name, MODELS[name]
    return None
