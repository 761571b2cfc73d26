# SPDX-License-Identifier: Apache-2.0
r"""Diffusion matrices ``m(x)``: what a score divergence may be measured in, and where they come from.

``E ‖mᵀ(s_q − s_p)‖²`` depends on ``m mᵀ`` only, which is the inverse of a Riemannian metric G. Four sources, one set
of arguments for ``FisherDivergence``, ``DiffusionScoreMatching`` and ``SteinDiscrepancy``:

* a matrix or a function of x: :class:`~pyro_sm.objectives.metrics.MatrixMetric`, :func:`constant_matrix`;
* a metric: :class:`RiemannianMetric`, ``m = C⁻ᵀ`` for ``G = CCᵀ``, so that ``m mᵀ = G⁻¹``;
* a flow ``y = T(x)`` with Jacobian J: :func:`flow_matrix`, ``m = J⁻¹`` (``G = JᵀJ``): the divergence in y;
* a flow along an ODE: :class:`ContinuousFlow`, a flow like any other.

Along ``ẋ = g(x, t)`` with ``A = ∂g/∂x`` the difference of two scores moves by ``δ' = −Aᵀδ``, and
``d/dt FD = −2E[δᵀAδ]``: :func:`along_flow` integrates both; ``FD`` at the end is that of the flow's ``m = J⁻¹``.

Sources: "Interpreting diffusion score matching using normalizing flow" https://arxiv.org/abs/2107.10072 ;
"Minimum Stein Discrepancy Estimators" https://arxiv.org/abs/1906.08283 ; "Neural Ordinary Differential Equations"
https://arxiv.org/abs/1806.07366 .
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import Transform

from pyro_sm.divergence import jacobian

Matrix = Callable[[Tensor], Tensor]
"""``x`` (B, D) to ``m(x)`` (B, D, D), each row on its own, differentiable."""
Velocity = Callable[[Tensor, float], Tensor]
"""``g``: points (B, D) and a time to velocities (B, D), each row on its own, twice differentiable."""


def constant_matrix(m: Tensor) -> Matrix:
    """The same ``m`` (D, D) everywhere."""
    return lambda x: m.to(x).expand(x.shape[0], -1, -1)


def flow_matrix(flow: Callable[[Tensor], Tensor]) -> Matrix:
    """``m = J⁻¹`` of ``y = T(x)``, ``J = ∂T/∂x``: losses measured in y-space.

    ``flow`` takes the *data* to y and acts on each row by itself. For a normalising flow from base to data pass its
    ``.inv``. Needs gradients through the flow, and for implicit losses second ones.
    """

    def matrix(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_(True)
            return torch.linalg.inv(jacobian(flow(leaf), leaf))

    return matrix


@dataclass(frozen=True)
class RiemannianMetric:
    """``m`` with ``m mᵀ = G⁻¹`` for a Riemannian metric G: ``‖mᵀΔ‖² = Δᵀ G⁻¹ Δ``.

    Use it as ``FisherDivergence(metric=RiemannianMetric(g))``, ``DiffusionScoreMatching(RiemannianMetric(g))`` or
    ``SteinDiscrepancy(matrix=RiemannianMetric(g))``.

    Args:
        metric: maps points (B, D) to ``G``, (B, D, D) or (D, D), symmetric and positive definite, differentiable,
            each row on its own.

    Raises:
        ValueError: on use, if G has another shape.
        torch.linalg.LinAlgError: on use, if it is not positive definite.
    """

    metric: Matrix

    def _factor(self, x: Tensor) -> Tensor:
        g = self.metric(x)
        dim = x.shape[-1]
        if g.shape not in ((dim, dim), (len(x), dim, dim)):
            raise ValueError(
                f"expected a Riemannian metric of shape {(len(x), dim, dim)} or {(dim, dim)}, found {tuple(g.shape)}"
            )
        return torch.linalg.cholesky(g).expand(len(x), dim, dim)

    def __call__(self, x: Tensor, difference: Tensor | None = None) -> Tensor:
        """``m(x)`` (B, D, D); with a ``difference`` Δ (B, D), ``mᵀΔ`` (B, D)."""
        factor = self._factor(x)
        if difference is not None:
            return torch.linalg.solve_triangular(factor, difference[..., None], upper=False)[..., 0]
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        return torch.linalg.solve_triangular(factor.mT, eye.expand_as(factor), upper=True)


def _fourth_order(field: Velocity, x: Tensor, start: float, stop: float) -> Tensor:
    """``x`` (B, D) at time ``stop``, from ``x`` at ``start``, by one step of the classical Runge-Kutta method."""
    step = stop - start
    k1 = field(x, start)
    k2 = field(x + step / 2 * k1, start + step / 2)
    k3 = field(x + step / 2 * k2, start + step / 2)
    k4 = field(x + step * k3, stop)
    return x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


class ContinuousFlow(Transform):
    """``y``, the solution at the last time of ``ẋ = g(x, t)`` from ``x`` at the first: a transform like any other.

    For use wherever a flow is taken: ``FlowMetric``, ``DiffusionScoreMatching``, ``SteinDiscrepancy(flow=)``. Solved
    by fixed steps of Runge-Kutta (fourth order), through which torch differentiates: the Jacobian is that of the map
    as computed, exactly. The inverse is the same solver run backwards: exact to the error of the solver.

    Args:
        field: ``g``: (B, D) and a time (a float) to (B, D), each row on its own, twice differentiable.
        times: the grid, two or more times, increasing or decreasing.

    Raises:
        ValueError: fewer than two times, or not monotone.

    Source: "Neural Ordinary Differential Equations" https://arxiv.org/abs/1806.07366 .
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, field: Velocity, times: Sequence[float] | Tensor) -> None:
        super().__init__()
        grid = [float(t) for t in times]
        steps = [b - a for a, b in itertools.pairwise(grid)]
        if not steps or not (all(s > 0 for s in steps) or all(s < 0 for s in steps)):
            raise ValueError(f"expected two or more monotone times, found {grid}")
        self.field = field
        self.times = grid

    def _solve(self, x: Tensor, times: list[float]) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        for start, stop in itertools.pairwise(times):
            flat = _fourth_order(self.field, flat, start, stop)
        return flat.reshape(x.shape)

    def _call(self, x: Tensor) -> Tensor:
        return self._solve(x, self.times)

    def _inverse(self, y: Tensor) -> Tensor:
        return self._solve(y, self.times[::-1])

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log|det ∂y/∂x|`` (...), of the map as computed; ``x``: (..., D)."""
        with torch.enable_grad():
            flat = x.reshape(-1, x.shape[-1])
            leaf = flat if flat.requires_grad else flat.detach().requires_grad_(True)
            j = jacobian(self._solve(leaf, self.times), leaf)
        return torch.linalg.slogdet(j).logabsdet.reshape(x.shape[:-1])


class AlongFlow(NamedTuple):
    """Points (B, D) and score differences (B, D) after a flow, and ``∫ −2 δᵀAδ dt`` (B,) on the way.

    ``‖δ_T‖² = ‖δ_0‖² + change``, up to the error of the solver.
    """

    x: Tensor
    delta: Tensor
    change: Tensor


def along_flow(field: Velocity, x: Tensor, delta: Tensor, times: Tensor) -> AlongFlow:
    """Carry points and score differences along ``ẋ = g(x, t)``: ``δ' = −Aᵀδ`` with ``A = ∂g/∂x``.

    Hence ``d/dt FD = −2 E[δᵀAδ]``: the continuous form of ``m = J⁻¹``, without any Jacobian. Runge-Kutta of fourth
    order, as in :class:`ContinuousFlow`.

    Args:
        field: ``g``: (B, D) and a time to (B, D).
        x: points (B, D), draws of q.
        delta: ``s_q − s_p`` at the points, (B, D).
        times: (K+1,) the grid.
    """

    def rate(state: AlongFlow, t: float) -> AlongFlow:
        with torch.enable_grad():
            leaf = state.x.detach().requires_grad_(True)
            velocity = field(leaf, t)
            (pulled,) = torch.autograd.grad((velocity * state.delta.detach()).sum(), leaf)
        return AlongFlow(velocity.detach(), -pulled, -2 * (pulled * state.delta).sum(-1))

    def moved(state: AlongFlow, slope: AlongFlow, step: float) -> AlongFlow:
        return AlongFlow(*(value + step * change for value, change in zip(state, slope, strict=True)))

    state = AlongFlow(x.detach(), delta.detach(), x.new_zeros(x.shape[0]))
    grid = [float(t) for t in times]
    for start, stop in itertools.pairwise(grid):
        step = stop - start
        k1 = rate(state, start)
        k2 = rate(moved(state, k1, step / 2), start + step / 2)
        k3 = rate(moved(state, k2, step / 2), start + step / 2)
        k4 = rate(moved(state, k3, step), stop)
        slope = AlongFlow(*((a + 2 * b + 2 * c + d) / 6 for a, b, c, d in zip(k1, k2, k3, k4, strict=True)))
        state = moved(state, slope, step)
    return state
