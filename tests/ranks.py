"""What two processes do together for test_distributed.py: each function here is one check.

A check runs on every rank and returns numbers, which rank 0 writes down; the tests look at them.
"""

import copy
import json
import re
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import rope_fused as rf
from rope_fused.distributed import sequence_shard, sequence_unshard
from tiny import LAYERS, attentions, entries, gradients, make_model, relative, run, tokens

PLACEMENTS = {"R": Replicate(), "S0": Shard(0), "S1": Shard(1), "S2": Shard(2)}
CHECKS = {}
WHEN = ("before", "after")  # the model was sharded


def check(*arguments):
    def register(function):
        for given in arguments or ((),):
            CHECKS["-".join((function.__name__, *map(str, given)))] = function, given
        return function

    return register


def main(rank, world_size, rendezvous, seed, out):
    torch.set_num_threads(1)
    method = f"file://{rendezvous}"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=world_size)
    try:
        mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
        results = {}
        for name, (function, given) in CHECKS.items():
            torch.manual_seed(seed)
            results[name] = function(mesh, *given)
        if rank == 0:
            with open(out, "w") as file:
                json.dump(results, file)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def worst(got, expected):
    return max(relative(whole(a), whole(b)) for a, b in zip(got, expected, strict=True))


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def placed(t, mesh, placement):
    return distribute_tensor(t.detach(), mesh, [placement]).requires_grad_(t.requires_grad)


# -- the functions on DTensors -------------------------------------------------------------------


@check(("R", "R"), ("R", "S0"), ("S0", "R"), ("S1", "R"), ("S1", "S0"))
def qkv_rope(mesh, x_placement, w_placement):
    """Results and gradients, of factors and norm weights too, against those of one process."""
    spec = rf.RopeSpec.yarn(
        head_dim=8, rope_theta=1e4, factor=4.0, original_max_position_embeddings=16
    )
    x, weights = normal(2, 6, 16), [normal(8 * heads, 16) for heads in (4, 2, 2)]
    biases, norms = [normal(w.shape[0]) for w in weights], [normal(8), normal(8)]
    factors = [spec.inv_freq().requires_grad_(), normal()]
    q_scale = normal(2, 6)
    positions = torch.randint(1000, (2, 6))

    def call(x, weights, biases, norms, factors, q_scale):
        names = ("q_bias", "k_bias", "v_bias", "q_norm_weight", "k_norm_weight")
        options = dict(
            zip((*names, "inv_freq", "attention_factor"), biases + norms + factors, strict=True)
        )
        return rf.qkv_rope(x, *weights, spec=spec, positions=positions, q_scale=q_scale, **options)

    leaves = [x, *weights, *biases, *norms, *factors, q_scale]
    expected = call(x, weights, biases, norms, factors, q_scale)
    cotangents = [torch.randn_like(t) for t in expected]
    grads = torch.autograd.grad(expected, leaves, cotangents)
    x2 = placed(x, mesh, PLACEMENTS[x_placement])
    w2, b2 = ([placed(t, mesh, PLACEMENTS[w_placement]) for t in ts] for ts in (weights, biases))
    rest = [t.detach().clone().requires_grad_() for t in (*norms, *factors, q_scale)]
    got, count = entries(lambda: call(x2, w2, b2, rest[:2], rest[2:4], rest[4]))
    sharded = [placed(c, mesh, t.placements[0]) for c, t in zip(cotangents, got, strict=True)]
    got_grads = torch.autograd.grad(got, [x2, *w2, *b2, *rest], sharded)
    return {
        "error": worst(got, expected),
        "gradients": worst(got_grads, grads),
        "shards": [getattr(t.placements[0], "dim", None) for t in got],
        "local heads": got[0].to_local().shape[2],
        "entries": count,
    }


