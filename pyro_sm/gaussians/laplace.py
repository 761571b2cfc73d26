# SPDX-License-Identifier: Apache-2.0
r"""Laplace's approximation: mode and curvature, ``N(z*, (−∇² log p̃(z*))⁻¹)``.

The mode is sought by L-BFGS, its curvature by central differences of the score. Both need the score only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sm.base import Density


class Laplace(NamedTuple):
    """``loc`` (D,) the mode, ``covariance`` (D, D), float64; ``num_flat``: directions without a curvature."""

    loc: Tensor
    covariance: Tensor
    num_flat: int


def find_mode(density: Density, start: Tensor, max_iterations: int = 200) -> Tensor:
    """A local maximum of ``log p̃`` from ``start`` (D,), (D,); one gradient per evaluation of L-BFGS."""
    z = start.detach().clone().to(density.dtype)
    optimiser = torch.optim.LBFGS(
        [z],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        history_size=50,
        line_search_fn="strong_wolfe",
        tolerance_change=1e-12,
    )

    def closure() -> float:
        log_p, score = density.log_prob_and_score(z.detach()[None])
        z.grad = -score[0]
        return -float(log_p[0])

    optimiser.step(closure)
    return z.detach()


def hessian(density: Density, z: Tensor, step: float) -> Tensor:
    """Hessian of ``log p̃`` at ``z`` (D,), (D, D), float64, by central differences of 2D scores in one batch."""
    offset = step * torch.eye(density.dim, dtype=density.dtype, device=density.device)
    _, score = density.log_prob_and_score(torch.cat([z + offset, z - offset]))
    found = (score[: density.dim] - score[density.dim :]).double() / (2 * step)
    return (found + found.T) / 2


def laplace(density: Density, start: Tensor, *, max_iterations: int = 200, max_scale: float = 10.0) -> Laplace:
    """Mode and curvature from ``start`` (D,).

    Directions in which the curvature is not negative get the standard deviation ``max_scale``, by default ten times
    that of a latent of unit size: there it has to cover, and nothing is known.

    Raises:
        ValueError: the search left the finite numbers, or the score at the mode is not finite.
    """
    mode = find_mode(density, start, max_iterations)
    if not bool(torch.isfinite(mode).all()):
        raise ValueError("the search for the mode left the finite numbers: use PriorBase() or a GivenBase")
    step = 1e-4 if density.dtype == torch.float64 else 1e-2
    curvature = -hessian(density, mode, step)
    if not bool(torch.isfinite(curvature).all()):
        raise ValueError("the score around the mode is not finite: use PriorBase() or a GivenBase")
    eigenvalue, eigenvector = torch.linalg.eigh(curvature)
    floor = max_scale**-2
    covariance = (eigenvector / eigenvalue.clamp(min=floor)) @ eigenvector.T
    return Laplace(mode, (covariance + covariance.T) / 2, int((eigenvalue < floor).sum()))
