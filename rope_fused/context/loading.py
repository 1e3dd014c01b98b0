"""A causal language model and its tokenizer, from a local folder, with the rope block asked for.

Nothing is fetched, no code of a checkpoint is run, and weights come from safetensors alone. How to
give a loaded model other frequencies without loading it again: :mod:`rope_fused.context.swap`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers reads it when it is imported

import torch
import transformers
from safetensors import SafetensorError

from ..spec import RopeSpec

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
# Kept from the model's own block where a new one is silent: they say what the weights are.
_OF_THE_WEIGHTS = ("rope_theta", "partial_rotary_factor")
# What decides what a checkpoint computes.
_FILES = ("config.json", "*.safetensors", "*token*", "vocab*", "merges*", "*.model", "*.tiktoken")
_ENDS = 1 << 20
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    ImportError,
    RuntimeError,
    TypeError,
    SafetensorError,
)
"""What transformers and what it reads with raise for whatever is wrong with a checkpoint."""
_NEEDS_ORIGINAL = ("yarn", "longrope", "llama3")


class CheckpointError(OSError):
    """A folder is not a checkpoint that can be read; the message says what it lacks."""


def load(folder, *, rope=None, tokenizer=None, dtype="auto", device="cpu"):
    """A model in eval mode, and the tokenizer that goes with it.

    Args:
        folder: what ``save_pretrained`` of a transformers causal LM wrote, weights in safetensors.
        rope: a ``rope_parameters`` block (:func:`read_rope`) instead of the checkpoint's own; what
            it leaves open is filled in by :func:`complete_rope`. The model is built with it.
        tokenizer: None: the one in ``folder``. "bytes": :func:`byte_tokenizer`. Else another
            folder.
        dtype: of weights and activations; "auto": as they were saved.
        device: where the model goes.

    Returns:
        (model, tokenizer): a transformers ``PreTrainedModel``, a ``PreTrainedTokenizerBase``.

    Raises:
        CheckpointError: no folder, no safetensors, no tokenizer, code of its own, ...
        ValueError: the ``rope`` block is refused.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: it is not a checkpoint")
    reader = load_tokenizer(folder if tokenizer is None else tokenizer)
    config = load_config(folder, rope)
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} has no weights in safetensors, the only format that is read"
        )
    model = _local(
        transformers.AutoModelForCausalLM,
        folder,
        config=config,
        dtype=dtype,
        use_safetensors=True,
    )
    return model.to(device).eval(), reader


def load_config(folder, rope=None):
    """The configuration in ``folder``, its ``rope_parameters`` replaced by ``rope``, if given."""
    config = _local(transformers.AutoConfig, Path(folder))
    if rope is not None:
        text = config.get_text_config()
        if not hasattr(text, "rope_parameters"):
            raise ValueError(f"rope needs a rotary embedding, which {type(text).__name__} has not")
        text.rope_parameters = complete_rope(text, rope)
    return config


def load_tokenizer(folder):
    """The tokenizer in ``folder``; of "bytes", :func:`byte_tokenizer`."""
    if folder == "bytes":
        return byte_tokenizer()
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise CheckpointError(
            f"{folder} has no tokenizer: save one there, or name one with --tokenizer "
            "(--tokenizer bytes for a model that reads bytes)"
        )
    tokenizer = _local(transformers.AutoTokenizer, folder)
    if not len(tokenizer):
        raise CheckpointError(f"{folder} has a tokenizer with an empty vocabulary")
    return tokenizer


def read_rope(text) -> dict:
    """The block that ``--rope`` names: JSON, or a file of it; ``{"rope_parameters": {…}}`` counts.

    Raises:
        ValueError: neither a file nor JSON of an object.
    """
    source = text
    if not text.lstrip().startswith("{"):
        source = Path(text).read_text(encoding="utf-8")
    try:
        block = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"rope must be JSON, got {source[:60]!r}: {error}") from None
    if isinstance(block, dict) and isinstance(block.get("rope_parameters"), dict):
        block = block["rope_parameters"]
    if not isinstance(block, dict):
        raise ValueError(f"rope must be a JSON object, got {source[:60]!r}")
    return block


