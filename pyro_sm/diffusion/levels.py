# SPDX-License-Identifier: Apache-2.0
r"""Where the reverse kernels stand: the K levels that cost the least, by dynamic programming.

A kernel between two levels is Gaussian; the true one is not, where modes part or meet. The loss of a whole path, the
forward KL divergence between path measures, is a sum over its steps, so that the best of all K-step walks through a
fine grid of levels is a shortest path. With ``c = 1 − low²/high²`` and the denoiser's moments ``D, V`` at
``y = u + high·ε``, the step from ``high`` to ``low`` costs, in nats and up to what is the same for all walks,

    ``E KL( N(y + c(u − y), low² c) ‖ N(y + c(D − y), low² c + c² f V) )``
    ``= ½ E Σ_d [ (1 + (c/low²)(u − D)²)/(1 + x) − 1 + log(1 + x) ]``,   ``x = c f V/low²``,

the expectation over draws ``u``, with the network evaluated once per grid level and the density never. It needs no
new training: the denoiser knows every level in the range. First and last level stay where the schedule put them.

Source: "Learning to Efficiently Sample from Diffusion Probabilistic Models" https://arxiv.org/abs/2106.03802 .
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_sm.diffusion.denoiser import Denoiser

_FINENESS = 3  # grid levels per step: a level is off its best place by a sixth of a step at most
_WIDEST = 8  # a step spans at most this many steps of the even schedule, which bounds the search to 24 G costs
# Nats that the even schedule pays in all for being even, and others more: it decides where nothing else does. 2 % of
# Z, less than a round of draws can measure.
_EVENNESS = 0.02


def step_costs(denoiser: Denoiser, grid: Tensor, widest: int, u: Tensor, noise: Tensor) -> Tensor:
    """Cost in nats (G, G) of a step from level ``h`` (column) down to ``l`` (row); ``inf`` where there is none.

    Args:
        denoiser: the denoiser; its variance is rescaled by moments, level by level, as the kernels' will be.
        grid: (G,) ratios, increasing, all positive.
        widest: most grid levels that a step may span.
        u: (N, D) equally weighted draws, whitened.
        noise: (N, D) standard normal, shared by all levels.
    """
    cost = torch.full((len(grid), len(grid)), math.inf, dtype=torch.float64)
    for high in range(1, len(grid)):
        mean, variance = denoiser.moments(u + grid[high] * noise, grid[high])
        square = (u - mean).square()
        variance = variance * (square / variance).mean(0)
        low = slice(max(0, high - widest), high)
        square_low = grid[low].square()
        shrink = (1 - square_low / grid[high].square()) / square_low
        x = shrink[:, None, None] * variance
        terms = (1 + shrink[:, None, None] * square) / (1 + x) - 1 + torch.log1p(x)
        cost[low, high] = 0.5 * terms.sum(-1).mean(-1).double().cpu()
    return torch.nan_to_num(cost, nan=math.inf, posinf=math.inf)


def cheapest_walk(cost: Tensor, num_steps: int) -> list[int] | None:
    """The ``num_steps + 1`` indices of the cheapest walk from 0 to G − 1 in exactly that many steps; None if none.

    Args:
        cost: (G, G) cost of a step from column down to row.
        num_steps: how many.
    """
    best = torch.full((cost.shape[0],), math.inf, dtype=cost.dtype)
    best[0] = 0.0
    came_from = []
    for _ in range(num_steps):
        best, index = (best[:, None] + cost).min(0)
        came_from.append(index)
    if not math.isfinite(float(best[-1])):
        return None
    walk = [cost.shape[0] - 1]
    for index in reversed(came_from):
        walk.append(int(index[walk[-1]]))
    return walk[::-1]


def fit_levels(denoiser: Denoiser, ratios: Tensor, u: Tensor, noise: Tensor) -> Tensor:
    """Levels (K+1,) between the same ends; those given, if no others can be told from them.

    Args:
        denoiser: the denoiser, as trained so far.
        ratios: ``0 = r_0 < r_1 < … < r_K``, (K+1,).
        u: (N, D) equally weighted draws of what the sampler shall produce, whitened.
        noise: (N, D) standard normal.
    """
    num_steps = len(ratios) - 2  # the step from r_1 to the clean point stays
    if num_steps < 2:
        return ratios
    size = _FINENESS * num_steps + 1
    ends = ratios[1].log(), ratios[-1].log()
    share = torch.linspace(0, 1, size, dtype=ratios.dtype, device=ratios.device)
    grid = torch.exp(ends[0] + (ends[1] - ends[0]) * share)
    grid[0], grid[-1] = ratios[1], ratios[-1]
    cost = step_costs(denoiser, grid, _WIDEST * _FINENESS, u, noise)
    index = torch.arange(size)
    span = (index[None, :] - index[:, None]) / _FINENESS
    walk = cheapest_walk(cost + _EVENNESS / num_steps * span.square(), num_steps)
    return ratios if walk is None else torch.cat([ratios[:1], grid[walk]])
