"""Sharded tensors: what DTensors mean to apply_rope and qkv_rope, and which positions a rank has.

Every rank computes its own part, with its own positions, by the very functions that plain tensors
use; nothing is gathered that does not have to be. Placements, per dimension of the mesh:

==========  ================================  ========================  =====================
function    first argument                    others                    results
==========  ================================  ========================  =====================
apply_rope  q Replicate                       k Replicate               Replicate
apply_rope  q Shard(batch | seqlen | heads)   k the same                the same
qkv_rope    x Replicate or Shard(batch |      weights and biases        x's
            seqlen)                           Replicate
qkv_rope    x Replicate, or Shard, which is   weights and biases        Shard(heads)
            gathered                          Shard(0)
==========  ================================  ========================  =====================

``positions``, factors and other arguments that are plain tensors count as replicated and as global:
a shard takes its part of the positions. Gradients of whatever is replicated are summed over the
ranks. With a plain ``x`` and sharded weights (tensor parallel, as ColwiseParallel has it) results
are plain too, the heads of this rank; and so are, as beside any sharded module, the gradients of
plain factors and norm weights.

Context parallelism by plain tensors needs none of this: give each rank's ``positions``
(:func:`sequence_shard`).
"""

from __future__ import annotations

import torch


def is_sharded(*tensors) -> bool:
    """Whether there is a DTensor among ``tensors``, without importing it."""
    return any([type(t).__name__ == "DTensor" for t in tensors])  # noqa: C419 (Dynamo)


# ------------------------------------------------------------------------------------ positions


def sequence_shard(seqlen, world_size, rank, *, order="contiguous", device=None) -> torch.Tensor:
    """Which tokens of a sequence a rank has in context or sequence parallelism.

    They are the rank's positions, to be given as ``positions=`` or ``position_ids``, and the
    indices by which to take its part of anything along the sequence: ``x[:, sequence_shard(...)]``,
    or, with packed sequences, ``position_ids[:, sequence_shard(...)]``.

    Args:
        seqlen: tokens of the whole sequence.
        world_size, rank: how many ranks share it, and which one this is.
        order: "contiguous": rank r has the r-th of world_size parts. "zigzag": of twice as many
            parts the r-th and the r-th from the end, which evens out the work of causal attention
            (Llama-3 report, arXiv:2407.21783, 3.3.2; also in torch's context parallel, Megatron and
            TransformerEngine).
        device: of the result.

    Returns:
        int64 [seqlen / world_size].

    Raises:
        ValueError: seqlen is no multiple of the number of parts (pad it), or a rank that is not.
    """
    return _by_rank(seqlen, world_size, order, device)[_rank(rank, world_size)]


def sequence_unshard(seqlen, world_size, *, order="contiguous", device=None) -> torch.Tensor:
    """The way back: ``torch.cat(shards, dim).index_select(dim, sequence_unshard(...))``.

    Args: as :func:`sequence_shard`; ``shards`` are in the order of the ranks.

    Returns:
        int64 [seqlen].
    """
    return _by_rank(seqlen, world_size, order, device).flatten().argsort()


def _by_rank(seqlen, world_size, order, device):
    """The tokens of every rank: int64 [world_size, seqlen / world_size]."""
    if order not in ("contiguous", "zigzag"):
        raise ValueError(f"order must be 'contiguous' or 'zigzag', got {order!r}")
    parts = world_size if order == "contiguous" else 2 * world_size
    if world_size < 1 or seqlen % parts:
        raise ValueError(
            f"seqlen must be a multiple of {parts} for {world_size} ranks, {order}, got {seqlen}"
        )
    tokens = torch.arange(seqlen, device=device).view(parts, -1)
    if order == "zigzag":
        tokens = torch.cat((tokens[:world_size], tokens[world_size:].flip(0)), -1)
    return tokens


def _rank(rank, world_size):
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be one of 0 .. {world_size - 1}, got {rank}")
    return rank


# ------------------------------------------------------------------------------------ functions


