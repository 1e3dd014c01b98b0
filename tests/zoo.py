"""Tiny random models of every decoder family of the installed transformers that turns its q and k.

A family's configuration is made of its own defaults, shrunk by the names of its keys. Few families
need a word of their own; these are at the end.
"""

import functools
import inspect
import sys

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

# By the name of the key, wherever a configuration has it.
TINY = {
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "embed_dim": 32,
    "intermediate_size": 48,
    "ffn_hidden_size": 48,
    "mlp_hidden_size": 48,
    "ffn_dim": 48,
    "n_inner": 48,
    "num_hidden_layers": 2,
    "n_layers": 2,
    "n_layer": 2,
    "depth": 1,
    "num_attention_heads": 4,
    "n_heads": 4,
    "n_head": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "kv_n_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "max_position_embeddings": 64,
    "max_seq_len": 64,
    "n_positions": 64,
    "sliding_window": 8,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_start_index": 1,
    # latent attention
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 16,
    "global_head_dim": 16,
    # states
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_num_heads": 4,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "ssm_state_size": 8,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "lru_width": 32,
    # images
    "image_size": 32,
    "patch_size": 8,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}


def _causal():
    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    others = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return {k: v for k, v in others.items() if k in MULTIMODAL} | dict(names)


@functools.lru_cache
def families():
    """{model_type: class name} of the families with a rotary embedding of their own."""
    found = {}
    for model_type, name in sorted(_causal().items()):
        if model_type in SKIPPED or model_type not in CONFIG_MAPPING or not isinstance(name, str):
            continue
        try:
            kind = getattr(transformers, name)
            source = inspect.getsource(sys.modules[kind.__module__])
        except Exception:
            continue
        own = getattr(kind.config_class, "model_type", model_type) == model_type
        if "apply_rotary" in source and (own or model_type in MULTIMODAL):
            found[model_type] = name
    return found


def tiny_config(kind):
    """A small configuration of the class ``kind``, its sub-configurations included."""
    usual = kind()
    told = WORDS.get(kind.model_type, {})
    given = {}
    for key, value in {**TINY, **told}.items():
        settable = getattr(getattr(kind, key, None), "fset", True)
        if settable is not None and (key in told or _has(usual, key)):
            given[key] = value
    if _has(usual, "qk_rope_head_dim") and "head_dim" not in told:
        given.pop("head_dim", None)
    for key, value in (getattr(kind, "sub_configs", None) or {}).items():
        sub = getattr(usual, key, None)
        sub = type(sub) if sub is not None else value
        if sub is not None and hasattr(sub, "model_type") and key not in told:
            given[key] = tiny_config(sub).to_dict()
    types = getattr(usual, "layer_types", None)
    if types and "layer_types" not in told and "num_hidden_layers" in given:
        kinds = [*dict.fromkeys(types)]
        given["num_hidden_layers"] = max(2, len(kinds))
        if getattr(getattr(kind, "layer_types", None), "fset", True) is not None:
            given["layer_types"] = (kinds * 2)[: given["num_hidden_layers"]]
    given = {k: v for k, v in given.items() if v is not ABSENT}
    config = kind(**given)
    if not hasattr(config, "pad_token_id"):  # 5.0.0 forgot it in some families
        config.pad_token_id = 0
    return config


def _has(config, key):
    try:
        return key in vars(config) or hasattr(config, key)
    except Exception:  # a key that may differ from layer to layer
        return True


def make(model_type, dtype=torch.float64, yarn=True):
    """A model in eval mode, its weights random enough for every part of it to count.

    yarn: with YaRN's factors, where the family has a rope block of the usual form.
    """
    config = tiny_config(CONFIG_MAPPING[model_type])
    if yarn:
        for part in _parts(config):
            _scale(part)
    for part in _parts(config):
        part._experts_implementation = "eager"  # the others have no float64
    kind = getattr(transformers, _causal()[model_type])
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in kind(config).parameters())
    except NotImplementedError:  # some read the values of their weights when they are made
        size = 0
    if size > 7e6:
        raise ValueError(f"{model_type} is not tiny: {size / 1e6:.1f} M parameters")
    torch.manual_seed(sum(map(ord, model_type)))
    model = kind(config).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.normal_(std=p.shape[-1] ** -0.5)
            else:
                p.add_(torch.randn_like(p), alpha=0.3)
    return model


def _parts(config):
    """A configuration, and the text half of a composite one."""
    halves = (getattr(config, k, None) for k in ("text_config", "thinker_config"))
    return [config, *(half for half in halves if half is not None)]


