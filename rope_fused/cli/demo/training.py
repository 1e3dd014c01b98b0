"""Two transformers models from one seed, one patched, trained side by side on the same text."""

from __future__ import annotations

import dataclasses
import sysconfig
import time
from pathlib import Path

import torch
import transformers

from ... import patch
from ...report import UserError
from .comparison import EAGER, FUSED

WARM_UP = 3  # first steps, whose times say how fast memory is allocated
_TOKENIZED_BYTES = 1 << 21  # more text than is trained on in the time there is
_NO_CODE = {"test", "tests", "encodings", "site-packages", "dist-packages"}


@dataclasses.dataclass
class Run:
    """A model in training: its losses, and the seconds of every step."""

    name: str
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

    def step(self, ids, lr):
        """One step of AdamW on ``ids``, [batch, seqlen]."""
        start = time.perf_counter()
        self.optimizer.param_groups[0]["lr"] = lr
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)


def read_text(file=None) -> bytes:
    """The bytes of ``file``, or of the Python sources in this interpreter's standard library."""
    if file is not None:
        return Path(file).read_bytes()
    root = Path(sysconfig.get_path("stdlib"))
    files = [f for f in root.rglob("*.py") if not _NO_CODE & set(f.relative_to(root).parts)]
    data = b"\n".join(f.read_bytes() for f in sorted(files))
    if not data:
        raise UserError(f"the standard library in {root} has no sources; name a text with --text")
    return data


def tokens(data, folder=None) -> torch.Tensor:
    """Text as ids, int64 [tokens]: its bytes, or those of the tokenizer of a checkpoint."""
    if folder is None:
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    text = data[:_TOKENIZED_BYTES].decode(errors="replace")
    tokenizer = _local(transformers.AutoTokenizer, folder)
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def build(folder, dtype, layers, seed):
    """A byte-level Llama with random weights, or the checkpoint in ``folder``."""
    torch.manual_seed(seed)
    if folder is not None:
        return _local(transformers.AutoModelForCausalLM, folder, dtype=dtype).train()
    # Grouped queries, about 10 million parameters, and a window stretched from 128 to 512 tokens.
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    # Not .to(dtype), which would round the frequencies to that type too.
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def _local(kind, folder, **options):
    """``kind.from_pretrained`` without a network; other people's many errors become one."""
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{kind.__name__} cannot read {folder}: {error}") from error


def prepare(folder, dtype, layers, seed, precision):
    """Two Runs from the same weights, as transformers runs them and patched, and patch's report."""
    plain, patched = (build(folder, dtype, layers, seed) for _ in range(2))
    # "hf" promises transformers' own bits, and a fused projection has other ones.
    report = patch(patched, fuse_projection=precision == "exact", precision=precision)
    for name, level in report.levels.items():
        if level is None:
            where = f"{type(plain).__name__} {name}".rstrip()
            raise UserError(f"rope_fused.patch leaves {where} alone: {report.reasons[name]}")
    runs = [
        Run(name, model, torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True))
        for name, model in ((EAGER, plain), (FUSED, patched))
    ]
    return *runs, report


def train(runs, ids, *, steps, seconds, batch, seqlen, lr, seed, progress):
    """Train the runs in turns, the first one alternating, so that noise hits all of them alike.

    At most ``steps`` steps, ended early after ``seconds``, if not None; a constant learning rate
    after a linear warm-up over 20 steps. ``progress`` is a tqdm bar.
    """
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(seqlen)
    end = None if seconds is None else time.monotonic() + seconds
    for step in range(steps):
        starts = torch.randint(ids.numel() - seqlen + 1, (batch, 1), generator=generator)
        for run in runs if step % 2 == 0 else reversed(runs):
            run.step(ids[starts + offsets], lr * min(1.0, (step + 1) / 20))
        progress.update()
        progress.set_postfix({run.name: f"{run.losses[-1]:.4f}" for run in runs}, refresh=False)
        if end is not None and time.monotonic() > end:
            break
