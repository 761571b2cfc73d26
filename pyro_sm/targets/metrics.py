# SPDX-License-Identifier: Apache-2.0
r"""How far draws are from draws: mode weights, Wasserstein distances, and those of particles up to their symmetries.

With N draws on each side and a cost matrix ``C_ij``, ``W₂² = min_π (1/N) Σ_i C_{iπ(i)}`` over permutations π,
exactly, as an assignment problem. In one dimension sorting solves it.

Every one of these is above zero for exact draws: report beside each figure the same figure between two sets of exact
draws of the same sizes, the floor.

Identical particles have no names and no orientation: two sets of positions are aligned by permuting particles
(Hungarian algorithm) and then rotating (Kabsch), both about their centres, before their distance is taken. The
rotation found may make another permutation better, so the two may be repeated; the result is an upper bound of the
smallest distance. The published figures use one round.

Sources: "POT: Python Optimal Transport" https://jmlr.org/papers/v22/20-451.html ; "A solution for the best
rotation to relate two sets of vectors" https://doi.org/10.1107/S0567739476001873 ; "Adjoint Schrödinger Bridge
Sampler" https://arxiv.org/abs/2506.22565 .
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def mode_total_variation(shares: Tensor, weights: Tensor) -> float:
    """``½ Σ_k |ŵ_k − w_k|`` of the shares found (K,) and the true weights (K,).

    Raises:
        ValueError: unequal shapes.
    """
    if shares.shape != weights.shape:
        raise ValueError(f"expected shares of shape {tuple(weights.shape)}, found {tuple(shares.shape)}")
    return 0.5 * float((shares - weights.to(shares)).abs().sum())


def wasserstein2(x: Tensor, y: Tensor) -> float:
    """``W₂`` between draws ``x`` (N, d) and ``y`` (N, d), in their units; time grows as N³.

    Raises:
        ValueError: shapes that differ or are not (N, d).
        ImportError: SciPy is not installed.
    """
    _check_sets(x, y)
    cost = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    return _transport(cost)


def energy_wasserstein(first: Tensor, second: Tensor) -> float:
    """``W₂`` between energies (N,) and (M,), in their units: ``(∫_0^1 (F⁻¹(u) − G⁻¹(u))² du)^½``, exactly.

    Raises:
        ValueError: not vectors, or empty.
    """
    if first.ndim != 1 or second.ndim != 1 or min(len(first), len(second)) == 0:
        raise ValueError(f"expected two vectors of energies, found {tuple(first.shape)} and {tuple(second.shape)}")
    a, b = first.double().sort().values, second.double().sort().values
    # Both quantile functions are steps: between neighbours of these levels, in units of 1/(N M), neither jumps.
    n, m = len(a), len(b)
    levels = torch.cat([torch.arange(n + 1) * m, torch.arange(m + 1) * n]).unique()
    left = levels[:-1]
    widths = levels.diff().double() / (n * m)
    gap = a[(left // m).to(a.device)] - b[(left // n).to(b.device)]
    return math.sqrt(float((widths.to(gap) * gap.square()).sum()))


def kabsch_rotation(x: Tensor, y: Tensor) -> Tensor:
    """Rotations ``R`` (..., s, s), ``det R = 1``, with the smallest ``|x R − y|`` for ``x``, ``y`` (..., n, s)."""
    u, _, v = torch.linalg.svd(x.mT @ y)
    sign = torch.det(u @ v).sign()
    flip = torch.ones(u.shape[:-1], dtype=u.dtype, device=u.device)
    flip[..., -1] = sign
    return (u * flip.unsqueeze(-2)) @ v


def aligned_distance(x: Tensor, y: Tensor, space_dim: int, num_rounds: int = 1) -> Tensor:
    """``|x R P − y|`` (B,) after centring and ``num_rounds`` of permuting, then rotating, ``x``.

    Args:
        x: positions (B, n·s).
        y: positions (B, n·s), row by row.
        space_dim: s.
        num_rounds: how often to permute and rotate; 1 in the published figures. No round makes a distance larger.

    Raises:
        ValueError: shapes that differ or do not fit ``space_dim``, or fewer than one round.
        ImportError: SciPy is not installed.
    """
    _check_sets(x, y)
    if space_dim < 1 or x.shape[1] % space_dim:
        raise ValueError(f"expected positions in {space_dim} dimensions, found {x.shape[1]} numbers")
    if num_rounds < 1:
        raise ValueError(f"expected num_rounds >= 1, found {num_rounds}")
    first, second = (_centred(points, space_dim) for points in (x, y))
    assign = _assignment()
    for _ in range(num_rounds):
        cost = -(second @ first.mT).cpu().numpy()
        order = [torch.from_numpy(assign(one)[1]) for one in cost]
        index = torch.stack(order).to(first.device)[..., None].expand_as(first)
        first = first.gather(1, index)
        first = first @ kabsch_rotation(first, second)
    return (first - second).square().sum((-2, -1)).sqrt()


def aligned_wasserstein2(x: Tensor, y: Tensor, space_dim: int, num_rounds: int = 1) -> float:
    """``W₂`` between positions ``x`` (N, n·s) and ``y`` (N, n·s) with :func:`aligned_distance` as cost.

    Aligns all N² pairs, so it is slow beyond a few hundred draws.

    Raises:
        ValueError: as :func:`aligned_distance`.
        ImportError: SciPy is not installed.
    """
    _check_sets(x, y)
    rows = [aligned_distance(one.expand_as(y), y, space_dim, num_rounds) for one in x]
    return _transport(torch.stack(rows).square())


def _check_sets(x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or x.shape != y.shape or x.shape[0] == 0:
        raise ValueError(f"expected two sets of one shape (N, d), found {tuple(x.shape)} and {tuple(y.shape)}")


def _centred(x: Tensor, space_dim: int) -> Tensor:
    points = x.detach().double().unflatten(1, (-1, space_dim))
    return points - points.mean(1, keepdim=True)


def _transport(cost: Tensor) -> float:
    """``(min_π (1/N) Σ_i C_{iπ(i)})^½`` for squared costs ``C`` (N, N)."""
    matrix = cost.detach().cpu().numpy()
    rows, columns = _assignment()(matrix)
    return math.sqrt(float(matrix[rows, columns].mean()))


def _assignment() -> Callable:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("optimal transport needs SciPy: pip install 'pyro_sm[bench]'") from error
    return linear_sum_assignment
