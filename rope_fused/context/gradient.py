"""Search by gradient: factors and temperature descend on the perplexity they are judged by.

The kernels give the derivative of the loss in every pair's frequency and in the attention factor,
so one pass forward and backward tells of all factors what evolution has to try one by one.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from .fitness import ModelFitness
from .genome import Genome
from .progress import Checkpoint

PASSES_PER_STEP = 3  # a backward costs as much as two forwards: a step counts as three evaluations


@dataclasses.dataclass(frozen=True)
class Descent:
    """How the gradient search goes: Adam on the logarithms of factors and temperature.

    steps            passes forward and backward over all windows
    learning_rate    of the logarithm of a slow pair's factor, falling to 0 by a cosine
    temperature_rate of the logarithm of the temperature; None keeps the start's
    betas            of Adam
    """

    steps: int = 34
    learning_rate: float = 0.03
    temperature_rate: float | None = 0.01
    betas: tuple[float, float] = (0.8, 0.95)


def descend(
    fitness: ModelFitness,
    start: Genome,
    descent: Descent | None = None,
    *,
    checkpoint: Checkpoint | None = None,
    bar=None,
) -> dict[Genome, float]:
    """Minimise the perplexity over the factors and the temperature, from ``start`` on.

    The factors stay non-decreasing, and between 1 and ``space.largest``.

    Args:
        fitness: of a model; its gradients are those of rope_fused's operators where it is patched.
        checkpoint: what the search goes on from, and saves to after every step.
        bar: something with ``update(n)``, told of n steps.

    Returns:
        The perplexity of every genome on the way, in order. That of a step is known before the step
        is made, so the last one is not among them: the first ``steps`` points are.
    """
    descent = descent or Descent()
    space = fitness.space
    plain = space.base.inv_freq()
    device = fitness.ids.device
    state = dict(checkpoint.state) if checkpoint is not None else {}
    if not state:
        state = {
            "logs": [math.log(x) for x in start.factors] + [math.log(start.temperature)],
            "first": [0.0] * (space.pairs + 1),
            "second": [0.0] * (space.pairs + 1),
            "path": [],
        }
    elif bar is not None:
        bar.update(len(state["path"]))
    while (step := len(state["path"])) < descent.steps:
        logs = torch.tensor(state["logs"], dtype=torch.float64)
        genome = Genome(tuple(logs[:-1].exp().tolist()), logs[-1].exp().item(), start.n_start)
        inv_freq = (plain / logs[:-1].exp()).to(device).requires_grad_()
        temperature = logs[-1].exp().to(device).requires_grad_()
        nll = fitness.gradients(inv_freq, temperature)
        # d/d log(lambda) of theta / lambda is -theta / lambda.
        slope = torch.cat(
            (
                (-inv_freq.grad * inv_freq.detach()).cpu(),
                (temperature.grad * temperature.detach()).cpu().reshape(1),
            )
        )
        state = _adam(state, slope, step, descent, space)
        state["path"] = [*state["path"], [genome.as_json(), math.exp(nll)]]
        if checkpoint is not None:
            checkpoint.save(state)
        if bar is not None:
            bar.update(1)
            bar.set_postfix(best=f"{min(f for _, f in state['path']):.4f}")
    return {Genome.from_json(g): f for g, f in state["path"]}


def _adam(state, slope, step, descent, space):
    """The state after a step of Adam on the increments of the logarithms, which stay positive.

    In increments the order is a bound on each of them alone, and a step that keeps it still goes
    down. (Sorted or averaged afterwards, the steps of Adam, which all have one length, need not.)
    """
    logs = torch.tensor(state["logs"], dtype=torch.float64)
    slope = torch.cat((slope[:-1].flip(0).cumsum(0).flip(0), slope[-1:]))
    one, two = descent.betas
    first = one * torch.tensor(state["first"], dtype=torch.float64) + (1 - one) * slope
    second = two * torch.tensor(state["second"], dtype=torch.float64) + (1 - two) * slope**2
    direction = first / (1 - one ** (step + 1)) / ((second / (1 - two ** (step + 1))).sqrt() + 1e-8)
    falling = 0.5 * (1 + math.cos(math.pi * step / descent.steps))
    # The loss waves with the angle of distant tokens: a fast pair, whose angle the same change of
    # its factor moves further, must go in smaller steps.
    angle = space.base.inv_freq() * space.original / (2 * math.pi)
    rates = descent.learning_rate / angle.clamp(min=1.0)
    rates = torch.cat((rates, rates.new_tensor([descent.temperature_rate or 0.0]))) * falling
    increments = torch.cat((logs[:1], logs[:-1].diff())) - rates[:-1] * direction[:-1]
    factors = increments.clamp(min=0.0).cumsum(0).clamp(max=math.log(space.largest))
    logs = torch.cat((factors, logs[-1:] - rates[-1:] * direction[-1:]))
    return {"logs": logs.tolist(), "first": first.tolist(), "second": second.tolist()} | {
        "path": state["path"]
    }
