"""Where each token of a batch stands: its position inside its sequence, and the table its sequence
uses."""

from __future__ import annotations

import os

import torch


def checks_values(tensor: torch.Tensor) -> bool:
    """Whether to look at a tensor's values: on the CPU always, elsewhere (a host sync) with
    ROPE_FUSED_CHECK=1."""
    return tensor.device.type == "cpu" or os.environ.get("ROPE_FUSED_CHECK") == "1"


def check_sequences(cu_seqlens, seq_lens, tokens: int, name: str) -> None:
    """Raise ValueError unless `cu_seqlens` runs from 0 to `tokens` without falling and `seq_lens`,
    an argument of that `name`, are not negative."""
    if cu_seqlens is not None and checks_values(cu_seqlens):
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != tokens:
            raise ValueError(
                f"cu_seqlens must start at 0 and end at {tokens} tokens, got {_brief(ends)}"
            )
        if any(b < a for a, b in zip(ends, ends[1:], strict=False)):
            raise ValueError(f"cu_seqlens must not decrease, got {_brief(ends)}")
    if (
        seq_lens is not None
        and checks_values(seq_lens)
        and seq_lens.numel()
        and int(seq_lens.min()) < 0
    ):
        raise ValueError(f"{name} must not be negative, got {_brief(seq_lens.tolist())}")


def sequence_of_token(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """The sequence each packed token belongs to: int64 [tokens]. Any cu_seqlens gives indices in
    bounds."""
    token = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
    return sequence.clamp_max(max(cu_seqlens.shape[0] - 2, 0))


def token_positions(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """Positions that restart at 0 with every packed sequence: int64 [1, tokens]."""
    token = torch.arange(tokens, dtype=torch.int64, device=cu_seqlens.device)
    return (token - cu_seqlens.to(torch.int64)[sequence_of_token(cu_seqlens, tokens)])[None]


def sequence_lengths(positions: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """max(position) + 1 of every sequence: int64 [num_seqs], 0 where there is no token. A length
    that does not fit is one less.

    positions: int [rows, seqlen] (one axis); a row is a sequence, or with cu_seqlens one row holds
    them all."""
    if cu_seqlens is None:
        if positions.shape[-1] == 0:
            return positions.new_zeros(positions.shape[0], dtype=torch.int64)
        return _length(positions.amax(-1))
    lengths = torch.zeros(cu_seqlens.shape[0] - 1, dtype=torch.int64, device=positions.device)
    sequence = sequence_of_token(cu_seqlens, positions.shape[-1])
    return lengths.scatter_reduce(0, sequence, _length(positions[0]), "amax", include_self=False)


def _length(last: torch.Tensor) -> torch.Tensor:
    return last.to(torch.int64).clamp_max(torch.iinfo(torch.int64).max - 1) + 1


def table_of_token(
    positions: torch.Tensor,
    lengths: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    *,
    switch_length: int | None,
    n_start: int,
) -> torch.Tensor:
    """The row of the tables each token uses: int32 [rows, seqlen].

    With a switch (LongRoPE) a sequence longer than `switch_length` uses row 1, else row 0, and
    tokens at positions below `n_start` row 2; without (`switch_length=None`) every sequence has a
    row of its own."""
    if switch_length is None:
        row = torch.arange(lengths.shape[0], dtype=torch.int32, device=lengths.device)
    else:
        row = (lengths > switch_length).to(torch.int32)
    if cu_seqlens is None:
        index = row[:, None].expand(row.shape[0], positions.shape[-1])
    else:
        index = row[sequence_of_token(cu_seqlens, positions.shape[-1])][None]
    return torch.where(positions < n_start, 2, index).to(torch.int32) if n_start else index


def token_rows(
    positions, cu_seqlens, seq_lens, batch, seqlen, switch_length, n_start, choose, seq_lens_name
):
    """Kernel of ops.token_rows: the positions of every token where none are given, else empty, and
    with `choose` the row of the tables each uses, else empty."""
    check_sequences(cu_seqlens, seq_lens, seqlen, seq_lens_name)
    device = next(t.device for t in (positions, cu_seqlens, seq_lens) if t is not None)
    own = positions is None
    if own and cu_seqlens is not None:
        positions = token_positions(cu_seqlens, seqlen)
    elif own:
        positions = torch.arange(seqlen, device=device)[None]
    one_axis = positions.amax(0) if positions.dim() == 3 else positions
    one_axis = one_axis if cu_seqlens is not None else one_axis.expand(batch, seqlen)
    index = torch.empty(0, dtype=torch.int32, device=device)
    if choose:
        lengths = sequence_lengths(one_axis, cu_seqlens) if seq_lens is None else seq_lens
        options = {"switch_length": switch_length, "n_start": n_start}
        index = table_of_token(one_axis, lengths, cu_seqlens, **options).contiguous()
    return positions if own else torch.empty(0, dtype=torch.int64, device=device), index


def _brief(values: list) -> str:
    return str(values) if len(values) <= 12 else f"[{', '.join(map(str, values[:6]))}, ...]"