OLD = int(transformers.__version__.split(".")[0]) < 5
BLOCK = "rope_scaling" if OLD else "rope_parameters"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def _scale(config):
    """Put YaRN into the rope block of ``config``, of all of its layers or of those with all."""
    if config.model_type in UNSCALED:
        return
    if OLD:
        if getattr(config, BLOCK, YARN) is None and hasattr(config, "rope_theta"):
            config.rope_scaling = {"type": "yarn", **YARN}
        return
    block = getattr(config, BLOCK, None)
    if not isinstance(block, dict):
        return
    nested = block.get("full_attention")
    block = nested if isinstance(nested, dict) else block
    if block.get("rope_type") == "default":
        block |= YARN


UNSCALED = ("phimoe", "recurrent_gemma")  # other methods than YaRN, and none
ABSENT = object()
# Composite models whose text half is in no mapping of causal models.
MULTIMODAL = (
    "cosmos3_edge",
    "glm4v",
    "glm4v_moe",
    "glm_ocr",
    "mistral4",
    "mistral_large4",
    "paddleocr_vl",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
)
# Families that are not run, and why.
SKIPPED = {
    "blt": "its tables of byte groups are not tiny",
    "dots3_note": "as dots3_note_text",
    "dots3_note_text": "its towers are not tiny",
    "gemma3n": "needs timm; its text half is gemma3n_text",
    "gemma4": "its text half is gemma4_text",
    "gemma4_unified": "its towers are not tiny",
    "inkling2_text": "does not run in float64",
    "jamba": "has no rotary embedding",
    "nemotron_h": "has no rotary embedding",
    "qwen4_exp_text": "its configuration has no tiny form",
}


def _axes(*section, **rest):
    """A rope block for several position axes."""
    block = {"rope_type": "default", "mrope_section": [*section]}
    return {BLOCK: block | rest, **rest} if OLD else {BLOCK: block | {"rope_theta": 1e4} | rest}


_FOUR = {"num_key_value_heads": 4}
_ANY_LAYERS = {"layer_types": ABSENT, "layers_block_type": ABSENT}
WORDS = {
    "axk2": _FOUR,
    "deepseek_v32": _FOUR,
    "glm_moe_dsa": _FOUR,
    "bamba": _ANY_LAYERS | {"attn_layer_indices": [0]},
    "recurrent_gemma": _ANY_LAYERS | {"num_hidden_layers": 3, "head_dim": 8},
    "helium": {"head_dim": 8},
    "longcat_flash": {
        "head_dim": 8,
        "num_layers": 1,
        "expert_ffn_hidden_size": 16,
        "zero_expert_num": 2,
    },
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "zaya": {"num_experts_per_tok": 1},
    "jamba": _ANY_LAYERS | {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["attention", "mamba"], "position_embedding_type": "rope"},
    "zamba2": {
        "hybrid_layer_ids": [1],
        "layers_block_type": ["mamba", "hybrid"],
        "use_mem_rope": True,
    },
    "mimo_v2_flash": {"head_dim": 24, "v_head_dim": 16},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "activation_sparsity_pattern": None,
        "intermediate_size": 48,
    },
    "gemma4_text": {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8},
    "qwen2_vl_text": _axes(2, 1, 1),
    "qwen2_5_vl_text": _axes(2, 1, 1),
    "glm4v_text": _axes(1, 2, 1),
    "glm_ocr_text": _axes(1, 2, 1),
    "glm4v_moe_text": _axes(2, 1, 1, partial_rotary_factor=0.5) | {"head_dim": 16},
    "paddleocr_vl_text": _axes(2, 3, 3),
    "qwen3_5_text": _axes(2, 1, 1, partial_rotary_factor=0.5),
    "qwen3_5_moe_text": _axes(2, 1, 1, partial_rotary_factor=0.5),
    "qwen3_vl_text": _axes(3, 3, 2, mrope_interleaved=True),
    "qwen3_vl_moe_text": _axes(3, 3, 2, mrope_interleaved=True),
    "cosmos3_edge_text": _axes(3, 3, 2),
    "mistral_large4_text": _FOUR,
    "mistral_large4": _FOUR,
    "falcon_h1": _ANY_LAYERS | {"mamba_d_ssm": 64},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: _axes(3, 3, 2, mrope_interleaved=True)[BLOCK]
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 0.5},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}
        | ({} if OLD else {"hidden_size": 32}),
    },
    "minicpm3": _FOUR,
}
if OLD:
    UNSCALED += ("llama4_text", "phi3")  # any scaling is llama3's; lengths of its own
    # Their mixtures of experts have no float64.
    dense = {"first_k_dense_replace": 9}
    WORDS["Glm4vMoe_text"] = WORDS["glm4v_moe_text"]
    for name in ("deepseek_v3", "dots1", "glm4_moe", "Glm4vMoe_text"):
        WORDS[name] = WORDS.get(name, {}) | dense
    for name in ("ernie4_5_moe", "longcat_flash", "open-llama"):
        SKIPPED[name] = "does not run in float64"
