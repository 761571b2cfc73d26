# SPDX-License-Identifier: Apache-2.0
r"""Many ascents of ``log p̃`` at once, by limited-memory BFGS: where do they lead?

In units of a scale, ``s`` the last steps and ``y`` the changes of minus the gradient along them, the next step is
``H g`` by the two-loop recursion, ``H`` the inverse of minus the Hessian that ``(s, y)`` suggest. Every row has its
own memory and its own step length, the latter a quarter of the last after a step that gained too little: one batched
evaluation a step, whatever the rows do.

Source: "Numerical Optimization", algorithm 7.4 https://doi.org/10.1007/978-0-387-40065-5 .
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sm.base import Density

_MEMORY = 10  # steps that make up the Hessian; L-BFGS is usually given 3 to 20
_SUFFICIENT = 1e-4  # of the predicted gain: Armijo's condition, with the textbook's constant
_ARRIVED = 1e-3  # nats that the next step is predicted to gain: √(2 · 1e-3) = .04 widths from the mode


class _Step(NamedTuple):
    """``s`` (N, D) a step, ``y`` (N, D) the change of minus the gradient, ``curvature`` (N,) ``1/s·y``; 0 is none."""

    s: Tensor
    y: Tensor
    curvature: Tensor


def uphill(gradient: Tensor, steps: list[_Step]) -> Tensor:
    """``H g`` (N, D), ``H`` the inverse of minus the Hessian that the last steps suggest; no longer than ``√D``."""
    q, coefficients = gradient, []
    for s, y, rho in reversed(steps):
        coefficients.append(rho * (s * q).sum(-1))
        q = q - coefficients[-1].unsqueeze(-1) * y
    factor = torch.ones_like(gradient[:, 0])
    for _, y, rho in steps:  # of the last step with a curvature
        factor = torch.where(rho > 0, 1 / (rho * y.square().sum(-1)).clamp(min=1e-30), factor)
    q = factor.unsqueeze(-1) * q
    for (s, y, rho), a in zip(steps, reversed(coefficients), strict=True):
        q = q + (a - rho * (y * q).sum(-1)).unsqueeze(-1) * s
    length = q.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    return q * (math.sqrt(gradient.shape[1]) / length).clamp(max=1.0)


def ascended(
    density: Density, z: Tensor, scale: Tensor, num_steps: int, go_on: Callable[[], bool] | None = None
) -> tuple[Tensor, Tensor]:
    """Where at most ``num_steps`` evaluations uphill from ``z`` (N, D) lead: ``z`` and ``log p̃`` (N,), nats.

    No row ends lower than it began; one whose density is not finite stays, at ``-inf``. Ends when all but one row in
    twenty have arrived.

    Args:
        density: to be climbed; one density and one gradient evaluation per row and step.
        z: where to begin.
        scale: (D,), the units of ``z``.
        num_steps: at most so many.
        go_on: called after every step; where it returns False the ascents end there.
    """
    log_p, score = density.log_prob_and_score(z)
    log_p = torch.nan_to_num(log_p, nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
    gradient = torch.nan_to_num(score, nan=0.0, posinf=0.0, neginf=0.0) * scale
    steps: list[_Step] = []
    direction, length = uphill(gradient, steps), torch.ones_like(log_p)
    for _ in range(num_steps):
        new = z + length.unsqueeze(-1) * direction * scale
        new_log_p, new_score = density.log_prob_and_score(new)
        needed = _SUFFICIENT * length * (direction * gradient).sum(-1)
        usable = torch.isfinite(new_log_p) & torch.isfinite(new_score).all(-1) & torch.isfinite(log_p)
        better = usable & (new_log_p - log_p > needed)
        keep = better.unsqueeze(-1)
        s = torch.where(keep, (new - z) / scale, 0.0)
        y = torch.where(keep, gradient - new_score * scale, 0.0)
        product = (s * y).sum(-1)
        steps = [*steps, _Step(s, y, torch.where(product > 0, 1 / product, 0.0))][-_MEMORY:]
        z, log_p = torch.where(keep, new, z), torch.where(better, new_log_p, log_p)
        gradient = torch.where(keep, new_score * scale, gradient)
        length = torch.where(better, 1.0, length / 4)
        direction = torch.where(keep, uphill(gradient, steps), direction)
        if go_on is not None and not go_on():
            break
        arrived = length * (direction * gradient).sum(-1) < _ARRIVED
        if float(arrived.double().mean()) >= 0.95:
            break
    return z, log_p
