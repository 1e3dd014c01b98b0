"""The lab's world: Python sources as bytes, passkeys to remember, and a small Llama to learn them.

A vocabulary of 128 ASCII bytes needs no tokenizer of anybody's and no download; a model of 0.77
million parameters that reads 128 tokens shows what the papers show of 7 billion that read 4096.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import sysconfig
from pathlib import Path

import torch
import transformers

from ...context.prompts import PASSKEY_BRIEF
from ...report import UserError

WINDOW = 128  # tokens the model is trained on
THETA = 10000.0
_NO_CODE = {"test", "tests", "encodings", "site-packages", "dist-packages"}
_HELD_OUT_BYTES = 16_384  # a held-out file is at least so long
DIGITS = 5


@dataclasses.dataclass(frozen=True)
class Texts:
    """Token ids, int64 [tokens], of sources that are trained on, searched on and tested on."""

    train: torch.Tensor
    search: torch.Tensor
    test: torch.Tensor


def texts() -> Texts:
    """The sources of this interpreter's standard library; every eighth long one is held out."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(f for f in root.rglob("*.py") if not _NO_CODE & set(f.relative_to(root).parts))
    held = [f for f in files if f.stat().st_size >= _HELD_OUT_BYTES][::8]
    if len(held) < 4:
        raise UserError(f"the standard library in {root} has no sources to learn from")
    train = b"\n".join(f.read_bytes() for f in files if f not in set(held))
    return Texts(ids(train), *(_excerpts(held[half::2]) for half in range(2)))


def _excerpts(files):
    """4096 bytes from inside of each file: one long file must not be all of the text."""
    middle = (f.read_bytes()[4096:] for f in files)
    return ids(b"".join(data[:4096] for data in middle))


def ids(data: bytes) -> torch.Tensor:
    """Bytes as token ids, int64 [tokens]; what is not ASCII becomes a question mark."""
    found = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    return torch.where(found < 128, found, ord("?"))


def text(tokens: torch.Tensor) -> str:
    """The text of token ids."""
    return bytes(tokens.tolist()).decode("ascii")


def model(seed, layers=4, width=128) -> transformers.LlamaForCausalLM:
    """A Llama with random weights: heads of 32 dimensions, tied embeddings."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=width,
        intermediate_size=width * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per character, with the ids of :func:`ids`."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    table = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    table.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    table.normalizer = normalizers.Replace(Regex(r"[^\x00-\x7f]"), "?")
    table.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=table, clean_up_tokenization_spaces=False
    )


# -- what is drawn from it -----------------------------------------------------------------------


def windows(tokens, batch, seqlen, generator):
    """``batch`` random stretches of a text, int64 [batch, seqlen]."""
    starts = torch.randint(tokens.numel() - seqlen + 1, (batch, 1), generator=generator)
    return tokens[starts + torch.arange(seqlen)]


def passkeys(tokens, batch, seqlen, generator):
    """Stretches of text that end in a passkey prompt as long as fits, and its answer.

    The words are those of ``rope-fused evaluate passkey``, at a random depth.

    Returns:
        int64 [batch, seqlen]; the last DIGITS of a row are the answer.
    """
    rows = windows(tokens, batch, seqlen, generator)
    rng = random.Random(torch.randint(2**62, (), generator=generator).item())
    for row in rows:
        head, [(depth, needle)], tail, (key,) = PASSKEY_BRIEF.make(rng, rng.random())
        ending = f"{tail} {key}"
        room = seqlen - len(head) - len(needle) - len(ending)
        sentences = list(_fitting(PASSKEY_BRIEF.filler, room))
        sentences.insert(round(depth * len(sentences)), needle)
        prompt = ids((head + " ".join(sentences) + ending).encode())
        row[seqlen - len(prompt) :] = prompt
    return rows


def _fitting(sentences, room):
    """Sentences, round and round, while they and a space for each are within ``room``."""
    for sentence in itertools.cycle(sentences):
        room -= len(sentence) + 1
        if room < 0:
            return
        yield sentence


def mixture(tokens, batch, lengths, share):
    """``draw`` for context.training.train: text, and a ``share`` of rows with passkeys.

    ``lengths``: one of them, at random, for every micro-batch, of as many tokens as ``batch`` rows
    of the longest.
    """

    def draw(generator):
        seqlen = lengths[torch.randint(len(lengths), (), generator=generator).item()]
        rows = batch * max(lengths) // seqlen
        keys = round(rows * share)
        parts = [windows(tokens, rows - keys, seqlen, generator)]
        if keys:
            parts.append(passkeys(tokens, keys, seqlen, generator))
        return torch.cat(parts)

    return draw