def complete_rope(config, block: Mapping) -> dict:
    """``block`` with what it leaves open taken from ``config``, and checked.

    Taken are ``rope_theta``, ``partial_rotary_factor`` and, for methods that have it,
    ``original_max_position_embeddings``: that of ``config`` or of its block, else its
    ``max_position_embeddings``. Where layers have blocks of their own, ``block`` is nested as
    theirs are, ``{"full_attention": {...}}``, and kinds it does not name keep theirs.

    Raises:
        ValueError: what :meth:`RopeSpec.from_config` refuses, by its name.
    """
    own = config.rope_parameters or {}
    if not _is_nested(own):
        kinds = [key for key, value in block.items() if isinstance(value, Mapping)]
        if kinds:
            raise ValueError(f"rope must be one block for all layers here, got {', '.join(kinds)}")
        done = _completed(config, own, block)
        _try(config, done, [None])
        return done
    if not _is_nested(block) or not block.keys() <= own.keys():
        raise ValueError(f"rope must be nested by layer type, {', '.join(own)}, as the model's is")
    done = {kind: _completed(config, own[kind] or {}, b) for kind, b in block.items()}
    _try(config, own | done, list(done))
    return own | done


def original_length(config) -> int:
    """The window, in tokens, that the weights of ``config`` were trained for before any stretch."""
    name = "original_max_position_embeddings"
    own = (config.rope_parameters or {}).get(name)
    return int(getattr(config, name, None) or own or config.max_position_embeddings)


def byte_tokenizer():
    """A tokenizer whose ids are the bytes of UTF-8, 0 to 255; no special tokens.

    For models that read bytes; ``byte_tokenizer().save_pretrained(folder)`` makes their checkpoint
    complete.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    # The byte-level alphabet: bytes that print stand for themselves, the others come after 255.
    others = iter(range(256, 512))
    letters = {chr(b if b in printable else next(others)): b for b in range(256)}
    reader = Tokenizer(models.BPE(vocab=letters, merges=[]))
    reader.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reader.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=reader, clean_up_tokenization_spaces=False
    )


def encode(tokenizer, text: str, model=None) -> torch.Tensor:
    """``text`` as ids, int64 [tokens], with the special tokens that the tokenizer adds by itself.

    Raises:
        ValueError: ``model`` has no embedding for some id: it goes with another tokenizer.
    """
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    if model is not None and ids.numel():
        rows = model.get_input_embeddings().weight.shape[0]
        if int(ids.max()) >= rows:
            raise ValueError(
                f"tokenizer must go with the model, which has {rows} embeddings, got id "
                f"{int(ids.max())}"
            )
    return ids


def identity(*folders) -> str:
    """16 hex digits that stand for the checkpoints, or tokenizers, in some folders.

    Small files count in full, others by their size and their first and last megabyte: weights of
    another training differ there, and a terabyte need not be read.
    """
    digest = hashlib.sha256()
    files = {file for folder in folders for name in _FILES for file in Path(folder).glob(name)}
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as held:
            digest.update(held.read(_ENDS))
            held.seek(max(held.tell(), size - _ENDS))
            digest.update(held.read())
    return digest.hexdigest()[:16]


def _is_nested(block):
    return bool(block) and all(isinstance(value, Mapping) for value in block.values())


def _try(config, block, kinds):
    """Raise what is wrong with ``block`` for these kinds of layers."""
    changed = config.to_dict() | {"rope_parameters": copy.deepcopy(block)}
    for kind in kinds:
        RopeSpec.from_config(changed, kind, interleaved=False)


def _completed(config, own, block):
    done = {key: own[key] for key in _OF_THE_WEIGHTS if own.get(key) is not None}
    done |= copy.deepcopy(dict(block))
    done.setdefault("rope_type", "default")
    if done["rope_type"] in _NEEDS_ORIGINAL:
        done.setdefault("original_max_position_embeddings", original_length(config))
    return done


def _local(kind, folder, **options):
    """``kind.from_pretrained`` without a network or foreign code; its many errors become one."""
    try:
        return kind.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **options
        )
    except UNREADABLE as error:
        raise CheckpointError(f"{kind.__name__} cannot read {folder}: {error}") from error