@check(
    *(
        (layout, shard, rope)
        for rope in ("yarn", "longrope")
        for layout, shard in (("bshd", 0), ("bshd", 1), ("bshd", 2), ("bhsd", 1), ("bhsd", 2))
    )
)
def apply_rope(mesh, layout, dim, rope):
    """With positions of its own and without: a shard of the sequence knows where it stands."""
    lengths = {"original_max_position_embeddings": 16, "factor": 4.0}
    if rope == "longrope":
        lengths |= {"short_factor": [1.0, 2, 3, 4], "long_factor": [5.0, 6, 7, 8]}
    spec = getattr(rf.RopeSpec, rope)(head_dim=8, rope_theta=1e4, **lengths)
    q, k = normal(2, 20, 4, 8), normal(2, 20, 2, 8)
    if layout == "bhsd":
        q, k = (t.detach().transpose(1, 2).contiguous().requires_grad_() for t in (q, k))
    # Of two sequences one is short, one long, and no shard of the long one's start can see it.
    rows = torch.stack((torch.arange(20), torch.arange(20).clamp(max=12)))
    found = []
    for positions in (None, rows):
        expected = rf.apply_rope(q, k, spec, positions, layout=layout)
        cotangents = [torch.randn_like(t) for t in expected]
        grads = torch.autograd.grad(expected, (q, k), cotangents)
        shards = [placed(t, mesh, Shard(dim)) for t in (q, k)]
        got = rf.apply_rope(*shards, spec, positions, layout=layout)
        cotangents = [placed(t, mesh, Shard(dim)) for t in cotangents]
        found.append(worst(got, expected))
        found.append(worst(torch.autograd.grad(got, shards, cotangents), grads))
    return max(found)


@check()
def refusals(mesh):
    spec = rf.RopeSpec.default(head_dim=8, rope_theta=1e4)
    q, x = normal(2, 6, 4, 8), normal(2, 6, 16)
    weights = [normal(32, 16), normal(16, 16)]
    three = [normal(24, 16), normal(24, 16)]

    def at(t, *placement):
        return distribute_tensor(t.detach(), mesh, list(placement))

    calls = {
        "k must both": lambda: rf.apply_rope(at(q, Shard(2)), q, spec),
        "placed like q": lambda: rf.apply_rope(at(q, Shard(2)), at(q, Shard(1)), spec),
        "head_dim": lambda: rf.apply_rope(at(q, Shard(3)), None, spec),
        "between heads": lambda: rf.qkv_rope(x, *(at(w, Shard(0)) for w in three), spec=spec),
        "placed like q_weight": lambda: rf.qkv_rope(
            x, at(weights[0], Shard(0)), at(weights[1], Replicate()), spec=spec
        ),
        "input columns": lambda: rf.qkv_rope(x, *(at(w, Shard(1)) for w in weights), spec=spec),
        "all 6 tokens": lambda: rf.apply_rope(at(q, Shard(1)), None, spec, torch.arange(3)),
        "norm over all": lambda: rf.qkv_rope(
            x,
            *(at(w, Shard(0)) for w in weights),
            spec=spec,
            norm_scope="all",
            q_norm_weight=torch.ones(32, dtype=torch.float64),
        ),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
            said[name] = ""
        except (TypeError, ValueError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


# -- patched models ------------------------------------------------------------------------------


def compare(model, ids, reference, gradient_of=whole):
    """A training step of a distributed model against (logits, gradients) of one process."""
    (logits, grads), count = entries(lambda: gradients(model, ids))
    names = {name.removeprefix("module."): name for name in grads}
    assert names.keys() == reference[1].keys()
    return {
        "loss": relative(whole(logits), reference[0]),
        "gradients": max(
            relative(gradient_of(grads[name]), reference[1][plain]) for plain, name in names.items()
        ),
        "entries": count,
    }


def by_torch(model, mesh):
    """The plan of torch's tutorials."""
    columns = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    )
    rows = ("self_attn.o_proj", "mlp.down_proj")
    plan = {name: ColwiseParallel() for name in columns}
    plan |= {name: RowwiseParallel() for name in rows}
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)


def by_transformers(model, mesh):
    """transformers' own plan for the layers, as from_pretrained(tp_plan=...) applies it."""
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    plan = {}
    for name, _ in (*model.named_modules(), *model.named_parameters()):
        pattern = re.sub(r"\d+", "*", re.sub(r"\.(weight|bias)$", "", name))
        if "layers" in name and pattern in model.tp_plan:
            plan[name] = model.tp_plan[pattern]
    apply_tensor_parallelism(model, mesh, plan)