def apply_rope(function, q, k, spec, positions, *, layout, seq_lens, cu_seqlens, **options):
    """``function``, which is rope_fused.apply_rope, on the shards of q and k."""
    dims = {"bshd": (0, 1, 2), "bhsd": (0, 2, 1), "thd": (None, 0, 1)}[layout]
    if k is not None and (not is_sharded(q) or not is_sharded(k)):
        kinds = f"{type(q).__name__} and {type(k).__name__}"
        raise TypeError(f"q and k must both be DTensors, got {kinds}")
    batch, seqlen, heads = dims
    roles = {batch: "batch", seqlen: "seqlen", heads: "heads"}
    mesh = q.device_mesh
    if k is not None and (k.device_mesh != mesh or k.placements != q.placements):
        raise ValueError(f"k must be placed like q, got {k.placements} and {q.placements}")
    kinds = [_role("q", p, roles, q.dim()) for p in q.placements]
    shards = _Shards(mesh, kinds, q.shape[seqlen], q.shape[batch] if batch is not None else 1)
    out = options.pop("out")
    if out is not None:
        raise ValueError("out must be None with DTensors")
    locals_ = [None if t is None else t.to_local() for t in (q, k)]
    tokens = shards.tokens(spec, positions, seq_lens, cu_seqlens)
    results = function(
        *locals_, spec, **tokens, layout=layout, **shards.factors(spec, options), **options
    )
    return tuple(
        None if t is None else _placed(t, mesh, like.placements, like.shape)
        for t, like in zip(results, (q, k), strict=True)
    )


def qkv_rope(function, x, weights, biases, *, spec, positions, seq_lens, cu_seqlens, **options):
    """``function``, which is rope_fused.qkv_rope, on the shards of x, the weights and biases."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if options.pop("out") is not None:
        raise ValueError("out must be None with DTensors")
    given = [t for t in (x, *weights, *biases) if t is not None]
    mesh = next(t.device_mesh for t in given if is_sharded(t))
    replicated = [Replicate()] * mesh.ndim
    plain = not is_sharded(x)

    def placed(t):
        if t is None or is_sharded(t):
            return t
        return DTensor.from_local(t, mesh, replicated, run_check=False)

    x, *rest = map(placed, (x, *weights, *biases))
    weights, biases = rest[:3], rest[3:]
    roles = {x.dim() - 2: "seqlen", x.dim() - 3: "batch"}
    names = ("q_weight", "k_weight", "v_weight")
    kinds, gathered = [], list(x.placements)
    for at in range(mesh.ndim):
        columns = {
            _role(name, w.placements[at], {0: "heads"}, 2)
            for name, w in zip(names, weights, strict=True)
            if w is not None
        }
        if len(columns) > 1:
            placements = ", ".join(str(w.placements) for w in weights if w is not None)
            raise ValueError(
                f"k_weight and v_weight must be placed like q_weight, got {placements}"
            )
        if columns == {"heads"}:
            gathered[at] = Replicate()
        kinds.append(_role("x", gathered[at], roles, x.dim()) or columns.pop())
    if tuple(gathered) != x.placements:
        x = x.redistribute(placements=gathered)
    batch = x.shape[0] if x.dim() == 3 else 1
    shards = _Shards(mesh, kinds, x.shape[-2], batch, plain)
    if options["norm_scope"] == "all" and "heads" in kinds:
        raise ValueError("norm_scope must be 'head' where weights are sharded by heads, got 'all'")
    operands = [x.to_local(grad_placements=shards.gradients(x))]
    for name, w in zip(names, weights, strict=True):
        operands.append(None if w is None else w.to_local(grad_placements=shards.gradients(w)))
        if w is not None and operands[-1].shape[0] % spec.head_dim:
            raise ValueError(
                f"{name} must be sharded between heads of {spec.head_dim} rows, got "
                f"{operands[-1].shape[0]} rows on a rank"
            )
    for name, w, b in zip(("q_bias", "k_bias", "v_bias"), weights, biases, strict=True):
        if b is not None and b.placements != w.placements:
            raise ValueError(f"{name} must be placed like its weight, got {b.placements}")
        options[name] = None if b is None else b.to_local(grad_placements=shards.gradients(b))
    tokens = shards.tokens(spec, positions, seq_lens, cu_seqlens)
    results = function(*operands, spec=spec, **tokens, **shards.factors(spec, options), **options)
    if plain:
        return results
    done = []
    for result, w in zip(results, weights, strict=True):
        if result is None:
            done.append(None)
            continue
        out = [
            Shard(x.dim() - 1) if kind == "heads" else placement
            for kind, placement in zip(kinds, gathered, strict=True)
        ]
        shape = (*x.shape[:-1], w.shape[0] // spec.head_dim, spec.head_dim)
        done.append(_placed(result, mesh, out, shape))
    return tuple(done)


def _role(name, placement, roles, dims):
    """What a placement splits: "batch", "seqlen", "heads" or None."""
    if placement.is_replicate():
        return None
    if placement.is_shard():
        role = roles.get(placement.dim % dims)
        if role is not None:
            return role
    words = ", ".join(f"Shard({dim}) ({role})" for dim, role in roles.items() if dim is not None)
    raise ValueError(
        f"{name} must be placed as Replicate or {words}, got {placement}: redistribute it"
    )


def _placed(result, mesh, placements, shape):
    """``result``, a rank's part, as a DTensor of the global ``shape``."""
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        result, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


