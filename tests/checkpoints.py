"""Shared by the tests of context extension: a tiny Llama in a folder, with its own tokenizer."""

import sysconfig
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 384
WINDOW = 64


def train_tokenizer():
    """A byte-level BPE tokenizer that has learned a few words of Python."""
    source = Path(sysconfig.get_path("stdlib"), "textwrap.py").read_text()
    reader = Tokenizer(models.BPE())
    reader.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reader.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    reader.train_from_iterator([source], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=reader, bos_token="<s>", eos_token="</s>"
    )


def make_llama(seed=0, **config):
    """Random weights, large enough that predictions differ from token to token."""
    torch.manual_seed(seed)
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "bos_token_id": 0,
        "eos_token_id": 1,
    } | config
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(6)
    return model


def save_checkpoint(folder, **config):
    """A folder as save_pretrained of model and tokenizer leaves it."""
    make_llama(**config).save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    return folder


def text_of(characters):
    """Some text that the tokenizer has not been trained on."""
    return Path(sysconfig.get_path("stdlib"), "heapq.py").read_text()[:characters]