@check(
    *(("Llama", how, when) for how in ("by_torch", "by_transformers") for when in WHEN),
    ("Qwen2", "by_torch", "after"),
)
def tensor_parallel(mesh, family, how, when):
    model = make_model(family)
    ids = tokens(model)
    reference = gradients(copy.deepcopy(model), ids)
    if when == "before":
        rf.patch(model, strict=True)
    globals()[how](model, mesh)
    if when == "after":
        rf.patch(model, strict=True)
    found = compare(model, ids, reference)
    found["rows"] = attentions(model)[0].q_proj.weight.to_local().shape[0]
    logits, count = run(model, ids)
    return found | {"inference": relative(whole(logits), reference[0]), "then": count}


@check()
def tensor_parallel_with_another_layout(mesh):
    """Sharded, but with gathered outputs: the modules themselves run, and the rotation is ours."""
    model = make_model("Llama")
    ids = tokens(model)
    reference = gradients(copy.deepcopy(model), ids)
    for layer in model.model.layers:
        gathered = ColwiseParallel(output_layouts=Replicate())
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        parallelize_module(layer, mesh, dict.fromkeys(names, gathered))
    rf.patch(model)
    return compare(model, ids, reference)


@check(("k",), ("v",))
def tensor_parallel_but_for(mesh, letter):
    """Grouped queries with one head for all ranks: k or v is not sharded, and is a module's own."""
    model = make_model("Llama", num_key_value_heads=4)
    ids = tokens(model)
    reference = gradients(copy.deepcopy(model), ids)
    rf.patch(model)
    for layer in model.model.layers:
        styles = {
            f"self_attn.{other}_proj": ColwiseParallel() for other in "qkv" if other != letter
        }
        # The others' heads are thrown away, and their gradients summed: a plain layer, by hand.
        plan = styles | {"self_attn.o_proj": RowwiseParallel()}
        parallelize_module(layer, mesh, plan)
        linear = getattr(layer.self_attn, f"{letter}_proj")
        heads = slice(32 * mesh.get_local_rank(), 32 * (mesh.get_local_rank() + 1))
        linear.weight = torch.nn.Parameter(linear.weight.detach()[heads].clone())
    logits, count = run(model, ids)
    return {"loss": relative(whole(logits), reference[0]), "entries": count}


def rows_of(ids, mesh):
    return ids.chunk(mesh.size())[mesh.get_local_rank()]


@check(("before",), ("after",), ("after", "replicated"))
def fsdp2(mesh, when, kind="sharded"):
    """Each rank its own rows of the batch; gradients are averaged."""
    model = make_model("Qwen3")
    ids = tokens(model, batch=4)
    reference = gradients(copy.deepcopy(model), ids)
    reference = rows_of(reference[0], mesh), reference[1]
    if when == "before":
        rf.patch(model, strict=True)
    if kind == "replicated":  # a mesh of two dimensions, of which one holds copies
        mesh_2d = init_device_mesh("cpu", (1, mesh.size()), mesh_dim_names=("copies", "shards"))
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh_2d if kind == "replicated" else mesh)
    if when == "after":
        rf.patch(model, strict=True)  # though outside of a forward the weights are sharded
    return compare(model, rows_of(ids, mesh), reference)