class _Shards:
    """How tokens and heads are split over a mesh: one role per dimension of it."""

    def __init__(self, mesh, roles, seqlen, batch, plain=False):
        self.mesh, self.roles, self.seqlen, self.batch = mesh, roles, seqlen, batch
        self.plain = plain

    def gradients(self, t):
        """Placements of the gradient of this rank's part of t: partial where others have some."""
        from torch.distributed.tensor import Partial

        return [
            Partial() if role and placement.is_replicate() else placement
            for role, placement in zip(self.roles, t.placements, strict=True)
        ]

    def tokens(self, spec, positions, seq_lens, cu_seqlens) -> dict:
        """positions, seq_lens and cu_seqlens of this rank's tokens."""
        positions, seq_lens, cu_seqlens = map(self._whole, (positions, seq_lens, cu_seqlens))
        if "seqlen" in self.roles:
            if cu_seqlens is not None:
                raise ValueError("cu_seqlens must be None where the sequence is sharded")
            if positions is None:
                positions = torch.arange(self.seqlen, device=self.mesh.device_type)
            if seq_lens is None and spec.cache_class == "switch":
                # A shard does not see how long its sequences are.
                one_axis = positions.amax(0) if spec.axes > 1 else positions
                seq_lens = one_axis.amax(-1, keepdim=True).reshape(-1).add(1).expand(self.batch)
        if positions is not None:
            positions = self._part(positions, positions.dim() - 1 - (spec.axes > 1) > 0)
        if seq_lens is not None and "batch" in self.roles:
            seq_lens = self._slice(seq_lens, 0, "batch", self.batch)
        return {"positions": positions, "seq_lens": seq_lens, "cu_seqlens": cu_seqlens}

    def factors(self, spec, options) -> dict:
        """The tensors among the options that all ranks share, with gradients summed over them."""
        found = {}
        for name in ("inv_freq", "attention_factor", "q_norm_weight", "k_norm_weight", "q_scale"):
            value = options.pop(name, None)
            if isinstance(value, torch.Tensor):
                value = self._shared(value)
                if name == "q_scale":
                    value = self._part(value, value.dim() > 1)
            if value is not None:
                found[name] = value
        return found

    def _shared(self, t):
        from torch.distributed.tensor import DTensor, Replicate

        if not is_sharded(t):
            if self.plain:
                return t
            t = DTensor.from_local(t, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        elif not all(p.is_replicate() for p in t.placements):
            t = t.redistribute(placements=[Replicate()] * self.mesh.ndim)
        return t.to_local(grad_placements=self.gradients(t))

    def _whole(self, t):
        return t.full_tensor() if is_sharded(t) else t

    def _part(self, t, batched):
        """This rank's part of a tensor [.., seqlen] or, ``batched``, [.., batch, seqlen]."""
        if t.shape[-1] != self.seqlen:
            raise ValueError(
                f"positions and q_scale must be those of all {self.seqlen} tokens, of which a "
                f"shard takes its part, got shape {tuple(t.shape)}"
            )
        t = self._slice(t, t.dim() - 1, "seqlen", self.seqlen)
        if batched and t.shape[-2] > 1:
            t = self._slice(t, t.dim() - 2, "batch", self.batch)
        return t

    def _slice(self, t, dim, role, size):
        from torch.distributed.tensor import Replicate, Shard
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        if role not in self.roles:
            return t
        placements = [Shard(0) if each == role else Replicate() for each in self.roles]
        (count,), (start,) = compute_local_shape_and_global_offset((size,), self.mesh, placements)
        return t.narrow(dim, start, count)