@check(*((params, when) for params in ("original", "flat") for when in WHEN))
def fsdp1(mesh, params, when):
    """Weights are views of a flat one, and there only while a layer runs."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    model = make_model("Llama")
    ids = tokens(model, batch=4)
    reference = gradients(copy.deepcopy(model), ids)
    wrap = partial(FSDP, use_orig_params=params == "original", device_id=torch.device("cpu"))
    if when == "before":
        rf.patch(model, strict=True)
    layers = model.model.layers
    for i, layer in enumerate(layers):
        layers[i] = wrap(layer)
    model = wrap(model)
    if when == "after":
        rf.patch(model)
    rows = rows_of(ids, mesh)
    out, count = entries(lambda: model(rows, labels=rows))
    out.loss.backward()
    found = {"loss": relative(out.logits.detach(), rows_of(reference[0], mesh)), "entries": count}
    if params == "original":  # of flat ones torch does not give the gradients apart
        with FSDP.summon_full_params(model, with_grads=True):
            for name, parameter in model.named_parameters():
                expected = reference[1][name.replace("_fsdp_wrapped_module.", "")]
                error = relative(parameter.grad, expected)
                found["gradients"] = max(found.get("gradients", 0.0), error)
    return found


@check()
def ddp(mesh):
    model = make_model("Llama")
    ids = tokens(model, batch=4)
    reference = gradients(copy.deepcopy(model), ids)
    reference = rows_of(reference[0], mesh), reference[1]
    rf.patch(model, strict=True)
    return compare(torch.nn.parallel.DistributedDataParallel(model), rows_of(ids, mesh), reference)


class Gather(torch.autograd.Function):
    """The shards of all ranks, one behind the other along dimension 2."""

    @staticmethod
    def forward(ctx, x):
        shards = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(shards, x.contiguous())
        return torch.cat(shards, 2)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size(), 2)[dist.get_rank()]


@check(
    *((order, packed, "fused") for order in ("contiguous", "zigzag") for packed in (False, True)),
    ("zigzag", True, "rotation"),
)
def sequence_sharded(mesh, order, packed, level):
    """Each rank a part of every sequence, and the positions of that part: context parallel."""
    import transformers
    from transformers.masking_utils import AttentionMaskInterface

    model = make_model("Llama", attn_implementation="eager")
    seqlen = 16
    ids, targets = tokens(model, seqlen=seqlen), tokens(model, seqlen=seqlen)
    positions = torch.arange(seqlen)[None]
    documents = torch.zeros_like(positions)
    if packed:
        documents = (positions >= 6).long()
        positions = positions - 6 * documents

    def loss_of(model, ids, targets, positions, mask):
        logits = model(ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="sum"
        )
        return losses / (2 * seqlen)

    def seen(rows, columns):
        past = torch.arange(seqlen)[rows][:, None] >= torch.arange(seqlen)[columns]
        return past & (documents[0, rows][:, None] == documents[0, columns])

    everything = torch.arange(seqlen)
    mask = torch.zeros(seqlen, seqlen, dtype=torch.float64)
    mask.masked_fill_(~seen(everything, everything), -torch.inf)
    plain = copy.deepcopy(model)
    loss = loss_of(
        plain, ids, targets, positions.expand(2, -1), mask[None, None].expand(2, 1, -1, -1)
    )
    loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}

    world, rank = mesh.size(), mesh.get_local_rank()
    mine = sequence_shard(seqlen, world, rank, order=order)
    all_of_them = torch.cat([sequence_shard(seqlen, world, r, order=order) for r in range(world)])
    back = sequence_unshard(seqlen, world, order=order)
    assert torch.equal(all_of_them[back], everything)

    def gathered(module, query, key, value, attention_mask, scaling, **kwargs):
        key, value = (Gather.apply(t).repeat_interleave(2, 1) for t in (key, value))
        scores = (query @ key.mT * scaling).masked_fill(~seen(mine, all_of_them), -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    name = "rope_fused_gathered"
    transformers.AttentionInterface.register(name, gathered)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    rf.patch(model, strict=True, fuse_projection=level == "fused")
    model.config._attn_implementation = name
    part = positions.expand(2, -1)[:, mine]
    local, count = entries(lambda: loss_of(model, ids[:, mine], targets[:, mine], part, None))
    local.backward()
    total = local.detach().clone()
    dist.all_reduce(total)
    errors = []
    for parameter_name, parameter in model.named_parameters():
        dist.all_reduce(parameter.grad)
        errors.append(relative(parameter.grad, expected[parameter_name]))
    return {"loss": relative(total, loss.detach()), "gradients": max(errors), "entries": count}


assert LAYERS == 2
